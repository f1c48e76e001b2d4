"""What the fork server keeps book of: its options, children, snapshots and running requests."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

OUTPUT_CAP = 64 << 10  # bytes kept of each stream, head and tail
OUTCOME_CAP = 2 << 20  # bytes of an outcome
CUT = b"\n...[output cut]...\n"


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


class Capture:
    """What a program printed on one stream, bounded: the beginning and the end are kept."""

    def __init__(self) -> None:
        self.total = 0
        self._head, self._tail = bytearray(), bytearray()

    def add(self, data: bytes) -> None:
        room = OUTPUT_CAP // 2 - len(self._head)
        self.total += len(data)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * OUTPUT_CAP:
            del self._tail[: -OUTPUT_CAP // 2]

    def text(self) -> bytes:
        if self.total <= OUTPUT_CAP:
            return bytes(self._head + self._tail)
        return bytes(self._head + CUT + self._tail[-OUTPUT_CAP // 2 :])


@dataclass(eq=False)
class Child:
    """A confined process forked by the server: spare, call, or root of a session."""

    pid: int
    pidfd: int
    control: socket.socket
    directory: str | None  # its private directory, to be deleted (isolation "none")
    used: bool = False
    handles: set[int] = field(default_factory=set)  # living snapshots, the root among them
    runs: set[int] = field(default_factory=set)  # requests being executed


@dataclass(eq=False)
class Snapshot:
    """A process waiting to be forked. The root's is the child itself and has no `pidfd`."""

    id: int
    child: Child
    control: socket.socket
    pid: int
    pidfd: int = -1


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
    received: bytearray = field(default_factory=bytearray)
    pid: int = 0  # known from its hello, as is `pidfd`
    pidfd: int = -1
    silent: bool = False  # it has closed its channel

    def frame(self) -> tuple[bytes, bytes] | None:
        """The next whole frame, taken from what was received."""
        if len(self.received) < 5:
            return None
        length = int.from_bytes(self.received[1:5], "big")
        if length > OUTCOME_CAP:
            raise ValueError("outcome too long")
        if len(self.received) < 5 + length:
            return None
        frame = bytes(self.received[:1]), bytes(self.received[5 : 5 + length])
        del self.received[: 5 + length]
        return frame
