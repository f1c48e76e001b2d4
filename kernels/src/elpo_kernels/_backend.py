"""Choice of the backend; asking for one that cannot run raises, nothing falls back."""

from __future__ import annotations

import functools
import importlib.util
import logging
import time

import torch

logger = logging.getLogger("elpo_kernels")

BACKENDS = ("auto", "triton", "torch")


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs. `auto` picks by device (and float64, which only `torch` computes) and
    logs its choice once. `ValueError` for an unknown name, `RuntimeError` where it cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return _automatic(device.type, dtype)
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            raise RuntimeError(
                "backend 'triton' needs the triton package; install it, or use 'torch'"
            )
        if dtype == torch.float64:
            raise RuntimeError("backend 'triton' does not compute float64; use 'torch'")
        if device.type != "cuda" and not _interpreted():
            raise RuntimeError(
                f"backend 'triton' cannot run on {device.type}; use 'torch' or 'auto'"
            )
    return backend


@functools.cache
def _automatic(device_type: str, dtype: torch.dtype) -> str:
    on_gpu = device_type == "cuda" and dtype != torch.float64
    chosen = "triton" if on_gpu and importlib.util.find_spec("triton") else "torch"
    logger.info("backend for %s tensors on %s: %s", dtype, device_type, chosen)
    return chosen


@functools.cache
def widens_bfloat16() -> bool:
    """Whether this CPU multiplies float32 matrices faster than bfloat16 ones, as those do that have
    neither AMX nor AVX-512 BF16 at full rate. No flag tells, so it is timed, once a process, in
    some 30 ms; where it is true the factor is near two, where it is false near a quarter."""
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    operands = {dtype: torch.ones(512, 1024, dtype=dtype) for dtype in best}
    for _ in range(4):
        for dtype, a in operands.items():
            start = time.perf_counter()
            torch.mm(a, a.t())
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    widens = best[torch.float32] < best[torch.bfloat16]
    logger.info("bfloat16 on this CPU is multiplied in %s", "float32" if widens else "bfloat16")
    return widens


@functools.cache
def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
