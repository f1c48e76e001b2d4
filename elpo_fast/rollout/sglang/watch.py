"""Run a server for as long as both it and the process that wants it live.

    python watch.py PARENT_PID COMMAND ...

Started as the leader of a session of its own, in the server's folder. When the server has ended,
the parent is gone (however it ended) or SIGTERM asks for it, every process of the session is
killed and what it left in shared memory removed; without a parent the folder goes too. The standard
library alone; a signal on the parent's death, which Linux offers, would come when the starting
*thread* ends.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SHARED = Path("/dev/shm")
# The inodes of a process's mappings; a semaphore's maker maps it under a name it had before.
_LEFT_BEHIND = re.compile(rb" (\d+) +/dev/shm/(?:sglang|sem\.)")
_LOOK_S = 2.0
_TRACKER_S = 2.0


def main() -> None:
    parent = int(sys.argv[1])
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    server = subprocess.Popen(sys.argv[2:])
    files, looked = set[str](), 0.0
    while server.poll() is None and os.getppid() == parent and not asked:
        if time.monotonic() > looked + _LOOK_S:
            files, looked = files | shared_files(os.getpid()), time.monotonic()
        time.sleep(0.2)
    files |= shared_files(os.getpid())  # made since the last look
    patience = time.monotonic() + _TRACKER_S
    while members := list(_session(os.getpid())):
        for pid in members:
            with suppress(OSError):  # it has just ended
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b".resource_tracker" in command and time.monotonic() < patience:
                    continue  # it removes semaphores and ends when nobody needs it any more
                os.kill(pid, signal.SIGKILL)
        server.poll()  # else it stays, as a zombie
        time.sleep(0.01)
    for file in files:
        Path(file).unlink(missing_ok=True)
    if os.getppid() != parent:
        shutil.rmtree(Path.cwd(), ignore_errors=True)


def _session(leader: int) -> Iterator[int]:
    """A session's processes but its leader; those that only wait to be reaped do not count."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != leader:
            try:
                # Bytes: a process may have a name that is not UTF-8.
                state, _, _, session = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state != b"Z":
                yield int(entry.name)


def shared_files(leader: int) -> set[str]:
    """Files in shared memory of a session's processes that nobody removes after a kill."""
    inodes: set[bytes] = set()
    for pid in _session(leader):
        with suppress(OSError):
            inodes.update(_LEFT_BEHIND.findall(Path(f"/proc/{pid}/maps").read_bytes()))
    found: set[str] = set()
    if inodes:
        for file in (*_SHARED.glob("sglang*"), *_SHARED.glob("sem.mp-*")):
            with suppress(OSError):  # it has just been removed
                if b"%d" % file.stat().st_ino in inodes:
                    found.add(str(file))
    return found


if __name__ == "__main__":
    main()
