"""A folder that one process at a time writes to.

The system holds the lock and lets go of it when the process ends, however it ends; the file in the
folder says who has it. Processes that are started meanwhile do not inherit it.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import warnings
from pathlib import Path

from elpo_fast.config import ConfigError

LOCK = ".lock"


class Lock:
    """The lock of an existing folder, held from now until `release` or the process's end.

    Raises `ConfigError` where another process has it, with its pid and host, and `OSError` where
    the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 1000, 0).decode(errors="replace") or "another process"
            os.close(self._file)
            raise ConfigError(
                f"{folder} is in use by {holder}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder} is on a file system without locks ({error.strerror}): nothing keeps a "
                "second process out of it",
                stacklevel=2,
            )
        os.truncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        os.truncate(self._file, 0)
        os.close(self._file)


def holder(folder: Path) -> tuple[int, str] | None:
    """Process and host that wrote to a folder last without letting go of it, alive or not."""
    try:
        said = re.fullmatch(r"process (\d+) on (.+)", (folder / LOCK).read_text(errors="replace"))
    except OSError:
        return None
    return (int(said[1]), said[2]) if said else None
