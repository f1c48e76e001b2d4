"""Siege of the Python tools: `python bench/mutate_tools.py [--calls 10000] [--out FILE]`.

Programs are put together at random from fragments of every attack that the tests know and of honest
programs: several in a row, each as it is, in a loop, in a thread, with its faults swallowed. They
run as calls and as steps of sessions that branch, beside eight innocent sessions that compute,
branch, write files and print what cannot be repeated. Every answer of an innocent is checked; one
that is wrong is a failure, as is a process, a folder or a descriptor that is left at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from elpo_fast.tools.interpreter import PythonSession
from elpo_fast.tools.sandbox import Sandbox, Snapshot, SnapshotLostError
from elpo_fast.types import Task

INNOCENTS, HOSTILE, TIMEOUT_S = 8, 4, 0.5

ATTACKS = (
    # what a reader of replies would stumble over
    "raise ValueError('\\ud83d')",
    "class R:\n    def __repr__(self): return '\\udcff' * 9\nR()",
    "class E(Exception):\n    def __str__(self): return 1 / 0\nraise E",
    'import json\njson.dumps = lambda *_, **__: \'{"value": 1, "timeout": 1e999}\'',
    "import json\njson.dumps = lambda *_, **__: '[' * 10**5",
    "import os\nfor fd in range(3, 40):\n    try: os.write(fd, os.urandom(64))\n"
    "    except OSError: pass",
    "import os\nfor fd in range(3, 40):\n    try: os.write(fd, b'D\\0\\0\\0\\2{}' * 3)\n"
    "    except OSError: pass",
    "import os\nfor fd in range(3, 40):\n    try: os.write(fd, b'H\\xff\\xff\\xff\\xff')\n"
    "    except OSError: pass",
    # the supervisor
    "import ctypes\nctypes.CDLL(None).prctl(15, b'caf\\xe9', 0, 0, 0)",
    "import ctypes\nctypes.CDLL(None).prctl(15, b') R 1 1', 0, 0, 0)",
    "import ctypes\n[ctypes.CDLL(None).prctl(o, 0, 0, 0, 0) for o in (1, 4, 36)]",
    "import os, signal\nfor pid in (0, -1, 1, os.getppid()):\n"
    "    try: os.kill(pid, signal.SIGKILL)\n    except OSError: pass",
    "import os\ntry: os.setsid()\nexcept OSError: pass",
    "import os\nos._exit(0)",
    "import os\nos.closerange(0, 999)",
    "import os\nos._exit = os.close = os.fork = print",
    "import sys\nsys.modules.clear()",
    "import gc\nfor thing in gc.get_objects():\n    if isinstance(thing, dict): thing.clear()",
    "import builtins\nbuiltins.len = builtins.repr = builtins.isinstance = None",
    "import sys\nsys.stdout = sys.stderr = None",
    "import ctypes\nctypes.string_at(0)",
    # lost requests, run-aways
    "import json, os\njson.loads = lambda *_: os._exit(1)",
    "import socket\nsocket.recv_fds = lambda *_: exec('while True: pass')",
    "import os\nfork = os.fork\nos.fork = lambda: (fork(), fork())[0]",
    "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))",
    "import threading\ndef burn():\n    while True: pass\n"
    "threading.Thread(target=burn, daemon=True).start()",
    # processes, threads, memory
    "import os\nfor _ in range(50):\n    try: os.fork()\n    except OSError: pass",
    "import threading, time\ntry:\n    for _ in range(300):\n"
    "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
    "except RuntimeError: pass",
    "x = bytearray(1 << 40)",
    "held = [bytearray(8 << 20) for _ in range(12)]",
    "import mmap\nm = mmap.mmap(-1, 64 << 20)\nm[:] = bytes(64 << 20)",
    "import socket\npairs = [socket.socketpair() for _ in range(40)]\n"
    "for a, b in pairs:\n    a.setblocking(False)\n    try: a.send(bytes(1 << 20))\n"
    "    except OSError: pass",
    "import os\nmore = []\ntry:\n    while True: more.append(os.dup(0))\nexcept OSError: pass",
    "def f(n): f(n + 1)\nf(0)",
    "while True: print('x' * 10**6)",
    # files
    "import os\ntry: os.mkfifo('fifo')\nexcept OSError: pass",
    "import os\nos.makedirs('d', exist_ok=True)\nos.chmod('d', 0)",
    "import os\nhere = os.getcwd()\ntry:\n    for _ in range(300):\n        os.mkdir('deep')\n"
    "        os.chdir('deep')\nexcept OSError: pass\nos.chdir(here)",
    "import os\nos.makedirs('gone', exist_ok=True)\nos.chdir('gone')\nos.rmdir(os.getcwd())",
    "import os\nif not os.path.lexists('up'): os.symlink('/', 'up')",
    "for i in range(500): open(f'many{i}', 'w').close()",
    "for i in range(9): open(f'big{i}', 'wb').write(bytes(8 << 20))",
    "import os\nf = open('unlinked', 'wb')\nos.remove('unlinked')\nf.write(bytes(30 << 20))",
    "import shutil\nshutil.rmtree('/', ignore_errors=True)",
    # neighbours
    "import mmap\nm = mmap.mmap(-1, 4096)\nm[0] = (m[0] + 1) % 256",
    "import os\nr, w = os.pipe()\nos.write(w, b'x')",
    "import glob, tempfile\nfor p in glob.glob(tempfile.gettempdir() + '/**', recursive=True):\n"
    "    try: open(p, 'w').write('999')\n    except OSError: pass",
    "import ctypes\nlibc = ctypes.CDLL(None)\nfor i in range(9): libc.shmat(i, None, 0)",
    "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "try: a.sendto(b'x', '/run/systemd/notify')\nexcept OSError: pass",
)
HONEST = (
    "print(2**10)",
    "import sympy\nsympy.factor(sympy.Symbol('x')**2 - 1)",
    "import numpy\nnumpy.arange(10).sum()",
    "x = [i * i for i in range(1000)]\nsum(x)",
    "open('notes', 'a').write('line\\n')",
    "import sqlite3\nsqlite3.connect('base').execute('create table if not exists t (x)')",
    "import threading\nt = threading.Thread(target=print, args=('hello',))\nt.start()\nt.join()",
    "import random\nrandom.random()",
    "import time\ntime.sleep(0.01)",
    "1 / 0",
)


def program(dice: random.Random) -> str:
    """One to four fragments, most of them attacks, each as it is or wrapped."""
    parts = []
    for _ in range(dice.randint(1, 4)):
        fragment = dice.choice(ATTACKS if dice.random() < 0.7 else HONEST)
        indented = "\n".join(f"    {line}" for line in fragment.splitlines())
        kind = dice.choice(("plain", "plain", "swallow", "loop", "thread", "function"))
        parts.append(
            {
                "plain": fragment,
                "swallow": f"try:\n{indented}\nexcept BaseException: pass",
                "loop": f"for _ in range(3):\n{indented}",
                "thread": f"import threading\ndef work():\n{indented}\n"
                "t = threading.Thread(target=work)\nt.start()\nt.join(0.2)",
                "function": f"def work():\n{indented}\nwork()",
            }[kind]
        )
    return "\n".join(parts)


class Siege:
    def __init__(self, sandbox: Sandbox, calls: int, seed: int) -> None:
        self.sandbox, self.left, self.seed = sandbox, calls, seed
        self.ended: Counter[str] = Counter()
        self.checked = 0
        self.wrong: list[tuple[str, str, str]] = []
        self.slowest = 0.0

    async def hostile(self, number: int) -> None:
        """Calls, and steps from any snapshot that is still there."""
        dice = random.Random(f"{self.seed} {number}")
        snapshots: list[Snapshot] = []
        while self.left > 0:
            self.left -= 1
            code = program(dice)
            if dice.random() < 0.4:
                execution = await self.sandbox.run(code, timeout_s=TIMEOUT_S)
            else:
                if not snapshots or dice.random() < 0.1:
                    snapshots.append(await self.sandbox.open_session())
                origin = dice.choice(snapshots)
                try:
                    execution, new = await self.sandbox.step(origin, code, 1, timeout_s=TIMEOUT_S)
                except SnapshotLostError:
                    self.ended["snapshot lost"] += 1  # nothing was run: no call
                    self.left += 1
                    self.sandbox.drop([origin])
                    snapshots.remove(origin)
                    continue
                snapshots += [new] if new else []
                if len(snapshots) > 12:
                    self.sandbox.drop(snapshots[:6])
                    del snapshots[:6]
            if execution.finished:
                self.ended["error" if execution.error else "value"] += 1
            else:
                self.ended[(execution.error or "").splitlines()[-1][:60]] += 1
        self.sandbox.drop(snapshots)

    async def innocent(self, number: int) -> None:
        """One session after the other until the siege is over; every answer is known."""
        session = PythonSession(self.sandbox)
        n = number
        while self.left > 0:
            n += INNOCENTS
            states = [await session.open(Task("t", (), "siege", setup=f"x = {n}"))]
            # parent, code, answer (None: whatever it is, it is no error)
            for parent, code, answer in (
                (0, "x += 1\nx", f"{n + 1}"),
                (1, "import time\ntime.time_ns()", None),
                (1, "x *= 2\nx", f"{2 * n + 2}"),
                (2, "x *= 3\nx", f"{3 * n + 3}"),
                (4, "open('f', 'w').write(str(x))", f"{len(str(3 * n + 3))}"),
                (5, "int(open('f').read()) + 1", f"{3 * n + 4}"),
                (3, "import os\nos.path.exists('f'), x", f"(False, {2 * n + 2})"),
            ):
                began = time.monotonic()
                result = await session.call(states[parent], {"code": code})
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.checked += 1
                if result.error or (answer is not None and result.content != answer):
                    self.wrong.append((code, result.content, str(answer)))
                states.append(result.state)
            self.checked += 1
            execution = await self.sandbox.run(f"print({n} ** 2)")
            if execution.stdout != f"{n * n}\n":
                self.wrong.append((f"print({n} ** 2)", execution.text(), f"{n * n}"))
            await session.release(states)
        await session.close()

    async def run(self) -> None:
        await asyncio.gather(
            *(self.hostile(number) for number in range(HOSTILE)),
            *(self.innocent(number) for number in range(INNOCENTS)),
        )


async def folder(sandbox: Sandbox) -> Path:
    """Where the server of this sandbox keeps its files, as its programs name it: on the host under
    Landlock alone."""
    execution = await sandbox.run("import os\nos.getcwd()")
    return Path(*Path(str(execution.value).strip("'")).parts[:3])


async def siege(calls: int, isolation: str, seed: int) -> dict[str, Any]:
    sandbox = Sandbox(isolation=isolation, workers=4, timeout_s=60.0, memory_mb=256)  # type: ignore[arg-type]
    protection = await sandbox.start()
    folders = {await folder(sandbox)}
    before = len(os.listdir("/proc/self/fd"))
    besieged = Siege(sandbox, calls, seed)
    started = time.perf_counter()
    await besieged.run()
    seconds = time.perf_counter() - started
    descriptors = len(os.listdir("/proc/self/fd")) - before
    folders.add(await folder(sandbox))  # another one where the server had to be started again
    await sandbox.close()
    await asyncio.sleep(1.0)
    left = {
        "processes": len(psutil.Process().children(recursive=True)),
        "folders": sum(path.name.startswith("elpo-") and path.exists() for path in folders),
        "descriptors": max(0, descriptors),
    }
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.release()}",
        "python": platform.python_version(),
        "isolation": protection.isolation,
        "user": "root" if os.getuid() == 0 else "ordinary",
        "calls": calls,
        "seconds": round(seconds, 1),
        "ended": dict(besieged.ended.most_common()),
        "innocent_sessions": INNOCENTS,
        "innocent_answers": besieged.checked,
        "slowest_innocent_s": round(besieged.slowest, 1),
        "wrong": besieged.wrong[:20],
        "left": left,
        "passed": not besieged.wrong and not any(left.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--isolation", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the record here")
    arguments = parser.parse_args()
    record = asyncio.run(siege(arguments.calls, arguments.isolation, arguments.seed))
    record["load_after"] = round(os.getloadavg()[0], 2)
    text = json.dumps(record, indent=1)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    print(text)
    sys.exit(0 if record["passed"] else 1)


if __name__ == "__main__":
    main()
