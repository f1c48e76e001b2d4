"""The confined process: waits for one request, then runs it in place or forks for it.

`serve` is the life of three kinds of process. A *spare* has been confined and waits. A *call* is a
spare that runs its request in place and ends. A *session* is a tree of snapshots: the spare is its
root; for every step the snapshot it starts from forks, the child runs the code and then waits as
the next snapshot. So a step never changes the snapshot it started from, whatever happens in it.

The first packet on the control socket is ours: the private directory and, where system calls are
filtered, the descriptor by which the supervisor is asked before every fork. A request is one word,
`call` or `step`, with four descriptors: the body (marshalled by the caller, so that the fork server
never holds it), a channel for the outcome, and the pipes for stdout and stderr. Frames on the
channel: kind (1 byte), length (4 bytes), payload. Kinds: H hello (sent first; its credentials tell
the server our pid), D done and now a snapshot, X done and ending. Nothing that is said here is
believed.

Most of a step's time goes to page faults, some 400: everything touched for the first time after a
fork is one. Hence `marshal`, `_signal` and plain descriptors: they touch few pages.
"""

from __future__ import annotations

import io
import json
import marshal
import math
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import types
from typing import NoReturn, TextIO

from elpo_fast.tools import _cell, _confine
from elpo_fast.tools._look import FILES_MB, FILES_MOST

CONTROL = 3  # the control socket's descriptor
DESCRIPTORS = 128
_NAMESPACES = _confine.CLONE_NEWNS | _confine.CLONE_NEWIPC | _confine.CLONE_NEWNET


def become(
    control: int,
    *,
    isolation: str,
    directory: str | None,
    rules: list[tuple[int, int]],
    address_space: int,
    processes: int,
) -> NoReturn:
    """The fork of the server that we are becomes a confined spare. `control`: its socket;
    `directory`: its private one, None for a file system of its own; `rules`: Landlock's."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        _confine.die_early(1000)
        _confine.die_with_parent()
        _confine.no_new_privileges()
        if isolation == "bubblewrap":
            _confine.enter_user_namespace(_NAMESPACES)
            options = f"size={FILES_MB}m,nr_inodes={FILES_MOST},mode=700"
            _confine.mount_tmpfs("/tmp", options)
            _confine.mount_tmpfs("/proc", "size=4k", _confine.MS_RDONLY)
            _confine.drop_capabilities()
        directory = directory or "/tmp"
        os.chdir(directory)
        os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = directory
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        if isolation == "landlock":
            _confine.landlock_restrict(rules, folder)
        # After the server's descriptors are gone: with many sessions they exceed the limit.
        os.dup2(control, CONTROL)
        os.dup2(folder, CONTROL + 1)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)
        os.closerange(CONTROL + 2, 1 << 30)
        passed = [CONTROL + 1]
        if isolation != "none":
            passed.append(_confine.ask_before_forks())
        ours = socket.socket(fileno=CONTROL)
        # Before the limit on descriptors: it also bounds those that are on their way through
        # sockets, and there it counts all of this user's on the machine.
        socket.send_fds(ours, [b"ready"], passed)
        for fd in passed:
            os.close(fd)
        _confine.limit(
            address_space=address_space,
            file_size=FILES_MB << 20,
            processes=processes,
            files=DESCRIPTORS,
        )
        if isolation != "none":
            _confine.filter_system_calls(host_files=isolation == "landlock")
            _cell.explain_refusals()
        os.dup2(0, 2)  # last: until here a refusal must reach the server's log
    except BaseException as problem:
        os.write(2, f"cannot confine a process: {problem}\n".encode())
        os._exit(1)
    serve(ours, seccomp=isolation != "none")


def serve(control: socket.socket, *, seccomp: bool) -> NoReturn:
    """Never returns."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main  # where pickle and dataclasses look for what the code defines
    sys.argv = [""]
    out, err = _stream(1), _stream(2)
    _seed()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    while True:
        word, fds, _, _ = socket.recv_fds(control, 4096, 4)
        if not word:
            os._exit(0)
        step = word == b"step"
        if step and not _fork():
            for fd in fds:
                os.close(fd)
            continue

        # From here on we are the process that runs the request.
        if seccomp and not step:
            _confine.refuse_forks()
        control.close()
        body, channel, *pipes = fds
        control = socket.socket(fileno=channel)
        _send(control, b"H")
        for target, pipe in zip((1, 2), pipes, strict=True):
            os.dup2(pipe, target)
            os.close(pipe)
        sys.stdout = out = _stream(1) if out.closed else out
        sys.stderr = err = _stream(2) if err.closed else err
        call = marshal.loads(os.read(body, os.fstat(body).st_size))
        os.close(body)
        _confine.limit_cpu(math.ceil(call["timeout_s"]) + 1)
        if "target" in call:
            outcome = _cell.run_function(call["target"], call["payload"], call["timeout_s"])
        else:
            if call["stdin"] is not None:
                sys.stdin = io.StringIO(call["stdin"])
            outcome = _cell.run_code(call["code"], call["number"], main.__dict__, call["timeout_s"])
        _silence()
        stays = step and not outcome["timeout"]
        _send(control, b"D" if stays else b"X", json.dumps(outcome).encode())
        if not stays:
            os._exit(0)


def _fork() -> bool:
    """True in the child."""
    alone = threading.active_count() == 1
    if os.fork():
        return False
    if not alone:
        threading._after_fork()  # type: ignore[attr-defined]  # forgets the others
    return True


def _seed() -> None:
    """Programs that forget to seed give the same output every time: runs can be repeated, and a
    session can be rebuilt by replay."""
    random.seed(0)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(0)


def _stream(fd: int) -> TextIO:
    return open(fd, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _silence() -> None:
    """Let go of the pipes. Descriptor 0 is /dev/null; there may be none free for another."""
    for fd in (1, 2):
        os.dup2(0, fd)


def _send(channel: socket.socket, kind: bytes, payload: bytes = b"") -> None:
    channel.sendall(kind + struct.pack("!I", len(payload)) + payload)
