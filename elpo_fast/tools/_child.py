"""The confined process: waits for one request, then runs it in place or forks for it.

`serve` is the life of three kinds of process. A *spare* has been confined and waits. A *call* is a
spare that runs its request in place and ends. A *session* is a tree of snapshots: the spare is its
root; for every step the snapshot it starts from forks, the child runs the code and then waits as
the next snapshot. So a step never changes the snapshot it started from, whatever happens in it.

A request on the control socket is one packet of JSON with four descriptors: the body (written by
the caller, so that the fork server never holds it), a channel for the outcome, and the pipes for
stdout and stderr. Frames on the channel: kind (1 byte), length (4 bytes), payload. Kinds: H hello
(sent first; its credentials tell the server our pid), D done and now a snapshot, X done and ending.
"""

from __future__ import annotations

import _thread
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import types
from typing import NoReturn, TextIO

from elpo_fast.tools import _cell, _confine

CONTROL = 3  # the control socket's descriptor
TMP_MB = 64  # private /tmp of a call or of a session
FILES = 128  # open files
THREADS = 64  # threads of a call, or of the steps running in a session
_NAMESPACES = _confine.CLONE_NEWNS | _confine.CLONE_NEWIPC | _confine.CLONE_NEWNET


def become(
    control: int,
    *,
    isolation: str,
    directory: str | None,
    ruleset: int,
    address_space: int,
    processes: int,
) -> NoReturn:
    """The fork of the server that we are becomes a confined spare. `control`: its socket;
    `directory`: private directory where there is one and no namespace; `ruleset`: Landlock's."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        _confine.die_with_parent()
        _confine.no_new_privileges()
        if isolation == "bubblewrap":
            _confine.enter_user_namespace(_NAMESPACES)
            _confine.mount_tmpfs("/tmp", f"size={TMP_MB}m,nr_inodes=4096,mode=700")
            _confine.mount_tmpfs("/proc", "size=4k", _confine.MS_RDONLY)
            _confine.drop_capabilities()
            directory = "/tmp"
        elif isolation == "landlock":
            _confine.landlock_restrict(ruleset)
        os.chdir(directory or "/")
        os.dup2(control, CONTROL)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)
        os.closerange(CONTROL + 1, 1 << 30)
        # After the server's descriptors are gone: with many sessions they exceed the limit.
        _confine.limit(
            address_space=address_space,
            file_size=TMP_MB << 20,
            processes=processes,
            files=FILES,
        )
        if isolation != "none":
            _confine.filter_system_calls(fork=True)
        os.dup2(0, 2)  # last: until here a refusal must reach the server's log
    except BaseException as problem:
        os.write(2, f"cannot confine a process: {problem}\n".encode())
        os._exit(1)
    serve(seccomp=isolation != "none", directories=directory is not None)


def serve(*, seccomp: bool, directories: bool) -> NoReturn:
    """Never returns. `directories`: the working directory is private and writable, and every
    snapshot works in a copy of its predecessor's."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main  # where pickle and dataclasses look for what the code defines
    sys.argv = [""]
    root = home = os.getcwd()
    base_kb = _peak_kb()
    threads = _thread._count()
    out, err = _stream(1), _stream(2)
    _seed()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    control = socket.socket(fileno=CONTROL)
    while True:
        packet, fds, _, _ = socket.recv_fds(control, 4096, 4)
        if not packet:
            os._exit(0)
        request = json.loads(packet)
        if request["op"] == "remove":
            shutil.rmtree(os.path.join(root, request["directory"]), ignore_errors=True)
            continue
        step = request["op"] == "step"
        if step and not _fork():
            for fd in fds:
                os.close(fd)
            continue

        # From here on we are the process that runs the request.
        _confine.die_with_parent()
        if seccomp and not step:
            _confine.filter_system_calls(fork=False)
        control.close()
        body, channel, *pipes = fds
        control = socket.socket(fileno=channel)
        _send(control, b"H")
        for target, pipe in zip((1, 2), pipes, strict=True):
            os.dup2(pipe, target)
            os.close(pipe)
        sys.stdout = out = _stream(1) if out.closed else out
        sys.stderr = err = _stream(2) if err.closed else err
        with open(body, "rb") as file:
            call = json.loads(file.read())
        _confine.limit_cpu(math.ceil(call["timeout_s"]) + 1)
        if step and directories:
            home = _copy_directory(home, os.path.join(root, request["directory"]))
        if "target" in call:
            outcome = _cell.run_function(call["target"], call["payload"], call["timeout_s"])
        else:
            if call["stdin"] is not None:
                sys.stdin = io.StringIO(call["stdin"])
            outcome = _cell.run_code(call["code"], call["number"], main.__dict__, call["timeout_s"])
        _silence()
        stays = step and not outcome["timeout"]
        if stays and _thread._count() > threads:
            if not _fork():
                os._exit(0)  # the copy, which has this one thread only, becomes the snapshot
            threads = _thread._count()  # a fork ends threads but does not count them out
        if stays:
            _confine.die_with_parent(0)  # a snapshot outlives the one it came from
        outcome["grown_kb"] = _peak_kb() - base_kb
        _send(control, b"D" if stays else b"X", json.dumps(outcome).encode())
        if not stays:
            os._exit(0)


def _peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _fork() -> bool:
    """True in the child, whose `random` goes on where the parent's stands: Python reseeds it."""
    state = random.getstate()
    if os.fork():
        return False
    random.setstate(state)
    return True


def _seed() -> None:
    """Programs that forget to seed give the same output every time: runs can be repeated, and a
    session can be rebuilt by replay."""
    random.seed(0)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(0)


def _copy_directory(source: str, target: str) -> str:
    """Branches do not see each other's files: go to a copy of `source`, at the same place in it."""
    inside = os.path.relpath(os.getcwd(), source)
    if os.path.basename(source).startswith("step"):
        shutil.copytree(source, target, symlinks=True)
    else:  # the root's directory is empty but for the copies
        os.mkdir(target)
    os.chdir(target if inside.startswith("..") else os.path.join(target, inside))
    return target


def _stream(fd: int) -> TextIO:
    return open(fd, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _silence() -> None:
    """Let go of the pipes. Descriptor 0 is /dev/null; there may be none free for another."""
    for fd in (1, 2):
        os.dup2(0, fd)


def _send(channel: socket.socket, kind: bytes, payload: bytes = b"") -> None:
    channel.sendall(kind + struct.pack("!I", len(payload)) + payload)
