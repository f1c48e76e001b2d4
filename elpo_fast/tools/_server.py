"""The fork server: one trusted process that forks a confined child for every call.

It never runs a model's code and never holds it: bodies come as descriptors and are passed on. It
keeps confined spares ready, hands each request to one, watches wall clock and output, and tells the
caller how it went. Its life is tied to the caller's: when the request socket closes, for whatever
reason, it kills everything and ends; when it dies, the kernel kills its children.

Requests (one packet of JSON each, with a body descriptor for `call` and `step`): `call` runs in a
fresh process that is forgotten; `open` starts a session and `step` goes from one of its snapshots
to a new one; `drop` ends snapshots; `cancel` ends a request. Replies (stream): length and JSON
header, then as many bytes of stdout, stderr and outcome as the header says. `how` it ended: done,
timeout, flood, died (with `signal`), lost (the snapshot is gone; nothing was run). While requests
run there is a `beat` a second, so that a server that hangs is told from one that works.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import resource
import selectors
import signal
import site
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from elpo_fast.tools import _confine
from elpo_fast.tools._nursery import Nursery, kill
from elpo_fast.tools._records import Bytes, Capture, Child, Options, Run, Snapshot

GRACE_S = 0.3  # from the child's own timer to the kill
FLOOD_CAP = 16 << 20  # bytes after which a program is stopped
SCAN_S = 1.0  # period of the search for stray processes of sessions
BEAT_S = 1.0  # period of the sign of life while there is something to do


class Server:
    def __init__(self, requests: socket.socket, replies: int, options: Options) -> None:
        self._requests, self._replies, self._options = requests, replies, options
        self._nursery = Nursery(options)
        self._selector = selectors.DefaultSelector()
        self._spares: deque[Child] = deque()
        self._snapshots: dict[int, Snapshot] = {}
        self._doomed: set[int] = set()  # snapshots to drop when their running steps have ended
        self._dying: set[int] = set()  # pids
        self._runs: dict[int, Run] = {}
        self._queue: deque[tuple[dict[str, Any], int]] = deque()
        self._last_id = 0
        self._ended = False
        self._failures = 0  # spares that died unused, in a row
        self._next_scan = self._next_beat = 0.0
        requests.setblocking(False)
        self._watch(requests.fileno(), self._on_request)

    def serve(self) -> None:
        """Until the caller is gone; then nothing is left."""
        try:
            self._loop()
        finally:
            self._nursery.close()

    def _loop(self) -> None:
        self._refill()
        self._reply({"ready": True})
        while not self._ended:
            for key, _ in self._selector.select(self._patience()):
                if self._selector.get_map().get(key.fd) is key:  # not ended by an earlier event
                    key.data()
            now = time.monotonic()
            for run in [run for run in self._runs.values() if run.deadline <= now]:
                late = "timeout" if run.origin is None or run.pid else "lost"
                self._finish(run, "died" if run.silent else late)
            if self._snapshots and now >= self._next_scan:
                self._reap()
                known = {snapshot.pid for snapshot in self._snapshots.values()} | self._dying
                for child in self._nursery.with_strays(known):
                    kill(child)
                self._next_scan = now + SCAN_S
            while self._queue and len(self._runs) < self._options.workers:
                self._start(*self._queue.popleft())
            self._refill()
            if self._runs and now >= self._next_beat:
                self._reply({"id": 0, "how": "beat"})
                self._next_beat = now + BEAT_S

    def _patience(self) -> float | None:
        times = [run.deadline for run in self._runs.values()]
        times += [self._next_beat] if self._runs else []
        times += [self._next_scan] if self._snapshots else []
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _watch(self, fd: int, callback: Callable[[], object]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def _unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def _reply(self, header: dict[str, Any], *parts: list[Bytes]) -> None:
        """Parts come in pieces, and are not put together here: see `_records`."""
        lengths = [sum(map(len, part)) for part in parts]
        text = json.dumps({**header, "lengths": lengths}).encode()
        for piece in (struct.pack("!I", len(text)) + text, *itertools.chain(*parts)):
            data = memoryview(piece)
            while data:
                data = data[os.write(self._replies, data) :]

    # --- requests --------------------------------------------------------------------------------

    def _on_request(self) -> None:
        """All of them: a caller must not wait, while it wants to tell us more, to be read."""
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, fds, _, _ = socket.recv_fds(self._requests, 1 << 16, 1)
                if not packet:
                    self._ended = True
                    return
                self._accept(json.loads(packet), fds)

    def _accept(self, request: dict[str, Any], fds: list[int]) -> None:
        match request["op"]:
            case "call" | "step":
                self._queue.append((request, fds[0]))
            case "open":
                child = self._spare()
                root = Snapshot(self._new_id(), child, child.control, child.pid)
                self._snapshots[root.id] = root
                child.handles.add(root.id)
                self._reply({"id": request["id"], "how": "done", "snapshot": root.id})
            case "drop":
                for number in request["snapshots"]:
                    self._drop(number)
            case "cancel":
                self._cancel(request["id"])

    def _start(self, request: dict[str, Any], body: int) -> None:
        step = request["op"] == "step"
        origin = self._snapshots.get(request["snapshot"]) if step else None
        if step and origin is None:
            os.close(body)
            self._reply({"id": request["id"], "how": "lost"})
            return
        child = origin.child if origin else self._spare()
        control = origin.control if origin else child.control
        channel, channel_end = socket.socketpair()
        channel.setblocking(False)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        captures = Capture(), Capture()
        run = Run(
            id=request["id"],
            child=child,
            channel=channel,
            captures=captures,
            pipes=dict(zip((out, err), captures, strict=True)),
            deadline=time.monotonic() + request["timeout_s"] + GRACE_S,
            origin=origin.id if origin else None,
            target=self._new_id(),
        )
        self._runs[run.id] = run
        child.runs.add(run.id)
        self._watch(channel.fileno(), lambda: self._on_channel(run))
        for fd in run.pipes:
            os.set_blocking(fd, False)
            self._watch(fd, lambda fd=fd: self._on_output(run, fd))  # type: ignore[misc]
        packet = json.dumps({"op": request["op"], "directory": f"step{run.target}"}).encode()
        passed = [body, channel_end.fileno(), out_end, err_end]
        try:
            socket.send_fds(control, [packet], passed, socket.MSG_DONTWAIT)
        except OSError:
            self._finish(run, "lost" if step else "died")
        channel_end.close()
        for fd in (body, out_end, err_end):
            os.close(fd)

    def _cancel(self, number: int) -> None:
        for entry in self._queue:
            if entry[0]["id"] == number:
                self._queue.remove(entry)
                os.close(entry[1])
                return
        if number in self._runs:
            self._finish(self._runs[number], "cancelled")

    # --- events of a run -------------------------------------------------------------------------

    def _on_output(self, run: Run, fd: int) -> None:
        """Take what is there, so that a program never waits for a reader."""
        capture = run.pipes[fd]
        with contextlib.suppress(BlockingIOError):
            while capture.receive(fd):
                if capture.total > FLOOD_CAP:
                    return self._finish(run, "flood")
            self._close_pipe(run, fd)

    def _on_channel(self, run: Run) -> bool:
        """Read what is there; False at the end of the channel."""
        try:
            got, pid = run.receive()
        except BlockingIOError:
            return False
        except ConnectionError:
            got, pid = 0, 0
        if not got:
            if run.origin is not None:
                self._finish(run, "died" if run.pid else "lost")
            else:  # its end, which tells the reason, should follow at once
                self._unwatch(run.channel.fileno())
                run.silent = True
                run.deadline = min(run.deadline, time.monotonic() + GRACE_S)
            return False
        try:
            while run.id in self._runs and (frame := run.frame()) is not None:
                kind, payload = frame
                if run.origin is not None and pid not in (0, run.pid):
                    self._identify(run, pid)
                if kind == b"D" and run.origin is not None:
                    self._keep(run, payload)
                elif kind != b"H":
                    self._finish(run, "done", payload)
        except ValueError:
            self._finish(run, "flood")
        return True

    def _identify(self, run: Run, pid: int) -> None:
        """The kernel says who is at the other end: first the fork, later perhaps its copy."""
        if run.pidfd >= 0:
            self._end(run.pid, run.pidfd)
        run.pid, run.pidfd = pid, -1
        with contextlib.suppress(ProcessLookupError):  # gone already: a copy of it will follow
            run.pidfd = os.pidfd_open(pid)

    def _keep(self, run: Run, payload: Bytes) -> None:
        """The run has become a snapshot."""
        if run.pidfd < 0:
            self._finish(run, "died")
            return
        snapshot = Snapshot(run.target, run.child, run.channel, run.pid, run.pidfd)
        self._snapshots[snapshot.id] = snapshot
        run.child.handles.add(snapshot.id)
        self._finish(run, "done", payload, snapshot)
        # A snapshot has nothing to say: whatever comes, its end above all, makes it useless.
        self._watch(run.channel.fileno(), lambda: self._drop(snapshot.id))

    def _finish(
        self,
        run: Run,
        how: str,
        payload: Bytes = b"",
        snapshot: Snapshot | None = None,
        signal_number: int = 0,
    ) -> None:
        del self._runs[run.id]
        run.child.runs.discard(run.id)
        for fd, capture in list(run.pipes.items()):
            with contextlib.suppress(BlockingIOError):
                while capture.total <= FLOOD_CAP and capture.receive(fd):
                    pass
            self._close_pipe(run, fd)
        self._unwatch(run.channel.fileno())
        if run.origin is None:
            kill(run.child)
        elif snapshot is None:
            if not run.pid:
                self._drop(run.origin)  # it did not even fork
            self._remove_directory(run.child, run.target)
        if snapshot is None:
            run.channel.close()
            if run.pidfd >= 0:
                self._end(run.pid, run.pidfd)
        if run.origin in self._doomed:
            self._drop(run.origin)
        self._end_session_if_unused(run.child)
        if how != "cancelled":
            header: dict[str, Any] = {"id": run.id, "how": how, "signal": signal_number}
            if snapshot is not None:
                header["snapshot"] = snapshot.id
            self._reply(header, *(capture.text() for capture in run.captures), [payload])

    def _close_pipe(self, run: Run, fd: int) -> None:
        del run.pipes[fd]
        self._selector.unregister(fd)
        os.close(fd)

    # --- snapshots and children ------------------------------------------------------------------

    def _drop(self, number: int) -> None:
        snapshot = self._snapshots.get(number)
        if snapshot is None:
            return
        if any(run.origin == number for run in self._runs.values()):
            self._doomed.add(number)  # steps from it are running, and would die with it
            self._unwatch(snapshot.control.fileno())
            return
        del self._snapshots[number]
        self._doomed.discard(number)
        snapshot.child.handles.discard(number)
        if snapshot.pidfd >= 0:
            self._unwatch(snapshot.control.fileno())
            snapshot.control.close()
            self._end(snapshot.pid, snapshot.pidfd)
            self._remove_directory(snapshot.child, number)
        self._end_session_if_unused(snapshot.child)

    def _end_session_if_unused(self, child: Child) -> None:
        if not child.handles and not child.runs:
            kill(child)

    def _remove_directory(self, child: Child, number: int) -> None:
        packet = json.dumps({"op": "remove", "directory": f"step{number}"}).encode()
        with contextlib.suppress(OSError):
            child.control.send(packet, socket.MSG_DONTWAIT)

    def _spare(self) -> Child:
        if not self._spares:
            self._refill()
        child = self._spares.popleft()
        child.used = True
        return child

    def _refill(self) -> None:
        while len(self._spares) < self._options.workers:
            child = self._nursery.spawn()
            self._spares.append(child)
            self._watch(child.pidfd, self._reap)

    def _reap(self) -> None:
        for child, signal_number in self._nursery.dead():
            self._bury(child, signal_number)

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _end(self, pid: int, pidfd: int) -> None:
        """Kill a process of a session and remember it until it is gone: it is no stray."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self._dying.add(pid)
        self._watch(pidfd, lambda: self._gone(pid, pidfd))

    def _gone(self, pid: int, pidfd: int) -> None:
        self._dying.discard(pid)
        self._selector.unregister(pidfd)
        os.close(pidfd)

    def _bury(self, child: Child, signal_number: int) -> None:
        for run in [self._runs[number] for number in child.runs]:
            while run.id in self._runs and self._on_channel(run):
                pass  # its last words
            if run.id in self._runs:
                self._finish(run, "died", signal_number=signal_number)
        for number in list(child.handles):
            self._drop(number)
        self._selector.unregister(child.pidfd)
        if child in self._spares:
            self._spares.remove(child)
        self._failures = 0 if child.used else self._failures + 1
        if self._failures > self._options.workers:
            sys.exit("the sandbox cannot keep a confined process alive")


def _enter_namespaces() -> None:
    """Own a user namespace and, in it, a pid namespace whose pid 1 is this server: that is what
    lets an ordinary user give every child a pid namespace of its own with a single fork."""
    _confine.drop_root()
    _confine.enter_user_namespace()
    _confine.unshare(_confine.CLONE_NEWPID)
    pid = os.fork()
    _confine.die_with_parent()
    if pid:
        os.closerange(0, 1 << 30)  # the server's end must look like one to the caller
        status = os.waitpid(pid, 0)[1]
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main() -> None:
    """Standard input: request socket. Standard output: replies. First argument: options."""
    options = Options(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # comes when the caller dies
    requests, replies = socket.socket(fileno=os.dup(0)), os.dup(1)
    os.dup2(2, 1)  # what a library prints while it is imported must not get among the replies
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # three for every snapshot
    if options.isolation == "bubblewrap":
        _enter_namespaces()
    else:
        _confine.drop_root(must_read=options.readable)
        _confine.die_with_parent(signal.SIGTERM)
        _confine.adopt_orphans()
    site.setquit()  # `exit` and `quit`, which programs use; we run without the rest of `site`
    for name in options.modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children do not touch, and so do not copy, what exists now
    Server(requests, replies, options).serve()
