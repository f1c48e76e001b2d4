"""Endurance of the Python tools: `python bench/soak_tools.py [--calls 100000] [--out FILE]`.

Mixed calls, the hostile ones among them, from two callers: prints, sympy, scipy, errors, floods,
memory bombs, crashes, time-outs, cancelled calls, grader functions, sessions that branch, and now
and then a server that is killed. Every answer is checked. Twenty times the callers pause, and the
processes, descriptors and memory of this process and all below it are taken; growth from the first
quarter of the samples to the last is a failure, told by the exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil

from elpo_fast.tools.interpreter import PythonSession
from elpo_fast.tools.sandbox import Sandbox
from elpo_fast.types import Task

CALLERS, SAMPLES, TIMEOUT_S = 2, 20, 1.0
TIMED_OUT = f"timed out after {TIMEOUT_S:g} s"
KILL_EVERY = 1_000  # calls
ALLOWED = {"processes": 1, "descriptors": 4, "memory_mb": 4}  # growth

# share in a thousand, code, what the model must be shown at the end
PROGRAMS = {
    "print": (420, "print(2**10)", "1024"),
    "sympy": (130, "import sympy\nsympy.factorint(2**31 - 2)[7]", "1"),
    "scipy": (20, "from scipy.special import erf\nfloat(erf(0))", "0.0"),
    "error": (120, "def f(x): return 1 / x\nf(0)", "ZeroDivisionError: division by zero"),
    "file": (40, "open('/tmp/f', 'w').write('x' * 10**6)", ("1000000", "'/tmp/f'")),
    "long output": (40, "print('x' * 10**6)\nprint('end')", "end"),
    "threads": (
        30,
        "import threading\nt = [threading.Thread(target=print) for _ in range(8)]\n"
        "for x in t: x.start()\nfor x in t: x.join()\n'joined'",
        "'joined'",
    ),
    "memory": (30, "x = bytearray(1 << 40)", "MemoryError: memory limit reached"),
    "exit": (20, "import os\nos._exit(0)", "the process ended before the code was finished"),
    "crash": (10, "import ctypes\nctypes.string_at(0)", "the interpreter crashed (SIGSEGV)"),
    "flood": (3, "while True: print('x' * 10**6)", "stopped: too much output"),
    "time-out": (2, "while True: pass", TIMED_OUT),
    "deaf time-out": (1, "import itertools\nsum(itertools.repeat(0))", TIMED_OUT),
}
OTHERS = {"session": 90, "function": 34, "cancelled": 10}


def footprint() -> dict[str, float]:
    """Of this process and all below it. Memory is anonymous; pages that they share count once.
    Those of files would count less while other programs on the machine use the same libraries."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    descriptors = kilobytes = 0
    for process in processes:
        # They may have ended meanwhile; confined ones are not everybody's to read.
        with contextlib.suppress(psutil.Error, OSError):
            descriptors += process.num_fds()
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            kilobytes += int(rollup.partition("Pss_Anon:")[2].split()[0])
    return {
        "processes": len(processes),
        "descriptors": descriptors,
        "memory_mb": round(kilobytes / 1024, 1),
    }


class Soak:
    def __init__(self, sandbox: Sandbox, seed: int) -> None:
        self.sandbox, self.session = sandbox, PythonSession(sandbox)
        self.dice = random.Random(seed)
        self.made: Counter[str] = Counter()
        self.killed_servers = 0
        kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            name: (share, self.program(code, shown))
            for name, (share, code, shown) in PROGRAMS.items()
        }
        kinds["session"] = (OTHERS["session"], self.branches)
        kinds["function"] = (OTHERS["function"], self.function)
        kinds["cancelled"] = (OTHERS["cancelled"], self.cancelled)
        self.kinds = {name: call for name, (_, call) in kinds.items()}
        self.shares = [share for share, _ in kinds.values()]

    async def chunk(self, calls: int) -> float:
        """Make so many calls; calls a second."""
        names = iter(self.dice.choices(list(self.kinds), self.shares, k=calls))

        async def caller() -> None:
            for name in names:
                self.made[name] += 1
                if self.made.total() % KILL_EVERY == 0:
                    self.kill_a_server()
                await self.kinds[name]()

        started = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return calls / (time.perf_counter() - started)

    def program(self, code: str, shown: str | tuple[str, ...]) -> Callable[[], Awaitable[None]]:
        async def call() -> None:
            # The others have the sandbox's limit, which a busy machine keeps as well.
            limit = TIMEOUT_S if shown == TIMED_OUT else None
            execution = await self.sandbox.run(code, timeout_s=limit)
            assert execution.text().endswith(shown), (code, execution)

        return call

    async def branches(self) -> None:
        """x is 1, then 2 on two branches, then 3 and 4 on each."""
        root = await self.session.open(Task("t", (), "soak", setup="x = 1"))
        states = [root]
        for parent, number in ((0, 2), (0, 2), (1, 3), (2, 3), (3, 4), (4, 4)):
            result = await self.session.call(states[parent], {"code": "x += 1\nx"})
            assert result.content == f"{number}", result
            states.append(result.state)
        killed = await self.session.call(states[-1], {"code": "import os\nos._exit(1)"})
        assert killed.error and killed.state is states[-1], killed
        await self.session.release(states)

    async def function(self) -> None:
        assert await self.sandbox.call_function("math:factorial", 5) == 120

    async def cancelled(self) -> None:
        call = asyncio.create_task(self.sandbox.run("while True: pass"))
        await asyncio.sleep(0.02)
        call.cancel()
        await asyncio.wait([call])

    def kill_a_server(self) -> None:
        """Whatever was running on it is made again; nobody notices."""
        link = self.dice.choice([link for link in self.sandbox._links.values() if link.alive])
        if link._process is not None:
            self.killed_servers += 1
            link._process.kill()


async def soak(calls: int, isolation: str, seed: int) -> dict[str, Any]:
    sandbox = Sandbox(isolation=isolation, workers=CALLERS, timeout_s=60.0)  # type: ignore[arg-type]
    protection = await sandbox.start()
    soaking = Soak(sandbox, seed)
    for call in soaking.kinds.values():  # every kind of server has been started, every path taken
        await call()
    started = time.perf_counter()
    samples = []
    for number in range(SAMPLES):
        rate = await soaking.chunk(calls * (number + 1) // SAMPLES - calls * number // SAMPLES)
        for name in ("print", "scipy", "function"):  # one for every kind of server: all are there
            await soaking.kinds[name]()
        await asyncio.sleep(0.4)  # the ended ones end
        samples.append({"calls": soaking.made.total(), "per_s": round(rate, 1), **footprint()})
        print(json.dumps(samples[-1]), flush=True)
    seconds = time.perf_counter() - started
    await sandbox.close()
    await asyncio.sleep(0.5)
    quarter = max(1, SAMPLES // 4)
    growth = {
        name: round(
            statistics.median(sample[name] for sample in samples[-quarter:])
            - statistics.median(sample[name] for sample in samples[:quarter]),
            1,
        )
        for name in ALLOWED
    }
    left = len(psutil.Process().children(recursive=True))
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.release()}",
        "python": platform.python_version(),
        "isolation": protection.isolation,
        "calls": calls,
        "seconds": round(seconds, 1),
        "made": dict(soaking.made),
        "killed_servers": soaking.killed_servers,
        "samples": samples,
        "growth": growth,
        "processes_after_close": left,
        "passed": left == 0 and all(growth[name] <= most for name, most in ALLOWED.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--isolation", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the record here")
    arguments = parser.parse_args()
    record = asyncio.run(soak(arguments.calls, arguments.isolation, arguments.seed))
    record["load_after"] = round(os.getloadavg()[0], 2)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: record[name] for name in ("made", "seconds", "growth", "passed")}))
    sys.exit(0 if record["passed"] else 1)


if __name__ == "__main__":
    main()
