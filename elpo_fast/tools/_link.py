"""The caller's end of one fork server: starting it, talking to it, noticing its death or silence.

One thread a server starts the process and reads its replies; requests may come from any thread and
any event loop. The thread lives as long as the server, so that the kernel's "die with the parent"
(which means the parent *thread*) holds, and the server ends with us even after SIGKILL. A server
that owes a reply and gives no sign of life for `HANG_S` is killed, and then is one that died.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import marshal
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elpo_fast.tools._records import CUT, OUTCOME_CAP, OUTPUT_CAP, Options
from elpo_fast.tools._view import BOOT, PYTHON, View

START_S = 120  # until a server has imported its modules, on a machine with other things to do
HANG_S = 10  # silent seconds; a working server says something every second

_HEADER_CAP = 4096  # bytes
_PARTS_CAP = 2 * (OUTPUT_CAP + len(CUT)) + OUTCOME_CAP

_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

LANDLOCK_GAP = (
    "Landlock does not stop programs from finding out which paths exist on this machine, their "
    "sizes and times, and where links lead"
)

# Kernel settings, at these values, that forbid user namespaces, and with them bubblewrap.
_SETTINGS = Path("/proc/sys")
_FORBIDDING = {
    "kernel/unprivileged_userns_clone": "0",
    "kernel/apparmor_restrict_unprivileged_userns": "1",
    "user/max_user_namespaces": "0",
}

# Run confined before a server is trusted: which holes are open? The last value must be [].
_SELF_TEST = """
import os, socket
def works(attempt):
    try: attempt()
    except Exception: return False
    return True
[name for name, attempt in {
    "reading /etc/passwd": lambda: open("/etc/passwd").read(1),
    "reading another process": lambda: open("/proc/1/environ").read(1),
    "network": lambda: socket.socket(),
    "running programs": lambda: os.execv("/usr/bin/true", ["true"]),
    "forking": os.fork,
    "writing outside /tmp": lambda: open("/usr/lib/.elpo", "w"),
}.items() if works(attempt)] + (["uid 0"] if os.getuid() == 0 else [])
"""


class ServerGoneError(RuntimeError):
    """The fork server ended before it answered."""


class NotStartedError(ServerGoneError):
    """A server did not start, though one did before; the message says why."""


class RefusedError(RuntimeError):
    """This isolation cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Header, stdout, stderr and outcome of one request."""

    header: dict[str, Any]
    parts: tuple[bytes, ...]


class Link:
    """One fork server. `ready` resolves to (isolation, reasons why no better one), or fails."""

    def __init__(self, options: Options, isolations: tuple[str, ...], view: View) -> None:
        """`isolations` are tried in this order; the one that works takes that of `options`."""
        self.ready: Future[tuple[str, tuple[str, ...]]] = Future()
        self.load = 0
        self.alive = True  # or starting
        self._options, self._isolations, self._view = options, isolations, view
        # Two locks: the reader needs `_waiting` even while a sender waits for the server to read.
        self._sending, self._waiting = threading.Lock(), threading.Lock()
        self._pending: dict[int, Future[Reply]] = {}
        self._last_id = 0
        self._silence = 0  # seconds
        self._closed = False
        self._requests: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._live, name="elpo-sandbox", daemon=True)
        self._thread.start()

    def send(self, op: str, body: Any = None, **fields: Any) -> tuple[int, Future[Reply]]:
        """Send a request; its number and the future of its reply (`ServerGoneError`)."""
        future: Future[Reply] = Future()
        with self._sending:
            self._last_id += 1
            number = self._last_id
            with self._waiting:
                self._pending[number] = future
            try:
                self._post({"op": op, "id": number, **fields}, body)
            except OSError:
                self.alive = False  # the thread will notice as well, but the next call may be first
                with self._waiting:
                    unanswered = self._pending.pop(number, None) is not None
                if unanswered:  # else the thread has told it already
                    future.set_exception(ServerGoneError("the sandbox process ended"))
        return number, future

    def cancel(self, number: int) -> None:
        """The reply of request `number` is not awaited any more."""
        with self._waiting:
            self._pending.pop(number, None)
        self.tell("cancel", id=number)

    def tell(self, op: str, **fields: Any) -> None:
        """Send a request that has no reply; nothing to tell a dead server."""
        with self._sending, contextlib.suppress(OSError):
            self._post({"op": op, **fields})

    def close(self) -> None:
        """End the server and wait until it, and all it started, are gone."""
        self._closed = True
        self._hang_up()
        self._thread.join(HANG_S)
        if self._process is not None and self._process.poll() is None:
            _end(self._process)
        self._thread.join()

    def _post(self, request: dict[str, Any], body: Any = None) -> None:
        if self._requests is None:
            raise BrokenPipeError("the server is gone")
        _post(self._requests, request, body)

    def _hang_up(self) -> None:
        with self._sending:
            if self._requests is not None:
                self._requests.close()
                self._requests = None

    # --- the thread ------------------------------------------------------------------------------

    def _live(self) -> None:
        reasons: list[str] = []
        try:
            replies, isolation = self._start(reasons)
        except RuntimeError as problem:
            self.alive = False
            self.ready.set_exception(problem)
            return
        self.ready.set_result((isolation, tuple(reasons)))
        assert self._process is not None
        with replies:
            try:
                for reply in _read(replies, self._on_silence):
                    self._silence = 0
                    with self._waiting:
                        future = self._pending.pop(reply.header["id"], None)
                    if future is not None and future.set_running_or_notify_cancel():
                        future.set_result(reply)
            except ValueError:
                self._process.kill()  # it is not itself any more
        self.alive = False
        self._hang_up()
        self._process.wait()
        with self._waiting:
            pending, self._pending = self._pending, {}
        for future in pending.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(ServerGoneError("the sandbox process ended"))

    def _on_silence(self) -> None:
        """Called in every silent second."""
        self._silence = self._silence + 1 if self._pending else 0
        if self._silence >= HANG_S:
            assert self._process is not None
            _end(self._process)

    def _start(self, reasons: list[str]) -> tuple[socket.socket, str]:
        for isolation in self._isolations:
            try:
                return self._start_one(isolation), isolation
            except RefusedError as refusal:
                reasons.append(f"{isolation}: {refusal}")
        accept = f"accept by tools.isolation=landlock that {LANDLOCK_GAP}, or "
        raise RuntimeError(
            f"no safe way to run model-written code here ({'; '.join(reasons)}); install "
            f"bubblewrap, or {'' if 'landlock' in self._isolations else accept}"
            "set tools.isolation=none if everything the model may do is harmless"
        )

    def _start_one(self, isolation: str) -> socket.socket:
        command = self._command(isolation)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        replies, write_end = socket.socketpair()
        replies.settimeout(1.0)
        with contextlib.ExitStack() as on_failure, tempfile.TemporaryFile() as errors:
            on_failure.enter_context(replies)
            on_failure.enter_context(ours)
            try:
                process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=write_end.fileno(),
                    stderr=errors.fileno(),
                    env=_environment(),
                    cwd="/",
                    start_new_session=True,
                )
            finally:
                theirs.close()
                write_end.close()
            on_failure.callback(process.wait)
            seconds = itertools.count(1)

            def on_silence() -> None:
                if next(seconds) >= START_S:
                    _end(process)
                    raise RefusedError(f"it did not start within {START_S} s")

            try:
                first = _read(replies, on_silence)
                next(first)  # ready
                if isolation != "none":
                    _self_test(ours, first)
            except (OSError, ValueError, StopIteration, RefusedError) as problem:
                ours.close()
                process.wait()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                # A child's reason comes before the server's complaint that it died of it.
                causes = [line for line in said if line.startswith("cannot confine")]
                last = (causes or said or [str(problem) or "it ended while starting"])[-1]
                forbidden = _namespaces_forbidden() if isolation == "bubblewrap" else ""
                raise RefusedError(last + forbidden) from None
            on_failure.pop_all()
        with self._sending:
            self._process, self._requests = process, ours
        if self._closed:
            self._hang_up()
        return replies

    def _command(self, isolation: str) -> list[str]:
        where: Callable[[str], str] = _inside if isolation == "bubblewrap" else str
        options = json.dumps(asdict(self._options) | {"isolation": isolation})
        python = [where(PYTHON), "-P", "-s", "-S", "-B", "-X", "utf8", where(BOOT)]
        python += [self._view.imports(where), options]
        if isolation != "bubblewrap":
            return python
        bubblewrap = shutil.which("bwrap")
        if bubblewrap is None:
            raise RefusedError("bwrap is not installed (package bubblewrap)")
        return [bubblewrap, *_bubblewrap(self._view), *python]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asked first: what we started ends the server and whatever that has started."""
    process.terminate()
    process.send_signal(signal.SIGCONT)
    try:
        process.wait(HANG_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _inside(path: str) -> str:
    """Where a readable path lies in the container, in which everyone has a /tmp of their own."""
    return f"/outside{path}" if Path(path).is_relative_to("/tmp") else path


def _bubblewrap(view: View) -> Iterator[str]:
    """A read-only root with nothing in it but what may be read, an empty /tmp and /proc, four
    devices."""
    yield from ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts")
    yield from ("--die-with-parent", "--new-session", "--hostname", "sandbox")
    # The server's own /tmp: some modules want to write while they are imported. Every child covers
    # it with one of its own.
    yield from ("--perms", "1777", "--tmpfs", "/tmp")
    places = set(map(_inside, view.readable))
    parents = {str(parent) for place in places for parent in Path(place).parents}
    for parent in sorted(parents - {"/"} - places):
        yield from ("--perms", "0755", "--dir", parent)
    for path in sorted({*view.readable, *view.hidden}):  # outer folders first
        if path in view.hidden:
            yield from ("--perms", "0755", "--tmpfs", _inside(path))
        elif os.path.islink(path) and Path(path).parent == Path("/"):
            yield from ("--symlink", os.readlink(path), path)
        else:
            yield from ("--ro-bind", path, _inside(path))
    yield from ("--proc", "/proc", "--tmpfs", "/dev")
    for device in _DEVICES:
        yield from ("--dev-bind", device, device)
    yield from ("--symlink", "/tmp", "/dev/shm")
    for path in ("/dev", *map(_inside, view.hidden), "/"):
        yield from ("--remount-ro", path)
    yield from ("--chdir", "/", "--")


def _namespaces_forbidden() -> str:
    """Which kernel settings are in the way, to be appended to a refusal."""
    found = [
        f"{name.replace('/', '.')}={value}"
        for name, value in _FORBIDDING.items()
        if (_SETTINGS / name).is_file() and (_SETTINGS / name).read_text().strip() == value
    ]
    return f" (user namespaces are restricted: {', '.join(found)})" if found else ""


def _environment() -> dict[str, str]:
    """All that programs see. A fixed hash seed: sets print the same in a rebuilt session."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return kept | {
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "MALLOC_ARENA_MAX": "1",  # more, one a thread, take address space that nothing fills
        **dict.fromkeys(_THREAD_VARIABLES, "1"),  # threads do not survive a fork
    }


def _self_test(requests: socket.socket, replies: Iterator[Reply]) -> None:
    body = {"code": _SELF_TEST, "number": 1, "timeout_s": 10, "stdin": None}
    _post(requests, {"op": "call", "id": 0, "timeout_s": 10}, body)
    reply = next(reply for reply in replies if reply.header["how"] != "beat")
    outcome = json.loads(reply.parts[2] or b"{}")
    if outcome.get("value") != "[]":
        found = outcome.get("value") or outcome.get("error") or f"it ended with {reply.header}"
        raise RefusedError(f"the self-test failed: {found}")


def _post(requests: socket.socket, request: dict[str, Any], body: Any = None) -> None:
    packet = [json.dumps(request).encode()]
    if body is None:
        requests.sendmsg(packet)
        return
    fd = os.memfd_create("elpo-request")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(marshal.dumps(body))
        os.lseek(fd, 0, os.SEEK_SET)
        socket.send_fds(requests, packet, [fd])
    finally:
        os.close(fd)


def _read(replies: socket.socket, on_silence: Callable[[], None]) -> Iterator[Reply]:
    """Replies until the server closes its end; one that breaks off is dropped. `ValueError` for
    what no server of ours says."""

    def take(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                piece = replies.recv(size - len(data))
            except TimeoutError:
                on_silence()
                continue
            except ConnectionError:
                break
            if not piece:
                break
            data += piece
        return bytes(data)

    while len(length := take(4)) == 4:
        (size,) = struct.unpack("!I", length)
        if size > _HEADER_CAP:
            raise ValueError(f"a header of {size} bytes")
        text = take(size)
        if len(text) < size:
            return
        header = _checked(text)
        lengths = header.pop("lengths")
        parts = tuple(map(take, lengths))
        if list(map(len, parts)) != lengths:
            return
        yield Reply(header, parts)


def _checked(text: bytes) -> dict[str, Any]:
    """A reply's header: whole numbers and words, and the lengths of its parts, in bytes."""
    try:
        header = json.loads(text)
    except RecursionError:
        header = None
    match header:
        case {"ready": True, "lengths": []}:
            return dict(header)
        case {"id": number, "how": str(), "lengths": list(lengths), **rest} if len(lengths) <= 3:
            numbers = [number, *lengths, *(v for v in rest.values() if not isinstance(v, str))]
            whole = all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
            if whole and sum(lengths) <= _PARTS_CAP:
                return dict(header)
    raise ValueError("a reply of another form")


def signal_name(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else str(number)
