"""Speed of the Python tools: `python bench/bench_tools.py [--seconds 5] [--out FILE]`.

Every answer is checked; rounds of all variants alternate, and the median round is reported with
the range of the rounds. Beside the sandbox stand cold subprocesses, which is what it replaces.
`soak_tools.py` is about endurance.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from elpo_fast.tools.interpreter import PythonSession, SessionState
from elpo_fast.tools.sandbox import Sandbox
from elpo_fast.types import Task

PRINT = "print(2**10)"
FACTOR = "import sympy\nx = sympy.Symbol('x')\nprint(sympy.factor(x**6 - 1))"
SCIPY = "from scipy.optimize import brentq\nprint(round(brentq(lambda x: x * x - 2, 0, 2), 6))"
ANSWERS = {
    PRINT: "1024",
    FACTOR: "(x - 1)*(x + 1)*(x**2 - x + 1)*(x**2 + x + 1)",
    SCIPY: "1.414214",
}
ROUNDS = 5
Call = Callable[[], Awaitable[None]]


def cold(code: str) -> Call:
    async def call() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert out.decode().strip() == ANSWERS[code]

    return call


async def measure(call: Call, callers: int, seconds: float) -> tuple[float, list[float]]:
    """Calls a second of all callers together, and the milliseconds of every call."""
    times: list[float] = []
    started = time.perf_counter()

    async def caller() -> None:
        while (begin := time.perf_counter()) < started + seconds:
            await call()
            times.append((time.perf_counter() - begin) * 1e3)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return len(times) / (time.perf_counter() - started), times


async def compare(variants: dict[str, tuple[Call, int]], seconds: float) -> dict[str, Any]:
    for call, _ in variants.values():
        await call()  # right answer, warm
    rates: dict[str, list[float]] = {name: [] for name in variants}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, (call, callers) in variants.items():
            rate, taken = await measure(call, callers, seconds / ROUNDS)
            rates[name].append(rate)
            times[name] += taken
    return {
        name: {
            "per_s": round(statistics.median(rates[name]), 1),
            "per_s_range": [round(min(rates[name]), 1), round(max(rates[name]), 1)],
            "p50_ms": round(float(np.quantile(times[name], 0.5)), 2),
            "p99_ms": round(float(np.quantile(times[name], 0.99)), 2),
            "calls": len(times[name]),
        }
        for name in variants
    }


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    sandbox = Sandbox(isolation=arguments.isolation, workers=2)
    protection = await sandbox.start()
    start_s = time.perf_counter() - started
    session = PythonSession(sandbox)

    def in_sandbox(code: str) -> Call:
        async def call() -> None:
            assert (await sandbox.run(code)).stdout.strip() == ANSWERS[code]

        return call

    async def stepper(setup: str) -> Call:
        root: SessionState = await session.open(Task("t", (), "bench", setup=setup))

        async def call() -> None:
            result = await session.call(root, {"code": "x += 1; x"})
            assert result.content == "2", result
            await session.release([result.state])

        return call

    async def function() -> None:
        assert await sandbox.call_function("math:factorial", 5) == 120

    variants: dict[str, tuple[Call, int]] = {}
    for name, code in (("print", PRINT), ("sympy factor", FACTOR), ("scipy root", SCIPY)):
        for callers in (1, 2):
            variants[f"cold {name}, {callers} callers"] = (cold(code), callers)
            variants[f"sandbox {name}, {callers} callers"] = (in_sandbox(code), callers)
    variants["session step, 1 callers"] = (await stepper("x = 1"), 1)
    big = "import numpy\nx = 1\ndata = numpy.ones((100 << 20) // 8)"
    variants["session step on 100 MB, 1 callers"] = (await stepper(big), 1)
    variants["function, 1 callers"] = (function, 1)
    results = await compare(variants, arguments.seconds)
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.release()}",
        "python": platform.python_version(),
        "load_before": arguments.load,
        "isolation": protection.isolation,
        "start_s": round(start_s, 2),
        "seconds": arguments.seconds,
        "results": results,
    }
    await sandbox.close()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isolation", default="auto")
    parser.add_argument("--seconds", type=float, default=5.0, help="per variant")
    parser.add_argument("--out", type=Path, help="write the record here, too")
    arguments = parser.parse_args()
    arguments.load = round(os.getloadavg()[0], 2)
    record = asyncio.run(run(arguments))
    results = record.pop("results")
    print(json.dumps(record, indent=1))
    print(f"{'':38}{'calls/s':>9}{'range':>17}{'p50 ms':>9}{'p99 ms':>9}")
    for name, row in results.items():
        low, high = row["per_s_range"]
        print(f"{name:38}{row['per_s']:9}{f'{low}-{high}':>17}{row['p50_ms']:9}{row['p99_ms']:9}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
