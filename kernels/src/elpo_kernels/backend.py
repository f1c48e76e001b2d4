"""Choice of the backend; asking for one that cannot run raises, nothing falls back."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import platform
from pathlib import Path

import torch

logger = logging.getLogger("elpo_kernels")

BACKENDS = ("auto", "triton", "torch")
# Looked for once: Dynamo traces `resolve_backend`, but not through the import system.
TRITON = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs. `auto` picks by device (and float64, which only `torch` computes) and
    logs its choice once. `ValueError` for an unknown name, `RuntimeError` where it cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return _automatic(device.type, dtype)
    if backend == "triton":
        if not TRITON:
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
    chosen = "triton" if on_gpu and TRITON else "torch"
    logger.info("backend for %s tensors on %s: %s", dtype, device_type, chosen)
    return chosen


@functools.cache
def widens_bfloat16() -> bool:
    """Whether this CPU multiplies float32 matrices faster than bfloat16 ones.

    On x86 bfloat16 is fast with AMX, and with AVX-512 BF16 on AMD's processors alone: on Intel's
    these instructions take twice as long as float32's. Others widen it in software, and so does one
    that `ATEN_CPU_CAPABILITY` limits to AVX2. Decided by what the processor says of itself, not by
    timing: all processes of a run must decide alike.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        fast = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2") and (
            torch.cpu._is_amx_tile_supported()
            or (torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in _processor())
        )
    else:
        fast = torch.backends.mkldnn.is_available() and bool(
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    logger.info("bfloat16 on this CPU is multiplied in %s", "bfloat16" if fast else "float32")
    return not fast


def _processor() -> str:
    """A description of the processor that names its vendor."""
    with contextlib.suppress(OSError):  # Linux alone has this file
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return platform.processor()


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
