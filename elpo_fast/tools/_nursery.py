"""Births and deaths of the fork server's confined children."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator

from elpo_fast.tools import _child, _confine
from elpo_fast.tools._records import Child, Options

exit_now = os._exit  # ours, even if a program replaces the module's
_MARGIN = 1024  # processes of the same uid that others may start, where the limit counts them too


class Nursery:
    """Forks children, each with a pid namespace of its own where there are namespaces."""

    def __init__(self, options: Options) -> None:
        self._isolation = options.isolation
        self._children: dict[int, Child] = {}  # by pid
        self._own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._depth = len(_status("self")[b"NSpid"]) - 1  # /proc may be an outer namespace's
        self._ruleset = -1
        if options.isolation == "landlock":
            devices = ("/dev/null", "/dev/zero", "/dev/urandom")
            self._ruleset = _confine.landlock_ruleset(options.readable, devices, options.listed)
        with open("/proc/self/statm") as file:
            own = int(file.read().split()[0]) * resource.getpagesize()
        self._address_space = own + (options.memory_mb << 20)
        self._processes = options.processes + _child.THREADS
        if options.isolation != "bubblewrap":
            self._processes += _tasks_of(os.getuid()) + _MARGIN

    def spawn(self) -> Child:
        """A new spare; it confines itself while we go on."""
        control, control_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory = tempfile.mkdtemp("", "elpo-") if self._isolation == "none" else None
        if self._isolation == "bubblewrap":
            _confine.unshare(_confine.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            try:
                _child.become(
                    control_end.fileno(),
                    isolation=self._isolation,
                    directory=directory,
                    ruleset=self._ruleset,
                    address_space=self._address_space,
                    processes=self._processes,
                )
            finally:  # whatever a program did to us, we never return into the server's code
                exit_now(1)
        if self._isolation == "bubblewrap":
            _confine.set_pid_namespace(self._own_pid_namespace)
        control_end.close()
        child = self._children[pid] = Child(pid, os.pidfd_open(pid), control, directory)
        return child

    def dead(self) -> Iterator[tuple[Child, int]]:
        """Children that have ended and the signal that ended them, or 0. Orphans of sessions are
        reaped along. A number, which is a process group's too, stays taken until `waitpid`."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):
            while (dead := os.waitid(os.P_ALL, 0, flags)) is not None:
                child = self._children.pop(dead.si_pid, None)
                if child is not None:
                    kill(child)  # what is left of its group
                    yield child, 0 if dead.si_code == os.CLD_EXITED else dead.si_status
                    _clean_up(child)
                os.waitpid(dead.si_pid, 0)

    def with_strays(self, snapshots: set[int]) -> Iterator[Child]:
        """Sessions where nothing runs but something besides `snapshots` (pids) is alive. Session
        ids tell whose a process is; setsid is filtered."""
        known = snapshots | self._children.keys()
        for status in _processes():
            if len(status[b"NSpid"]) <= self._depth or status[b"State"][0] == b"Z":
                continue
            pid, session = (int(status[key][self._depth]) for key in (b"NSpid", b"NSsid"))
            child = self._children.get(session)
            if child is not None and child.handles and not child.runs and pid not in known:
                yield child

    def close(self) -> None:
        """Kill all children and wait for their end."""
        for child in self._children.values():
            kill(child)
        for child in self._children.values():
            os.waitpid(child.pid, 0)
            _clean_up(child)


def kill(child: Child) -> None:
    """Pid 1 takes its namespace along; elsewhere the process group is what can be had."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            send(child.pid, signal.SIGKILL)


def _clean_up(child: Child) -> None:
    os.close(child.pidfd)
    child.control.close()
    if child.directory is not None:
        shutil.rmtree(child.directory, ignore_errors=True)


def _processes() -> Iterator[dict[bytes, list[bytes]]]:
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # ended meanwhile
            yield _status(entry)


def _status(entry: str) -> dict[bytes, list[bytes]]:
    """Bytes: a process may have a name that is not UTF-8."""
    with open(f"/proc/{entry}/status", "rb") as file:
        lines = (line.partition(b":") for line in file)
        return {name: rest.split() for name, _, rest in lines}


def _tasks_of(uid: int) -> int:
    """Threads that count against this uid's RLIMIT_NPROC."""
    mine = (status for status in _processes() if int(status[b"Uid"][0]) == uid)
    return sum(int(status[b"Threads"][0]) for status in mine)
