"""Births and deaths of the fork server's confined children."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import tempfile
from collections.abc import Iterator

from elpo_fast.tools import _child, _confine, _look
from elpo_fast.tools._records import Child, Options

exit_now = os._exit  # ours, even if a program replaces the module's
_MARGIN = 1024  # processes of the same uid that others may start, where the limit counts them too
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class Nursery:
    """Forks children, each with a pid namespace of its own where there are namespaces."""

    def __init__(self, options: Options, folder: str) -> None:
        """`folder`: where private directories are made, if children have no file system."""
        self._isolation, self._folder = options.isolation, folder
        self._children: dict[int, Child] = {}  # by pid
        self._own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._rules: list[tuple[int, int]] = []
        if options.isolation == "landlock":
            self._rules = _confine.landlock_rules(options.readable, _DEVICES, options.listed)
        if options.isolation != "none":
            _confine.prepare_filters(host_files=options.isolation == "landlock")
        with open("/proc/self/statm") as file:
            own = int(file.read().split()[0]) * resource.getpagesize()
        self._address_space = own + (options.memory_mb << 20)
        self._processes = options.processes + _look.THREADS
        if options.isolation != "bubblewrap":
            self._processes += _tasks_of(os.getuid()) + _MARGIN

    def spawn(self) -> Child:
        """A new spare; it confines itself while we go on."""
        control, control_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory = tempfile.mkdtemp(dir=self._folder) if self._folder else None
        if self._isolation == "bubblewrap":
            _confine.unshare(_confine.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            try:
                _child.become(
                    control_end.fileno(),
                    isolation=self._isolation,
                    directory=directory,
                    rules=self._rules,
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

    def close(self) -> None:
        """Kill all children and wait for their end."""
        for child in self._children.values():
            kill(child)
        for child in self._children.values():
            os.waitpid(child.pid, 0)
            _clean_up(child)


def kill(child: Child) -> None:
    """Pid 1 takes its namespace along; elsewhere the process group is all there is: nothing leaves
    it."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            send(child.pid, signal.SIGKILL)


def _clean_up(child: Child) -> None:
    child.control.close()
    for fd in (child.pidfd, child.listener):
        if fd >= 0:
            os.close(fd)
    if child.directory is not None:
        remove(child.directory)
    if child.folder >= 0:
        os.close(child.folder)


def remove(directory: str) -> None:
    """With all that is in it. What a process that is dying adds meanwhile stays until the end of
    the server, where it is removed again."""
    with contextlib.suppress(OSError):
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _look.empty(folder)
        finally:
            os.close(folder)
        os.rmdir(directory)


def _tasks_of(uid: int) -> int:
    """Threads that count against this uid's RLIMIT_NPROC."""
    mine = (status for status in _look.processes() if int(status[b"Uid"][0]) == uid)
    return sum(int(status[b"Threads"][0]) for status in mine)
