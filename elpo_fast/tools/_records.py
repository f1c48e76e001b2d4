"""What the fork server keeps book of: its options, children, snapshots and running requests.

What programs print and answer passes through memory that no fork inherits: the next program is a
fork of this process, and could read there what others of its task have found out.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from dataclasses import dataclass, field

OUTPUT_CAP = 64 << 10  # bytes kept of each stream, head and tail
OUTCOME_CAP = 2 << 20  # bytes of an outcome
CUT = b"\n...[output cut]...\n"
_HALF = OUTPUT_CAP // 2
_WIPE_ON_FORK = 18  # madvise(2)


@dataclass(frozen=True)
class Options:
    """What the caller decides."""

    isolation: str  # "bubblewrap", "landlock" or "none"
    workers: int  # calls and steps running at once
    memory_mb: int  # address space of a child beyond the server's own
    processes: int  # living snapshots of one session
    modules: tuple[str, ...]  # imported before the first fork
    readable: tuple[str, ...]  # what children may read, where Landlock is what hides the rest
    listed: tuple[str, ...]  # folders of which they may see the names below, no more


Bytes = bytes | memoryview


def unshared(size: int) -> memoryview:
    """Memory in which every fork of this process finds zeros."""
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(_WIPE_ON_FORK)
    return memoryview(pages)


def cut(text: bytes) -> bytes:
    """The beginning and the end of a long text."""
    return text if len(text) <= OUTPUT_CAP else text[:_HALF] + CUT + text[-_HALF:]


class Capture:
    """What a program printed on one stream, bounded: the beginning and the end are kept."""

    def __init__(self) -> None:
        self.total = 0
        self._kept = unshared(OUTPUT_CAP)  # the second half is a ring

    def receive(self, fd: int) -> int:
        """Read what fits; the number of bytes, 0 at the end of the stream."""
        at = self._at()
        got = os.readv(fd, [self._kept[at : _HALF if at < _HALF else OUTPUT_CAP]])
        self.total += got
        return got

    def text(self) -> list[Bytes]:
        """As `cut`, in pieces."""
        if self.total <= OUTPUT_CAP:
            return [self._kept[: self.total]]
        at = self._at()
        return [self._kept[:_HALF], CUT, self._kept[at:], self._kept[_HALF:at]]

    def _at(self) -> int:
        """Where the next byte goes."""
        return self.total if self.total < _HALF else _HALF + (self.total - _HALF) % _HALF


@dataclass(eq=False)
class Child:
    """A confined process forked by the server: spare, call, or root of a session."""

    pid: int
    pidfd: int
    control: socket.socket
    directory: str | None  # its private one, to be deleted; None: in a file system of its own
    used: bool = False
    handles: set[int] = field(default_factory=set)  # living snapshots, the root among them
    runs: set[int] = field(default_factory=set)  # requests being executed
    folder: int = -1  # the private directory, opened by the child while it could be trusted
    changed_ns: int = 0  # when the directory was changed last, then
    touched: bool = False  # a program has changed the directory
    listener: int = -1  # asks us before every fork
    refused: int = 0  # forks


@dataclass(eq=False)
class Snapshot:
    """A process waiting to be forked, stopped. The root's is the child itself and has no `pidfd`:
    it has run nothing. A snapshot whose forks would share something but their memory is `single`:
    one step starts from it, then it ends."""

    id: int
    child: Child
    control: socket.socket
    pid: int
    pidfd: int = -1
    own: str = ""  # its channel, in the kernel's words
    single: bool | None = None  # None: not looked at yet
    spent: bool = False  # single, and a step has started


@dataclass(eq=False)
class Run:
    """A request being executed."""

    id: int
    child: Child
    channel: socket.socket
    captures: tuple[Capture, Capture]
    pipes: dict[int, Capture]  # open read ends of stdout and stderr
    deadline: float
    origin: int | None  # the snapshot it started from; None: a call
    target: int  # id of the snapshot it may become
    may_fork: int = 0  # pid of the snapshot that forks for it, until it has
    own: str = ""  # the child's end of the channel, in the kernel's words
    received: memoryview = field(default_factory=lambda: unshared(OUTPUT_CAP))
    start: int = 0  # in `received`, what is not yet taken
    end: int = 0
    pid: int = 0  # known from its hello, as is `pidfd`
    pidfd: int = -1
    silent: bool = False  # it has closed its channel

    def receive(self) -> tuple[int, int]:
        """Read from the channel what fits; the number of bytes and, where it is told, whose (0)."""
        room = self.received[self.end :]
        got, ancillary, _, _ = self.channel.recvmsg_into([room], socket.CMSG_SPACE(12))
        self.end += got
        return got, next((struct.unpack("3i", sent[2])[0] for sent in ancillary), 0)

    def frame(self) -> tuple[bytes, memoryview] | None:
        """The next whole frame, taken from what was received; there is room for it until then."""
        pending = self.received[self.start : self.end]
        length = int.from_bytes(pending[1:5], "big") if len(pending) >= 5 else 0
        if length > OUTCOME_CAP:
            raise ValueError("outcome too long")
        if len(pending) >= 5 + length:
            self.start += 5 + length
            return bytes(pending[:1]), pending[5 : 5 + length]
        if 5 + length > len(self.received):
            self.received = unshared(5 + length)
        self.received[: len(pending)] = pending
        self.start, self.end = 0, len(pending)
        return None
