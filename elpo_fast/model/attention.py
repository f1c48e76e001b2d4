"""Tree attention for Hugging Face models: one registered attention for each backend.

All compute the same function of packed trees, equal up to rounding; `elpo_kernels.tree_attention`
chooses between them:

    sdpa    a dense mask per tree; any device, the reference
    path    allowed pairs only, by PyTorch's flash attention; the fast one on CPUs
    triton  the project's own kernels; the fast one on CUDA
    flex    PyTorch's FlexAttention, compiled on CUDA
    varlen  flash attention over gathered paths, CUDA only
    auto    path on CPUs, triton elsewhere

The trees reach the attention through the keyword argument `tree`, which transformers passes down to
every layer. Without it the model behaves as under transformers' own `sdpa`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from elpo_kernels import TreePlan, register_attention
from elpo_kernels import tree_attention as along_paths
from elpo_kernels.attention.blocks import NO_WINDOW
from elpo_kernels.attention.tiles import tiles
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

BACKENDS = ("auto", "sdpa", "path", "triton", "flex", "varlen")


def attention_name(backend: str) -> str:
    """The name under which transformers knows a backend."""
    return f"elpo_{backend}"


ATTENTION = attention_name("auto")
NAMES = tuple(attention_name(backend) for backend in BACKENDS)


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    backend: str = "auto",
    tree: TreePlan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query [1, heads, N, D]`, `key` and `value [1, kv_heads, N, D]` -> `[1, N, heads, D]`."""
    if tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if softcap is not None:
        raise ValueError("tree attention has no logit soft-capping; use a model without it")
    if backend == "auto":
        backend = "path" if query.device.type == "cpu" else "triton"
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    output = along_paths(
        query, key, value, tree, scale=scaling, window=sliding_window, backend=backend
    )
    return output[None], None


def prepare(plan: TreePlan, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Make what a model's layers will ask of a plan, so that compiled ones find it there. `dtype`:
    of their queries."""
    automatic = "path" if plan.end.device.type == "cpu" else "triton"
    name = config._attn_implementation
    if name != attention_name("triton") and (name != ATTENTION or automatic != "triton"):
        return
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    for reach in {window if kind == "sliding_attention" else None for kind in kinds}:
        plan.blocks(tiles(plan.end.device, dtype, dim), reach or NO_WINDOW)


def _path(*arguments: Any) -> torch.Tensor:
    """The CPU's, imported when a CPU computes."""
    from elpo_fast.cpu.path_attention import path_attention

    return path_attention(*arguments)


register_attention("path", _path)
for _backend in BACKENDS:
    AttentionInterface.register(attention_name(_backend), partial(tree_attention, backend=_backend))
    AttentionMaskInterface.register(attention_name(_backend), ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
