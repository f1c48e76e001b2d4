"""What a machine has too little of, in one sentence: how much it was, and the key to turn."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elpo_fast.types import RunError

_ASKED = re.compile(r"allocate ([\d.]+) (\w+)")
_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # torch's RuntimeErrors


@contextmanager
def enough_memory(doing: str, remedy: str) -> Iterator[None]:
    """Memory of the CPU or a GPU that cannot be had while `doing` is a `RunError`, which says how
    much it was, where that is known, and the `remedy`."""
    try:
        yield
    except RunError:
        raise
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not any(sign in text for sign in _MEMORY):
            raise
        where = "GPU memory" if "CUDA" in text or "HIP" in text else "memory"
        asked = ""
        if found := _ASKED.search(text):
            number, unit = float(found[1]), found[2]
            said = size(number) if unit == "bytes" else f"{number:g} {unit}"
            asked = f" ({said} more were asked for)"
        raise RunError(f"out of {where} while {doing}{asked}; {remedy}") from error


def size(number: float) -> str:
    """Bytes for people."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while number >= 1000 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.3g} {units[0]}"


@contextmanager
def enough_disk(path: Path, remedy: str = "") -> Iterator[None]:
    """A disk that is full while `path` is written is a `RunError`, which says what is free on it;
    `remedy`, beside making room, if there is one."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"cannot write {path}: {error.strerror}, {free(path)}; make room"
            + (f", or {remedy}" if remedy else "")
        ) from error


def free(path: Path) -> str:
    """How much is free where `path` is, or would be."""
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return f"{size(usage.free)} of {size(usage.total)} are free there"
