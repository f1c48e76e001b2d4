"""System calls that confine a process: namespaces, Landlock, seccomp, capabilities, limits.

Linux, standard library only (ctypes): it runs inside the sandbox's own processes. Every function
acts on the calling process, raises `OSError` naming the step the kernel refused, and cannot be
undone by the confined code. The order that holds: drop the uid (`RLIMIT_NPROC` spares uid 0, also
inside a user namespace), enter namespaces, mount, limit, drop capabilities, filter system calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import platform
import resource
import select
import signal
import struct
from collections.abc import Iterable

CLONE_THREAD = 0x0001_0000
CLONE_NEWNS = 0x0002_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000
# What glibc's fork passes to clone: CHILD_SETTID | CHILD_CLEARTID | SIGCHLD.
_FORK_FLAGS = 0x0120_0011

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 24, 38, 36
_CAP_DAC_READ_SEARCH = 2
_CAP_COUNT = 64

UID = 61_999  # used when started by root; no account and no file of a usual system has it
INNER_UID = 1_000  # what the confined code sees

_HUGE = 2 << 20  # bytes of a huge page
_COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, *2 * [ctypes.c_ulong]]


def _check(result: int, step: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{step}: {os.strerror(code)}")
    return result


def _prctl(step: str, option: int, value: int = 0, address: bytes | None = None) -> None:
    _check(_libc.prctl(option, value, address, 0, 0), step)


def use_huge_pages() -> None:
    """Put the memory that this process wrote into huge pages, so that a fork copies one entry of a
    page table where it copied 512. Where the kernel has none to give, forks take longer."""
    with open("/proc/self/maps", "rb") as file:
        mappings = [line.split() for line in file]
    for bounds, mode, _, _, inode, *_ in mappings:
        if mode == b"rw-p" and inode == b"0":
            start, end = (int(bound, 16) for bound in bounds.split(b"-"))
            start = -(-start // _HUGE) * _HUGE
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(0, end - start)), _COLLAPSE)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def set_pid_namespace(fd: int) -> None:
    """Children are born into the pid namespace open as `fd`."""
    _check(_libc.setns(fd, CLONE_NEWPID), "setns(pid)")


def mount_tmpfs(path: str, options: str, flags: int = 0) -> None:
    """Cover `path` with an empty in-memory file system of bounded size."""
    flags |= MS_NOSUID | MS_NODEV
    _check(_libc.mount(b"tmpfs", path.encode(), b"tmpfs", flags, options.encode()), f"mount {path}")


def enter_user_namespace(flags: int = 0) -> None:
    """New user namespace (and those in `flags`); the caller becomes `INNER_UID` with all
    capabilities over these new namespaces and none outside."""
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER | flags)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INNER_UID} {uid} 1"),
        ("gid_map", f"{INNER_UID} {gid} 1"),
    ):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def drop_root(must_read: Iterable[str] = ()) -> None:
    """From uid 0 to `UID`, no groups. Where a path of `must_read` is closed to that uid (a Python
    below /root), the one capability to read it stays. Nothing to do for other uids."""
    if os.getuid() != 0:
        return
    _prctl("keep capabilities", _PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
    # access() answers for the plain uid, without capabilities.
    if all(os.access(path, os.R_OK | os.X_OK) for path in must_read):
        _capset(0)
    else:
        _capset(1 << _CAP_DAC_READ_SEARCH)
    _prctl("dumpable", _PR_SET_DUMPABLE, 1)  # own /proc/self entries stay writable: uid_map


def drop_capabilities() -> None:
    """No capability, and no way to get one back. Needs CAP_SETPCAP for the bounding set."""
    for capability in range(_CAP_COUNT):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, None, 0, 0) < 0:
            break  # beyond the kernel's last capability
    _capset(0)


def _capset(mask: int) -> None:
    header = struct.pack("Ii", 0x2008_0522, 0)
    low, high = mask & 0xFFFF_FFFF, mask >> 32
    data = struct.pack("6I", low, low, 0, high, high, 0)
    _check(_libc.capset(header, data), "capset")


def no_new_privileges() -> None:
    _prctl("no new privileges", _PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """A signal when the thread that forked us ends; 0: no more. Forgotten on a change of uid and
    by every fork."""
    _prctl("parent death signal", _PR_SET_PDEATHSIG, number)


def die_early(score: int) -> None:
    """Where memory runs out, the kernel ends us before others: 1000 goes before everything."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(score))


def adopt_orphans() -> None:
    _prctl("subreaper", _PR_SET_CHILD_SUBREAPER, 1)


def limit(*, address_space: int, file_size: int, processes: int, files: int) -> None:
    """Hard limits: bytes, bytes, count (per user namespace), count. No core files, no queues."""
    for kind, value in (
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def limit_cpu(seconds: int) -> None:
    """Soft = hard: pid 1 of a namespace ignores the soft limit's signal. Never raised again."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or seconds < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


# --- Landlock ------------------------------------------------------------------------------------

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # on every architecture
_READ_FILE, _READ_DIR, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1


def landlock_abi() -> int:
    """Version of the kernel's Landlock, 0 where there is none or it is switched off."""
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def landlock_rules(
    readable: Iterable[str], devices: Iterable[str], listed: Iterable[str]
) -> list[tuple[int, int]]:
    """(descriptor, rights) of what may be read below `readable`, read and written in `devices`, and
    seen by its name below `listed`: opened once, for the rule sets of all children."""
    rules = []
    for paths, rights in (
        (readable, _READ_FILE | _READ_DIR),
        (devices, _READ_FILE | _WRITE_FILE),
        (listed, _READ_DIR),
    ):
        for path in paths:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rules.append((fd, rights if os.path.isdir(path) else rights & ~_READ_DIR))
    return rules


def landlock_restrict(rules: Iterable[tuple[int, int]], directory: int) -> None:
    """`rules` and everything below the open `directory`, nothing else of the file system; no TCP
    and no abstract sockets or signals to the outside where the kernel knows these rules."""
    abi = landlock_abi()
    if abi == 0:
        raise OSError(errno.EOPNOTSUPP, "Landlock: not supported or switched off by this kernel")
    file_rights = (1 << (13 if abi == 1 else 14 if abi == 2 else 15 if abi < 5 else 16)) - 1
    fields = [file_rights] + [0b11] * (abi >= 4) + [0b11] * (abi >= 6)
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = _check(
        _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0),
        "Landlock rule set",
    )
    for fd, rights in (*rules, (directory, file_rights)):
        rule = struct.pack("=Qi", rights, fd)
        _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), "Landlock rule")
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "Landlock")


# --- seccomp -------------------------------------------------------------------------------------

_ARCHITECTURES = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}  # column, AUDIT_ARCH

# name: (x86_64, aarch64); -1: the architecture does not have it. Answered with EPERM.
_DENIED = {
    # network; socketpair stays (asyncio needs it) and, without an address, reaches nobody
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    # memory that RLIMIT_AS does not count, and that of the machine's other programs
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "mq_open": (240, 180),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191),
    # news of folders that cannot be read
    "inotify_init": (253, -1), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    # a signal to oneself in the future: a stopped snapshot would go on
    "timer_create": (222, 107),
    # other programs; clone is judged by its flags
    "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281),
    # reaching into other processes, the snapshots of the same session among them
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # leaving the process group by which a whole session is killed
    "setsid": (112, 157), "setpgid": (109, 154),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # identity
    "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143),
    "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159),
    "capset": (126, 91), "personality": (135, 92),
    # parts of the kernel with a history of faults that no calculation needs
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "fanotify_init": (300, 262), "quotactl": (179, 60), "acct": (163, 89), "syslog": (103, 116),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
}  # fmt: skip
# Attributes beside the mode: answered as by a file system that has none.
_ATTRIBUTES = {
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10), "getxattrat": (464, 464),
    "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
    "listxattrat": (465, 465), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "file_getattr": (468, 468),
    "file_setattr": (469, 469),
}  # fmt: skip
# What Landlock alone lets a program do to the files of the user it runs as. Refused; modes and
# times are left as they are and the call succeeds, for copying a file sets both.
_HOST_FILES = {
    "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54),
    "truncate": (76, 45),
}  # fmt: skip
_FALLOCATE = {"fallocate": (285, 47)}  # space that `written` does not count
_MODES_AND_TIMES = {
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "utime": (132, -1), "utimes": (235, -1), "futimesat": (261, -1), "utimensat": (280, 88),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT, _SENDTO = (56, 220), (435, 435), (302, 261), (44, 206)
_FCNTL, _IOCTL, _PRCTL, _SECCOMP = (72, 25), (16, 29), (157, 167), (317, 277)
# Signals by the back door: by the owner of a descriptor, a lease, a watched folder.
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _F_SETLEASE, _F_NOTIFY = 8, 10, 15, 1024, 1026
_FIOSETOWN, _SIOCSPGRP, _TIOCSTI = 0x8901, 0x8902, 0x5412
_PR_SET_PTRACER = 0x5961_6D61
_NEW_LISTENER = 1 << 3

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ASK, _KILL, _ERRNO = 0x7FFF_0000, 0x7FC0_0000, 0x8000_0000, 0x0005_0000
_NR, _ARCH, _ARGUMENT = 0, 4, 16


_Instruction = tuple[int, int, int, int]
_ALLOWED: _Instruction = (_RETURN, 0, 0, _ALLOW)
_DENY: _Instruction = (_RETURN, 0, 0, _ERRNO | errno.EPERM)


def _column() -> int:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"seccomp: no system call table for {machine}")
    return _ARCHITECTURES[machine][0]


def _judged(call: tuple[int, int], argument: int, *tests: _Instruction) -> list[_Instruction]:
    """If the call matches: load the low word of an argument, run `tests`, which return."""
    load = (_LOAD, 0, 0, _ARGUMENT + 8 * argument)
    return [(_EQUAL, 0, 1 + len(tests), call[_column()]), load, *tests]


def _refuse_values(call: tuple[int, int], argument: int, *values: int) -> list[_Instruction]:
    tests = [test for value in values for test in ((_EQUAL, 0, 1, value), _DENY)]
    return _judged(call, argument, *tests, _ALLOWED)


def _assembled(*program: _Instruction) -> ctypes.Array:
    """For calls of this machine's architecture; what no instruction answers is allowed."""
    architecture = _ARCHITECTURES[platform.machine()][1]
    start = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    instructions = [*start, (_LOAD, 0, 0, _NR), *program, _ALLOWED]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    return ctypes.create_string_buffer(code, len(code))


@functools.cache
def _asking() -> ctypes.Array:
    return _assembled(*_judged(_CLONE, 0, (_EQUAL, 0, 1, _FORK_FLAGS), (_RETURN, 0, 0, _ASK)))


@functools.cache
def _no_forks() -> ctypes.Array:
    return _assembled(*_judged(_CLONE, 0, (_ANY_BIT, 0, 1, CLONE_THREAD), _ALLOWED, _DENY))


@functools.cache
def _general(host_files: bool) -> ctypes.Array:
    answers = [(_DENIED, errno.EPERM), (_ATTRIBUTES, errno.EOPNOTSUPP)]
    if host_files:
        answers += [(_HOST_FILES, errno.EPERM), (_MODES_AND_TIMES, 0)]
        answers += [(_FALLOCATE, errno.EOPNOTSUPP)]
    program: list[_Instruction] = []
    if platform.machine() == "x86_64":
        program += [(_GREATER_EQUAL, 0, 1, 0x4000_0000), _DENY]  # the x32 numbers
    for calls, code in answers:
        for numbers in calls.values():
            if numbers[_column()] >= 0:
                program += [(_EQUAL, 0, 1, numbers[_column()]), (_RETURN, 0, 0, _ERRNO | code)]
    # glibc falls back from clone3, whose flags a filter cannot read, to clone.
    program += [(_EQUAL, 0, 1, _CLONE3[_column()]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    threads = [(_ANY_BIT, 0, 1, CLONE_THREAD), _ALLOWED]
    program += _judged(_CLONE, 0, *threads, (_EQUAL, 0, 1, _FORK_FLAGS), _ALLOWED, _DENY)
    program += _judged(_PRLIMIT, 0, (_EQUAL, 0, 1, 0), _ALLOWED, _DENY)  # own limits only
    high_word = (_LOAD, 0, 0, _ARGUMENT + 8 * 4 + 4)
    program += _judged(_SENDTO, 4, (_EQUAL, 0, 3, 0), high_word, (_EQUAL, 0, 1, 0), _ALLOWED, _DENY)
    signals = (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _F_SETLEASE, _F_NOTIFY)
    program += _refuse_values(_FCNTL, 1, *signals)
    program += _refuse_values(_IOCTL, 1, _FIOSETOWN, _SIOCSPGRP, _TIOCSTI)
    # The supervisor looks at /proc, and signals are its alone.
    options = (_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_PTRACER)
    return _assembled(*program, *_refuse_values(_PRCTL, 0, *options))


def prepare_filters(*, host_files: bool) -> None:
    """Before the first fork, for all children."""
    _asking(), _no_forks(), _general(host_files)


def _install(program: ctypes.Array, flags: int = 0) -> int:
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(program))
    return _check(_libc.syscall(_SECCOMP[_column()], 1, flags, header), "seccomp")


def ask_before_forks() -> int:
    """The descriptor through which each fork of this process and its children is asked for; see
    `next_fork`. Needs `no_new_privileges`, as do the two below. Filters add up: a later one can
    only take more away."""
    return _install(_asking(), _NEW_LISTENER)


def filter_system_calls(*, host_files: bool) -> None:
    """`host_files`: no file system of its own protects those of the user."""
    _install(_general(host_files))


def refuse_forks() -> None:
    """Threads, but no more processes."""
    _install(_no_forks())


_NEXT_FORK, _ANSWER_FORK = 0xC050_2100, 0xC018_2101  # ioctl numbers
_GO_ON = 1


def next_fork(listener: int) -> tuple[int, int] | None:
    """(number, pid) of a process that wants to fork, if it still does."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    if not any(events & select.POLLIN for _, events in poll.poll(0)):
        return None
    request = bytearray(80)
    try:
        fcntl.ioctl(listener, _NEXT_FORK, request)
    except FileNotFoundError:  # it was killed meanwhile
        return None
    return struct.unpack_from("QI", request)


def answer_fork(listener: int, number: int, *, allow: bool) -> None:
    answer = struct.pack("QqiI", number, 0, 0 if allow else -errno.EPERM, _GO_ON if allow else 0)
    with contextlib.suppress(FileNotFoundError):
        fcntl.ioctl(listener, _ANSWER_FORK, answer)
