"""System calls that confine a process: namespaces, Landlock, seccomp, capabilities, limits.

Linux, standard library only (ctypes): it runs inside the sandbox's own processes. Every function
acts on the calling process, raises `OSError` naming the step the kernel refused, and cannot be
undone by the confined code. The order that holds: drop the uid (`RLIMIT_NPROC` spares uid 0, also
inside a user namespace), enter namespaces, mount, limit, drop capabilities, filter system calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
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

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 22, 24, 38, 36
_CAP_DAC_READ_SEARCH = 2
_CAP_COUNT = 64

UID = 61_999  # used when started by root; no account and no file of a usual system has it
INNER_UID = 1_000  # what the confined code sees

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, *2 * [ctypes.c_ulong]]


def _check(result: int, step: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{step}: {os.strerror(code)}")
    return result


def _prctl(step: str, option: int, value: int = 0, address: bytes | None = None) -> None:
    _check(_libc.prctl(option, value, address, 0, 0), step)


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


def landlock_ruleset(
    readable: Iterable[str], devices: Iterable[str], listed: Iterable[str] = ()
) -> int:
    """Descriptor of a rule set: read below `readable`, read and write `devices`, see the names
    below `listed`, nothing else; no TCP and no abstract sockets or signals to the outside where the
    kernel knows these rules."""
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
    os.set_inheritable(ruleset, False)
    rules = [(path, _READ_FILE | _READ_DIR) for path in readable]
    rules += [(path, _READ_FILE | _WRITE_FILE) for path in devices]
    rules += [(path, _READ_DIR) for path in listed]
    for path, rights in rules:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= ~_READ_DIR
        rule = struct.pack("=Qi", rights, fd)
        _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"Landlock rule for {path}")
        os.close(fd)
    return ruleset


def landlock_restrict(ruleset: int) -> None:
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "Landlock")


# --- seccomp -------------------------------------------------------------------------------------

_ARCHITECTURES = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}  # column, AUDIT_ARCH

# name: (x86_64, aarch64); -1: the architecture does not have it. Answered with EPERM.
_DENIED = {
    # network; socketpair stays (asyncio needs it) and reaches nobody
    "socket": (41, 198),
    # memory that RLIMIT_AS does not count
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
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
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
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
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_FCNTL, _IOCTL = (72, 25), (16, 29)
_F_SETOWN, _F_SETOWN_EX, _FIOSETOWN, _SIOCSPGRP, _TIOCSTI = 8, 15, 0x8901, 0x8902, 0x5412

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
_NR, _ARCH, _ARGUMENT = 0, 4, 16


def _program(*, fork: bool) -> bytes:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"seccomp: no system call table for {machine}")
    column, audit_arch = _ARCHITECTURES[machine]
    deny = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    allow = (_RETURN, 0, 0, _ALLOW)

    def judged(call: tuple[int, int], argument: int, *tests: tuple[int, int, int, int]) -> list:
        """If the call matches: load the low word of an argument, run `tests`, which return."""
        load = (_LOAD, 0, 0, _ARGUMENT + 8 * argument)
        return [(_EQUAL, 0, 1 + len(tests), call[column]), load, *tests]

    def refuse_values(call: tuple[int, int], argument: int, *values: int) -> list:
        tests = [test for value in values for test in ((_EQUAL, 0, 1, value), deny)]
        return judged(call, argument, *tests, allow)

    threads = [(_ANY_BIT, 0, 1, CLONE_THREAD), allow]
    forks = [(_EQUAL, 0, 1, _FORK_FLAGS), allow] if fork else []
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, audit_arch), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NR)]
    if machine == "x86_64":
        program += [(_GREATER_EQUAL, 0, 1, 0x4000_0000), deny]  # the x32 numbers
    for numbers in _DENIED.values():
        if numbers[column] >= 0:
            program += [(_EQUAL, 0, 1, numbers[column]), deny]
    # glibc falls back from clone3, whose flags a filter cannot read, to clone.
    program += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    program += judged(_CLONE, 0, *threads, *forks, deny)
    program += judged(_PRLIMIT, 0, (_EQUAL, 0, 1, 0), allow, deny)  # own limits only
    program += refuse_values(_FCNTL, 1, _F_SETOWN, _F_SETOWN_EX)  # signals by the back door
    program += refuse_values(_IOCTL, 1, _FIOSETOWN, _SIOCSPGRP, _TIOCSTI)
    program += [allow]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


_PROGRAMS: dict[bool, bytes] = {}


def filter_system_calls(*, fork: bool) -> None:
    """Install the filter; with `fork=False` the process can start threads but no process. Filters
    add up: a second call can only take more away."""
    no_new_privileges()
    if fork not in _PROGRAMS:
        _PROGRAMS[fork] = _program(fork=fork)
    program = ctypes.create_string_buffer(_PROGRAMS[fork], len(_PROGRAMS[fork]))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(program))
    _prctl("seccomp", _PR_SET_SECCOMP, 2, header)
