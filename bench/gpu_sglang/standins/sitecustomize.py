"""Lets SGLang run a dense Qwen2 or Qwen3 on a GPU without sgl_kernel's and flashinfer's binaries.

Both are placeholders, as on a CPU (`elpo_fast.rollout.sglang.cpu`); what such a model calls of
sgl_kernel is here in PyTorch. SGLang compiles its other operators itself, from its own sources.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ROOT = Path(__file__).resolve().parents[3]
_cpu = runpy.run_path(str(_ROOT / "elpo_fast/rollout/sglang/cpu/sitecustomize.py"))
_cpu["_Finder"].find_spec.__globals__["_BINARIES"] += ("flashinfer",)


def rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
    """Of `[T, H]`."""
    from torch.nn.functional import rms_norm  # not in every process that imports this file

    normed = rms_norm(input, weight.shape, weight, eps)
    return normed if out is None else out.copy_(normed)


def fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    """`residual += input`, then `input = rmsnorm(residual)`, both `[T, H]` and in place."""
    residual.add_(input)
    rmsnorm(residual, weight, eps, input)


def is_arch_support_pdl() -> bool:
    """Whether Triton's kernels shall overlap their ends and starts."""
    return False


import sgl_kernel  # noqa: E402
import sgl_kernel.utils  # noqa: E402

sgl_kernel.rmsnorm = rmsnorm
sgl_kernel.fused_add_rmsnorm = fused_add_rmsnorm
sgl_kernel.utils.is_arch_support_pdl = is_arch_support_pdl
