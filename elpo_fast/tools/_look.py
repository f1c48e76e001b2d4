"""What the supervisor sees of confined processes and their directories, without asking them.

All of it comes from /proc and the file system, as bytes, and is read through descriptors that the
program cannot redirect: a folder that becomes a link to another is not followed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator

THREADS = 64  # of one call or step
FILES_MB, FILES_MOST = 64, 4096  # in a private directory
WRITTEN_MB = 512  # by one call or step, where the directory is on the machine's disk


def visible_pid(pidfd: int) -> int:
    """The process's number in the namespace that /proc shows; -1: it has ended."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        return next(int(line[4:]) for line in file if line.startswith(b"Pid:"))


def status(pid: int | str) -> dict[bytes, list[bytes]]:
    """`/proc/PID/status`; `OSError` when it has ended."""
    with open(f"/proc/{pid}/status", "rb") as file:
        lines = (line.partition(b":") for line in file)
        return {name: rest.split() for name, _, rest in lines}


def memory_kb(pid: int | str) -> int:
    """Resident and swapped memory that is no file's; pages shared since a fork count fully."""
    seen = status(pid)
    return sum(int(seen[name][0]) for name in (b"RssAnon", b"RssShmem", b"VmSwap"))


def written(pid: int) -> int:
    """Bytes that it has written, or is going to, whether or not the file still has a name."""
    with open(f"/proc/{pid}/io", "rb") as file:
        counts = {name: int(value) for name, _, value in (line.partition(b":") for line in file)}
    return counts[b"wchar"] + counts[b"write_bytes"]


def shared_mappings(pid: int | str) -> set[bytes]:
    """Device and inode of every mapping that a fork shares instead of copying."""
    with open(f"/proc/{pid}/maps", "rb") as file:
        fields = (line.split(None, 5) for line in file if line[:80].split(None, 2)[1][3:] == b"s")
        return {b" ".join(field[3:5]) for field in fields}


def descriptors(pid: int) -> set[str]:
    """What its descriptors are, in the kernel's words."""
    folder = f"/proc/{pid}/fd"
    return {os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)}


def processes() -> Iterator[dict[bytes, list[bytes]]]:
    """The status of every process that /proc shows."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # ended meanwhile
            yield status(entry)


# --- private directories ---------------------------------------------------------------------


def too_full(directory: int) -> bool:
    """Whether more than `FILES_MOST` files or `FILES_MB` lie below the open directory."""
    entries = blocks = 0
    folders = [os.dup(directory)]
    try:
        while folders:
            folder = folders.pop()
            try:
                for name in os.listdir(folder):
                    with contextlib.suppress(FileNotFoundError):
                        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                        entries += 1
                        blocks += found.st_blocks
                        if entries > FILES_MOST or blocks > FILES_MB << 11:
                            return True
                        if stat.S_ISDIR(found.st_mode):
                            folders.append(_opened(name, folder))
            finally:
                os.close(folder)
    finally:
        for folder in folders:
            os.close(folder)
    return False


def empty(directory: int) -> None:
    """Remove all that lies below the open directory, of any depth and any modes: what lies in its
    folders moves up until there are none."""
    while entries := os.listdir(directory):
        for entry in entries:
            if _unlinked(entry, directory):
                continue
            folder = _opened(entry, directory)
            try:
                for inner in os.listdir(folder):
                    if not _unlinked(inner, folder):
                        os.close(_opened(inner, folder))
                        up = secrets.token_hex(8)
                        os.rename(inner, up, src_dir_fd=folder, dst_dir_fd=directory)
            finally:
                os.close(folder)
            os.rmdir(entry, dir_fd=directory)


def _unlinked(name: str, parent: int) -> bool:
    """False where it is a folder."""
    try:
        os.unlink(name, dir_fd=parent)
    except IsADirectoryError:
        return False
    return True


def _opened(name: str, parent: int) -> int:
    """A folder that the program made, whatever mode it gave it."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if os.stat(handle).st_mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=handle)
    finally:
        os.close(handle)
