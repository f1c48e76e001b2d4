"""The fork server: one trusted process that forks a confined child for every call.

It never runs a model's code and never holds it: bodies come as descriptors and are passed on. It
keeps confined spares ready, hands each request to one, watches wall clock and output, and tells the
caller how it went. Its life is tied to the caller's: when the request socket closes, for whatever
reason, it kills everything and ends; when it dies, the kernel kills its children.

Requests (one packet of JSON each, with a body descriptor for `call` and `step`): `call` runs in a
fresh process that is forgotten; `open` starts a session and `step` goes from one of its snapshots
to a new one; `drop` ends snapshots; `cancel` ends a request. Replies (stream): length and JSON
header, then as many bytes of stdout, stderr and outcome as the header says. `how` it ended: done,
timeout, flood, stopped (with `reason`), died (with `signal`), lost (the snapshot is gone; what was
done is forgotten). While requests run there is a `beat` a second, so that a server that hangs is
told from one that works.

Branching is a fork, which copies memory and nothing else. So that branches are apart:

- a process of a session forks when a step is to start from it, and never else: the kernel asks us;
- a snapshot is stopped, with whatever threads its step left, and goes on only to fork;
- a snapshot with other threads, descriptors of its own or shared memory is `single`: one step
  starts from it, then it is gone, and whoever needs it again builds it anew in a new session;
- the private directory belongs to the session. The first step that changes it makes the session a
  line: every other snapshot is gone, and so are steps that were running beside it.
"""

from __future__ import annotations

import contextlib
import functools
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
import tempfile
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from elpo_fast.tools import _confine, _look
from elpo_fast.tools._nursery import Nursery, kill, remove
from elpo_fast.tools._records import Bytes, Capture, Child, Options, Run, Snapshot

GRACE_S = 0.3  # from the child's own timer to the kill
FLOOD_CAP = 16 << 20  # bytes after which a program is stopped
LOOK_S = 0.1  # period of looks at what runs, where its own file system does not bound it
REAP_S = 1.0  # period of burying the orphans of sessions
STOP_S = 0.05  # until a snapshot that was told to stop has stopped
REFUSED_FORKS = 1000  # then a session ends: each of them is a question to us
BEAT_S = 1.0  # period of the sign of life while there is something to do


class Server:
    def __init__(
        self, requests: socket.socket, replies: int, options: Options, folder: str
    ) -> None:
        self._requests, self._replies, self._options = requests, replies, options
        self._nursery = Nursery(options, folder)
        self._own_mappings = _look.shared_mappings("self")
        self._own_kb = _look.memory_kb("self")
        self._bounded = options.isolation == "bubblewrap"  # in threads and files, by the kernel
        self._selector = selectors.DefaultSelector()
        self._spares: deque[Child] = deque()
        self._snapshots: dict[int, Snapshot] = {}
        self._doomed: set[int] = set()  # snapshots to drop when their running steps have ended
        self._runs: dict[int, Run] = {}
        self._queue: deque[tuple[dict[str, Any], int]] = deque()
        self._last_id = 0
        self._ended = False
        self._failures = 0  # spares that died unused, in a row
        self._next_look = self._next_reap = self._next_beat = 0.0
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
            if self._snapshots and now >= self._next_reap:
                self._reap()
                self._next_reap = now + REAP_S
            if self._runs and not self._bounded and now >= self._next_look:
                for run in list(self._runs.values()):
                    if run.id in self._runs and (excess := self._excess(run)):
                        self._finish(run, "stopped", reason=excess)
                self._next_look = now + LOOK_S
            while self._queue and len(self._runs) < self._options.workers:
                self._start(*self._queue.popleft())
            self._refill()
            if self._runs and now >= self._next_beat:
                self._reply({"id": 0, "how": "beat"})
                self._next_beat = now + BEAT_S

    def _patience(self) -> float | None:
        times = [run.deadline for run in self._runs.values()]
        times += [self._next_beat] if self._runs else []
        times += [self._next_reap] if self._snapshots else []
        times += [self._next_look] if self._runs and not self._bounded else []
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _watch(self, fd: int, callback: Callable[[], object]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def _unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError, ValueError):  # not watched, not open
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
        if step and (origin is None or not self._may_start(origin)):
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
            may_fork=origin.pid if origin else 0,
            own=os.readlink(f"/proc/self/fd/{channel_end.fileno()}"),
        )
        self._runs[run.id] = run
        child.runs.add(run.id)
        self._watch(channel.fileno(), lambda: self._on_channel(run))
        for fd in run.pipes:
            os.set_blocking(fd, False)
            self._watch(fd, lambda fd=fd: self._on_output(run, fd))  # type: ignore[misc]
        passed = [body, channel_end.fileno(), out_end, err_end]
        try:
            socket.send_fds(control, [request["op"].encode()], passed, socket.MSG_DONTWAIT)
            if origin and origin.pidfd >= 0:
                signal.pidfd_send_signal(origin.pidfd, signal.SIGCONT)
        except OSError:
            self._finish(run, "lost" if step else "died")
        channel_end.close()
        for fd in (body, out_end, err_end):
            os.close(fd)

    def _may_start(self, origin: Snapshot) -> bool:
        """Whether a step may start from this snapshot; one that is single is spent by it."""
        if origin.single is None:
            origin.single = self._shares(origin)
        may, origin.spent = not origin.spent, origin.single
        return may

    def _shares(self, snapshot: Snapshot) -> bool:
        """Whether forks of it would share more than what they find in memory."""
        if snapshot.child.touched:
            return True
        if snapshot.pidfd < 0:
            return False  # the root has run nothing
        pid = _look.visible_pid(snapshot.pidfd)
        patience = time.monotonic() + STOP_S
        try:
            while (status := _look.status(pid))[b"State"][0] != b"T":  # what may change it still
                if time.monotonic() > patience:
                    return True
                time.sleep(0.0005)
            return (
                int(status[b"Threads"][0]) > 1
                or not _look.shared_mappings(pid) <= self._own_mappings
                or not _look.descriptors(pid) <= {os.devnull, snapshot.own}
            )
        except OSError:  # it has ended, and cannot be forked anyway
            return True

    def _excess(self, run: Run) -> str | None:
        """Which bound a program is beyond. The kernel keeps to most of them: these are ours."""
        pid = run.pid or (run.child.pid if run.origin is None else 0)
        if not pid or run.child.folder < 0:
            return None
        with contextlib.suppress(OSError):  # it has just ended
            if int(_look.status(pid)[b"Threads"][0]) > _look.THREADS:
                return f"more than {_look.THREADS} threads"
            if _look.written(pid) > _look.WRITTEN_MB << 20:
                return f"more than {_look.WRITTEN_MB} MB written"
            if _look.too_full(run.child.folder):
                return f"more than {_look.FILES_MB} MB or {_look.FILES_MOST} files in its directory"
        return None

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
        if run.origin is not None and not run.pid and pid:
            self._identify(run, pid)
        try:
            while run.id in self._runs and (frame := run.frame()) is not None:
                kind, payload = frame
                if kind == b"D" and run.origin is not None:
                    self._keep(run, payload)
                elif kind != b"H":
                    self._finish(run, "done", payload)
        except ValueError:
            self._finish(run, "flood")
        if run.id in self._runs and run.pid and run.pidfd < 0:  # it had ended before it was known
            self._on_end(run)
        return True

    def _identify(self, run: Run, pid: int) -> None:
        """The kernel says who the fork is. What it was forked from has done its work."""
        run.pid = pid
        with contextlib.suppress(ProcessLookupError):  # gone already
            run.pidfd = os.pidfd_open(pid)
            # Its end closes its channel for us only if nobody else holds that, and what it was
            # forked from may be stopped before it has let go.
            self._watch(run.pidfd, lambda: self._on_end(run))
        origin = self._snapshots[run.origin]  # type: ignore[index]
        if origin.single or origin.id in self._doomed:
            self._drop(origin.id)
        elif origin.pidfd >= 0 and not self._awaited(origin.id):
            self._stop(origin.pidfd)

    def _on_end(self, run: Run) -> None:
        """The process of a step, or of the snapshot that it became, has ended."""
        self._unwatch(run.pidfd)
        while run.id in self._runs and self._on_channel(run):
            pass  # its last words
        if run.id in self._runs:
            self._finish(run, "died")
        else:
            self._drop(run.target)

    def _awaited(self, number: int) -> bool:
        """Whether a fork of this snapshot has still to report."""
        return any(run.origin == number and not run.pid for run in self._runs.values())

    def _stop(self, pidfd: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)

    def _keep(self, run: Run, payload: Bytes) -> None:
        """The run has become a snapshot."""
        if run.pidfd < 0:
            self._finish(run, "died")
            return
        self._stop(run.pidfd)
        try:
            grown = _look.memory_kb(_look.visible_pid(run.pidfd)) - self._own_kb
        except (OSError, KeyError):  # it has ended
            self._finish(run, "died")
            return
        snapshot = Snapshot(run.target, run.child, run.channel, run.pid, run.pidfd, run.own)
        self._snapshots[snapshot.id] = snapshot
        run.child.handles.add(snapshot.id)
        self._finish(run, "done", payload, snapshot, grown_kb=max(0, grown))
        # A snapshot has nothing to say: whatever comes, its end above all, makes it useless.
        if snapshot.id in self._snapshots:
            self._watch(run.channel.fileno(), lambda: self._drop(snapshot.id))

    def _finish(
        self,
        run: Run,
        how: str,
        payload: Bytes = b"",
        snapshot: Snapshot | None = None,
        **told: Any,
    ) -> None:
        del self._runs[run.id]
        run.child.runs.discard(run.id)
        for fd, capture in list(run.pipes.items()):
            with contextlib.suppress(BlockingIOError):
                while capture.total <= FLOOD_CAP and capture.receive(fd):
                    pass
            self._close_pipe(run, fd)
        self._unwatch(run.channel.fileno())
        if snapshot is None:
            run.channel.close()
            if run.pidfd >= 0:
                self._end(run.pidfd)
        if run.origin is None or not (run.pid or run.may_fork):
            kill(run.child)  # a call, or a fork that did not report
        elif not run.pid:
            self._drop(run.origin)  # it did not even fork
        elif self._look_at_directory(run.child, snapshot) and how == "done":
            how, payload, told = "lost", b"", {}
            if snapshot is not None:
                self._drop(snapshot.id)
                snapshot = None
        self._end_session_if_unused(run.child)
        if how != "cancelled":
            header: dict[str, Any] = {"id": run.id, "how": how, **told}
            if snapshot is not None:
                header["snapshot"] = snapshot.id
            self._reply(header, *(capture.text() for capture in run.captures), [payload])

    def _look_at_directory(self, child: Child, newest: Snapshot | None) -> bool:
        """After a step. The first that changes the directory leaves nothing beside itself. True
        where others run: they may have written what this step has seen, so it does not stand."""
        if child.touched or child.folder < 0:
            return False
        child.touched = os.stat(child.folder).st_ctime_ns != child.changed_ns or bool(
            os.listdir(child.folder)
        )
        if not child.touched:
            return False
        beside = [self._runs[number] for number in child.runs]
        for run in beside:
            self._finish(run, "lost")
        for number in child.handles - {newest.id if newest else 0}:
            self._drop(number)
        return bool(beside)

    def _close_pipe(self, run: Run, fd: int) -> None:
        del run.pipes[fd]
        self._selector.unregister(fd)
        os.close(fd)

    # --- snapshots and children ------------------------------------------------------------------

    def _drop(self, number: int) -> None:
        snapshot = self._snapshots.get(number)
        if snapshot is None:
            return
        if self._awaited(number):
            self._doomed.add(number)  # forks of it would not come
            self._unwatch(snapshot.control.fileno())
            return
        del self._snapshots[number]
        self._doomed.discard(number)
        snapshot.child.handles.discard(number)
        if snapshot.pidfd >= 0:
            self._unwatch(snapshot.control.fileno())
            snapshot.control.close()
            with contextlib.suppress(OSError):  # its end, a millisecond of work, can wait
                os.sched_setscheduler(snapshot.pid, os.SCHED_IDLE, os.sched_param(0))
            self._end(snapshot.pidfd)
        self._end_session_if_unused(snapshot.child)

    def _end_session_if_unused(self, child: Child) -> None:
        if not child.handles and not child.runs:
            kill(child)

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
            ready = functools.partial(self._on_ready, child)
            self._watch(child.control.fileno(), ready)

    def _on_ready(self, child: Child) -> None:
        """It is confined; until here it was ours."""
        self._unwatch(child.control.fileno())
        try:
            packet, fds, _, _ = socket.recv_fds(child.control, 100, 2)
        except ConnectionError:  # it was killed before it read what it was sent
            return
        if packet:
            child.folder = fds[0]
            child.changed_ns = os.stat(child.folder).st_ctime_ns
            for child.listener in fds[1:]:
                self._watch(child.listener, lambda: self._on_fork(child))

    def _on_fork(self, child: Child) -> None:
        """A process of this child wants to fork, or none is left."""
        request = _confine.next_fork(child.listener)
        if request is None:
            self._unwatch(child.listener)
            return
        question, pid = request
        runs = [self._runs[number] for number in child.runs]
        run = next((run for run in runs if run.may_fork == pid), None)
        _confine.answer_fork(child.listener, question, allow=run is not None)
        if run is not None:
            run.may_fork = 0
            return
        child.refused += 1
        if child.refused > REFUSED_FORKS:
            kill(child)

    def _reap(self) -> None:
        for child, signal_number in self._nursery.dead():
            self._bury(child, signal_number)

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _end(self, pidfd: int) -> None:
        self._unwatch(pidfd)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)

    def _bury(self, child: Child, signal_number: int) -> None:
        for run in [self._runs[number] for number in child.runs]:
            while run.id in self._runs and self._on_channel(run):
                pass  # its last words
            if run.id in self._runs:
                self._finish(run, "died", signal=signal_number)
        for number in list(child.handles):
            self._drop(number)
        for fd in (child.pidfd, child.control.fileno(), child.listener):
            self._unwatch(fd)
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


def _outlive_server() -> str:
    """Fork: the child goes on as the server, the parent stays until it has ended and then removes
    what it left: its processes, which come to us as orphans, and the folder whose name is given."""
    _confine.adopt_orphans()
    _confine.die_with_parent(signal.SIGTERM)
    folder = tempfile.mkdtemp(prefix="elpo-")
    server = os.fork()
    if not server:
        _confine.adopt_orphans()
        _confine.die_with_parent(signal.SIGTERM)
        return folder
    os.closerange(0, 1 << 30)
    pidfd = os.pidfd_open(server)

    def end(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # has ended, and is asked for again
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    status = os.waitpid(server, 0)[1]
    with contextlib.suppress(ChildProcessError):
        while True:
            for left in _look.processes():
                if int(left[b"PPid"][0]) == os.getpid():
                    os.kill(int(left[b"Pid"][0]), signal.SIGKILL)
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    remove(folder)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main() -> None:
    """Standard input: request socket. Standard output: replies. First argument: options."""
    options = Options(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # comes when the caller dies
    requests, replies = socket.socket(fileno=os.dup(0)), os.dup(1)
    os.dup2(2, 1)  # what a library prints while it is imported must not get among the replies
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # several for every snapshot
    _confine.die_early(900)
    if options.isolation == "bubblewrap":
        _enter_namespaces()
        folder = ""
    else:
        _confine.drop_root(must_read=options.readable)
        folder = _outlive_server()
    site.setquit()  # `exit` and `quit`, which programs use; we run without the rest of `site`
    for name in options.modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children do not touch, and so do not copy, what exists now
    _confine.use_huge_pages()
    try:
        Server(requests, replies, options, folder).serve()
    finally:
        if folder:
            remove(folder)
