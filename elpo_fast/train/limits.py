"""What this machine can do at most: matrix products, memory, forks of the sandbox.

Measured, as the machine is now: a busy one can do less. Only what a GPU's model FLOPs utilization
(`mfu`) is a share of is its data sheet's number, as everywhere, where the card is known here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from elpo_fast.tools.toolbox import Toolbox

SHEETS = {  # operations a second in dense bfloat16 products
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}
_ROUNDS = 3
_CALLS = 32


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one process's device and of its sandbox."""

    products: float  # operations a second
    memory: float  # bytes a second, reads and writes together
    forks: float  # executions of an empty program a second; 0: no sandbox


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that `mfu` is a share of."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for card, rate in SHEETS.items():
            if card in name:
                return rate
    return products(device, dtype)


def products(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of a few."""
    edge = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(edge, edge, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * edge**3 / _fastest(lambda: a @ b, device)


def memory(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, the best of a few."""
    size = 1 << (27 if device.type == "cpu" else 31)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2.0 * size / _fastest(lambda: target.copy_(source), device)


async def forks(toolbox: Toolbox) -> float:
    """Empty programs a second, as many at once as are asked for."""
    await toolbox.run_python("")
    began = perf_counter()
    await asyncio.gather(*(toolbox.run_python("") for _ in range(_CALLS)))
    return _CALLS / (perf_counter() - began)


async def measured(toolbox: Toolbox, device: torch.device, dtype: torch.dtype) -> Limits:
    """All of them; about a second."""
    return Limits(products(device, dtype), memory(device), await forks(toolbox))


def _fastest(work: Any, device: torch.device) -> float:
    """Seconds; the first call does not count."""
    times = []
    for _ in range(_ROUNDS + 1):
        began = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - began)
    return min(times[1:])
