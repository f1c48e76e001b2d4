"""Kinds of attacks, and honest programs, under both isolations, as root and as an ordinary user.

Every attack is first run as that user without protection, where it must work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from elpo_fast.tools._look import FILES_MB
from elpo_fast.tools.interpreter import PythonSession
from elpo_fast.tools.sandbox import _LIGHT
from elpo_fast.types import Task

HERE = Path(__file__).parent
ORDINARY = 61_998
PYTHONS = (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}")


class Place:
    """`as_user.py`, as one user under one isolation."""

    def __init__(self, isolation: str, user: str, folder: Path) -> None:
        self.isolation, self.user, self.folder = isolation, user, folder
        options: dict[str, Any] = {}
        if user == "ordinary" and os.getuid() == 0:
            options = {"user": ORDINARY, "group": ORDINARY, "extra_groups": []}
            os.chown(folder, ORDINARY, ORDINARY)
        path = [str(HERE.parents[1]), *filter(os.path.isdir, sys.path)]
        self._process = subprocess.Popen(
            [_python(options), "-P", str(HERE / "as_user.py"), isolation],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env={"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(path), "HOME": str(folder)},
            text=True,
            **options,
        )
        started = json.loads(self._process.stdout.readline())
        if started != isolation:
            self.close()
            pytest.skip(started)

    def ask(self, op: str, **fields: Any) -> Any:
        print(json.dumps({"op": op, **fields}), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def plain(self, code: str) -> str:
        return self.ask("plain", code=code, folder=str(self.folder))

    def run(self, code: str, timeout_s: float = 10.0) -> dict[str, Any]:
        return self.ask("run", code=code, timeout_s=timeout_s)

    def session(self, *steps: tuple[int, str]) -> list[str]:
        return self.ask("session", steps=steps)

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0


def _python(options: dict[str, Any]) -> str:
    """An interpreter that this user can start: one below /root is root's alone."""
    for python in PYTHONS:
        try:
            done = subprocess.run(
                [python, "-c", "import encodings"], capture_output=True, **options
            )
        except OSError:
            continue
        if done.returncode == 0:
            return python
    pytest.skip("no Python of this version can be started by an ordinary user")


@pytest.fixture(scope="module", params=["root", "ordinary"])
def place(
    request: pytest.FixtureRequest, isolation: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    if request.param == "root" and os.getuid() != 0:
        pytest.skip("these tests are run by an ordinary user")
    folder = tmp_path_factory.mktemp("place")
    for parent in (folder, *folder.parents[:-1]):
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    place = Place(isolation, request.param, folder)
    yield place
    place.close()


def test_the_users_are_those(place: Place) -> None:
    assert (place.ask("uid") == 0) == (place.user == "root")


# --- the machine's own things --------------------------------------------------------------------

LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
# name: (made beforehand, attack; it works where it prints True), run by one user
HOST = {
    "modes of a folder": (
        "os.makedirs('d', 0o755, exist_ok=True)",
        "os.chmod('{folder}/d', 0o700)\nprint(os.stat('{folder}/d').st_mode & 0o777 == 0o700)",
    ),
    "setuid bit": (
        "open('f', 'w').close()",
        "os.chmod('{folder}/f', 0o4777)\nprint(os.stat('{folder}/f').st_mode & 0o7777 == 0o4777)",
    ),
    "times": (
        "open('f', 'w').close()",
        "os.utime('{folder}/f', (1, 1))\nprint(os.stat('{folder}/f').st_mtime == 1)",
    ),
    "attributes": (
        "open('f', 'w').close()",
        "os.setxattr('{folder}/f', 'user.x', b'1')\nprint(os.getxattr('{folder}/f', 'user.x'))\n"
        "print(True)",
    ),
    "length": (
        "open('f', 'w').write('content')",
        "os.truncate('{folder}/f', 1)\nprint(os.path.getsize('{folder}/f') == 1)",
    ),
    "shared memory": (
        LIBC + "print(libc.shmget(4711, 4096, 0o1666) >= 0)",
        LIBC + "libc.shmat.restype = ctypes.c_void_p\nid = libc.shmget(4711, 4096, 0)\n"
        "ids = [id] if id >= 0 else range(100)\n"
        "found = [libc.shmat(i, None, 0) for i in ids]\n"
        "print(any(a not in (None, 2**64 - 1) for a in found))",
    ),
    "message queue": (
        LIBC + "print(libc.msgget(4711, 0o1666) >= 0)",
        LIBC + "id = libc.msgget(4711, 0)\nids = [id] if id >= 0 else range(100)\n"
        "message = ctypes.create_string_buffer(b'\\1' * 8 + b'x', 16)\n"
        "print(any(libc.msgsnd(i, message, 1, 0o4000) == 0 for i in ids))",
    ),
    "semaphores": (
        LIBC + "print(libc.semget(4711, 1, 0o1666) >= 0)",
        LIBC + "id = libc.semget(4711, 1, 0)\nids = [id] if id >= 0 else range(100)\n"
        "print(any(libc.semctl(i, 0, 16, 5) == 0 for i in ids))",
    ),
    "datagram to a socket": (
        "import socket\nif not os.path.exists('s'):\n"
        "    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).bind('s')\nos.chmod('s', 0o777)",
        # Its reader is gone: what is refused then is not the sending.
        "import errno, socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "try: a.sendto(b'x', '{folder}/s')\nexcept OSError as e: print(e.errno == 111)",
    ),
    "news of a folder": (
        "os.makedirs('d', 0o755, exist_ok=True)",
        LIBC + "fd = libc.inotify_init()\nprint(libc.inotify_add_watch(fd, b'{folder}', 2) >= 0)",
    ),
    "memory in sockets that are under way": (
        "",
        "import socket\na, b = socket.socketpair()\nc, d = socket.socketpair()\nd.send(b'x')\n"
        "socket.send_fds(a, [b'x'], [c.fileno()])\nc.close()\nd.close()\n"
        "print(len(socket.recv_fds(b, 1, 1)[1]) == 1)",
    ),
    "a process": ("", "print(os.fork() >= 0)"),
    "a signal in the future": (
        "",
        LIBC + "t = ctypes.c_void_p()\nprint(libc.timer_create(1, None, ctypes.byref(t)) == 0)",
    ),
    "unseen by the supervisor": ("", LIBC + "print(libc.prctl(4, 0, 0, 0, 0) == 0)"),
    "outliving the server": ("", LIBC + "print(libc.prctl(1, 0, 0, 0, 0) == 0)"),
}


def refresh(place: Place, made: str) -> None:
    place.plain("import os\nfor f in ('f', 'd'):\n    if os.path.isdir(f): os.rmdir(f)\n"
                "    elif os.path.exists(f): os.remove(f)\n" + made)  # fmt: skip


@pytest.mark.parametrize("name", HOST)
def test_the_machines_own_things_stay_as_they_are(place: Place, name: str) -> None:
    made, attack = HOST[name]
    attack = "import os\n" + attack.format(folder=place.folder)
    refresh(place, made)
    assert place.plain(attack).endswith("True"), "the attack is not one"
    refresh(place, made)
    assert "True" not in place.run(attack)["stdout"]
    assert place.run("1 + 1")["value"] == "2"


@pytest.fixture(scope="module", autouse=True)
def no_shared_memory_left() -> Iterator[None]:
    yield
    remove = LIBC + (
        "libc.shmctl(libc.shmget(4711, 0, 0), 0, None)\n"
        "libc.msgctl(libc.msgget(4711, 0), 0, None)\nlibc.semctl(libc.semget(4711, 0, 0), 0, 0)"
    )
    subprocess.run([sys.executable, "-c", remove], check=True)


# --- branches ------------------------------------------------------------------------------------

# name: (common beginning, one branch, what the other must not see: it prints 'seen')
SHARED = {
    "mapping": (
        "import mmap\nm = mmap.mmap(-1, 4096)",
        "m[0] = 7",
        "print('seen' if m[0] == 7 else 'apart')",
    ),
    "pipe": (
        "import os\nr, w = os.pipe()\nos.set_blocking(r, False)",
        "os.write(w, b'x')",
        "try: os.read(r, 1); print('seen')\nexcept BlockingIOError: print('apart')",
    ),
    "socket": (
        "import socket\na, b = socket.socketpair()\nb.setblocking(False)",
        "a.send(b'x')",
        "try: b.recv(1); print('seen')\nexcept BlockingIOError: print('apart')",
    ),
    "file offset": (
        "_ = open('offset', 'w').write('abc')\nf = open('offset')",
        "f.read()",
        "print('seen' if f.read() == '' else 'apart')",
    ),
    "file by an absolute path": (
        "import glob, os, tempfile\nhere = tempfile.gettempdir()",
        "open(f'{here}/left', 'w').write('x')",
        "print('seen' if any(p.endswith('left') for p in glob.glob(f'{here}/**', recursive=True)) "
        "else 'apart')",
    ),
    "deleted file": (
        "import os\nf = open('gone', 'w+')\nos.remove('gone')",
        "f.write('x')\nf.flush()",
        "_ = f.seek(0)\nprint('seen' if f.read() == 'x' else 'apart')",
    ),
    "mode of the folder": (
        "import os, tempfile\nhere = tempfile.mkdtemp()",
        "os.rmdir(here)",
        "print('apart' if os.path.isdir(here) else 'seen')",
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_branches_are_apart(place: Place, name: str) -> None:
    common, one, other = SHARED[name]
    forked = f"{common}\nimport os\nif os.fork() == 0:\n    exec({one!r})\n    os._exit(0)\n"
    assert place.plain(f"{forked}os.wait()\n{other}") == "seen", "the attack is not one"
    said = place.session((-1, common), (0, one), (0, other), (1, "'goes on'"))
    assert said[2].splitlines()[0] == "apart", said
    assert said[3] == "'goes on'"


def test_branches_that_run_at_the_same_time_are_apart(safe_box) -> None:
    """One writes while the other looks, and the other's answer is right all the same."""
    look = (
        "import glob, tempfile, time\nend = time.monotonic() + 1\nseen = []\n"
        "while time.monotonic() < end and not seen:\n"
        "    seen = glob.glob(f'{tempfile.gettempdir()}/**/left', recursive=True)\nseen"
    )
    write = "import tempfile\nopen(f'{tempfile.gettempdir()}/left', 'w').write('x')"

    async def main() -> tuple[str, str]:
        session = PythonSession(safe_box.sandbox)
        root = await session.open(Task("t", (), "test", setup="x = 1"))
        looking = asyncio.create_task(session.call(root, {"code": look}))
        await asyncio.sleep(0.3)
        writing = await session.call(root, {"code": write})
        looked = await looking
        await session.release([root, writing.state, looked.state])
        return looked.content, writing.content

    assert asyncio.run(main()) == ("[]", "1")


BURN = {
    "a thread": "import threading\ndef burn():\n    while True: pass\n"
    "threading.Thread(target=burn, daemon=True).start()",
    "its own process": "import socket\ndef burn(*_):\n    while True: pass\nsocket.recv_fds = burn",
}


@pytest.mark.parametrize("name", BURN)
def test_what_a_step_leaves_is_stopped(safe_box, descendants, name: str) -> None:
    def used() -> float:
        total = 0.0
        for pid in descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(psutil.Process(pid).cpu_times()[:2])
        return total

    burning = subprocess.Popen([sys.executable, "-c", BURN[name].replace("daemon=True", "")])
    if name == "a thread":
        time.sleep(0.3)
        assert burning.poll() is None, "the attack is not one"
    burning.kill()
    burning.wait()

    async def main() -> float:
        sandbox = safe_box.sandbox
        root = await sandbox.open_session()
        execution, snapshot = await sandbox.step(root, BURN[name], 1)
        assert execution.error is None and snapshot is not None
        await asyncio.sleep(0.3)
        before = used()
        await asyncio.sleep(1.0)
        sandbox.drop([root, snapshot])
        return used() - before

    assert asyncio.run(main()) < 0.3


# --- honest programs -----------------------------------------------------------------------------

HONEST = {
    "a file of 35 MB": ["open('big', 'wb').write(bytes(35 << 20))"],
    "8 MB in each step": [
        f"open('part{n}', 'wb').write(bytes(8 << 20) and b'x')" for n in range(8)
    ],
    "many files": [f"for i in range(1500): open(f'{n}-{{i}}', 'w').close()" for n in range(2)],
    "a FIFO": ["import os\nos.mkfifo('fifo')"],
    "a closed file": ["import os\nopen('f', 'w').close()\nos.chmod('f', 0)"],
    "a closed folder": ["import os\nos.mkdir('d', 0)"],
    "an unlisted folder": ["import os\nos.mkdir('d', 0o300)\nopen('d/f', 'w').close()"],
    "deep folders": [
        "import os\nhere = os.getcwd()\nfor _ in range(900):\n    os.mkdir('d')\n    os.chdir('d')",
        "os.chdir(here)",
    ],
    "no working directory": ["import os\nos.mkdir('d')\nos.chdir('d')\nos.rmdir('../d')"],
}


@pytest.mark.parametrize("name", HONEST)
def test_a_session_survives_what_it_did_to_its_files(place: Place, name: str) -> None:
    cells = [*HONEST[name], "x = 41", "x + 1"]
    said = place.session(*((number - 1, cell) for number, cell in enumerate(cells)))
    assert said[-1] == "42", said
    assert not any("process ended" in text or "rror" in text for text in said), said


WORKS = {
    "tempfile": (
        "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n"
        "    f.write('abc')\n    f.seek(0)\n    s = f.read()\ns",
        "'abc'",
    ),
    "sqlite": (
        "import sqlite3\nc = sqlite3.connect('base')\nc.execute('create table t (x)')\n"
        "c.execute('insert into t values (7)')\nc.commit()\n"
        "sqlite3.connect('base').execute('select x from t').fetchall()",
        "[(7,)]",
    ),
    "CSV": (
        "import csv\nwith open('t.csv', 'w', newline='') as f: csv.writer(f).writerow([1, 2])\n"
        "open('t.csv').read()",
        "'1,2\\n'",
    ),
    "copies": (
        "import os, shutil\nopen('f', 'w').write('x')\nshutil.copy('f', 'g')\n"
        "shutil.copy2('f', 'h')\nos.makedirs('a/b')\nshutil.copytree('a', 'c')\n"
        "os.replace('g', 'a/b/g')\nshutil.rmtree('a')\nsorted(os.listdir())",
        "['c', 'f', 'h']",
    ),
    "archives": (
        "import tarfile, zipfile\nopen('f', 'w').write('x')\n"
        "with tarfile.open('t.tar.gz', 'w:gz') as t: t.add('f')\n"
        "with tarfile.open('t.tar.gz') as t: t.extractall('out')\n"
        "with zipfile.ZipFile('z.zip', 'w') as z: z.write('f')\nopen('out/f').read()",
        "'x'",
    ),
    "memory map": (
        "import numpy\nm = numpy.memmap('m', mode='w+', shape=4)\nm[:] = 5\nm.flush()\n"
        "int(numpy.memmap('m', mode='r')[3])",
        "5",
    ),
    "asyncio": ("import asyncio\nasyncio.run(asyncio.sleep(0, 'slept'))", "'slept'"),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as p:\n"
        "    r = list(p.map(abs, [-1, 2]))\nr",
        "[1, 2]",
    ),
}


@pytest.mark.parametrize("name", WORKS)
def test_honest_programs_run(place: Place, name: str) -> None:
    code, value = WORKS[name]
    execution = place.run(code)
    assert execution["error"] is None
    assert execution["value"] == value


def test_torch_can_be_imported(make_box, isolation: str) -> None:
    """Its libraries alone are larger than what programs usually may have."""
    box = make_box(isolation, memory_mb=8192, timeout_s=120.0)
    assert box.run("import torch\nfloat(torch.ones(3).sum())").value == "3.0"


REFUSED = {
    "subprocess": "import subprocess\nsubprocess.run(['ls'])",
    "os.system": "import os\nos.system('ls')",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Pool(2)",
    "a process": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "os.fork": "import os\nos.fork()",
    "network": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_a_sentence(place: Place, name: str) -> None:
    error = place.run(REFUSED[name])["error"]
    assert "no network and start no other processes" in error, error


def test_files_elsewhere_are_refused_with_the_place_for_them(place: Place) -> None:
    error = place.run("open('/usr/lib/x', 'w')")["error"]
    assert "write in their own folder only, /tmp" in error


def test_the_private_directory_has_a_size(place: Place) -> None:
    code = (
        "import time\nfor number in range(40):\n"
        "    open(f'{number}', 'wb').write(bytes(4 << 20))\n    time.sleep(0.02)"
    )
    assert FILES_MB < 40 * 4
    error = place.run(code)["error"]
    assert "No space left" in error or f"more than {FILES_MB} MB" in error
    assert place.run("import os\nos.listdir()")["value"] == "[]"


# --- the supervisor ------------------------------------------------------------------------------

NAME = "import ctypes\nctypes.CDLL(None).prctl(15, b'caf\\xe9', 0, 0, 0)\n"


def test_a_name_that_is_not_utf8_disturbs_nobody(make_box, isolation: str) -> None:
    code = f"{NAME}import time\nprint(flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UnicodeDecodeError):
            Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        box = make_box(isolation, workers=2)  # starts beside it
        process.kill()

    async def main() -> None:
        session = PythonSession(box.sandbox)
        root = await session.open(Task("t", (), "test", setup="x = 1"))
        result = await session.call(root, {"code": "import time\ntime.time_ns()"})
        link = box.sandbox._link(_LIGHT)
        attack = asyncio.create_task(box.sandbox.run(f"{NAME}import time\ntime.sleep(2)"))
        answers = [await box.sandbox.run(f"{number}") for number in range(8)]
        assert [answer.value for answer in answers] == [str(number) for number in range(8)]
        await attack
        await session.call(root, {"code": NAME})
        await asyncio.sleep(1.2)
        assert (await session.call(result.state, {"code": "x"})).content == "1"
        assert box.sandbox._link(_LIGHT) is link, "the server was replaced"

    asyncio.run(main())
