"""Tree attention for Hugging Face models: one registered attention for each backend.

All compute the same function of packed trees (`tree_mask`), equal up to rounding:

    sdpa    a dense mask per tree; any device, the reference
    path    allowed pairs only, by kernels in Numba; the fast one on CPUs
    triton  `elpo_kernels.tree_attention`; the fast one on CUDA
    flex    PyTorch's FlexAttention, compiled on CUDA
    varlen  flash attention over gathered paths, CUDA only
    auto    path on CPUs, triton elsewhere

The trees reach the attention through the keyword argument `tree`, which transformers passes down to
every layer. Without it the model behaves as under transformers' own `sdpa`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from elpo_kernels import tree_attention as kernel_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from elpo_fast.model.flex_attention import flex_tree_attention
from elpo_fast.model.path_attention import path_attention
from elpo_fast.model.tree_mask import TreeMask
from elpo_fast.model.varlen_attention import varlen_tree_attention

Backend = Callable[..., torch.Tensor]
"""`(query [heads, N, D], key, value [kv_heads, N, D], tree, scale, window) -> [heads, N, D]`."""


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreeMask,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """SDPA with a dense mask per tree, so that memory grows with the largest tree."""
    groups = query.shape[0] // key.shape[0]
    key = key.repeat_interleave(groups, dim=0)
    value = value.repeat_interleave(groups, dim=0)
    outputs = [
        F.scaled_dot_product_attention(
            query[None, :, start:stop],
            key[None, :, start:stop],
            value[None, :, start:stop],
            attn_mask=tree.dense(start, stop, window),
            scale=scale,
        )[0]
        for start, stop in tree.spans
    ]
    return torch.cat(outputs, dim=1)


def triton_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreeMask,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """The project's own kernel."""
    by_token = (x.transpose(0, 1) for x in (query, key, value))
    output = kernel_attention(*by_token, tree, scale=scale, window=window, backend="triton")
    return output.transpose(0, 1)


def automatic_attention(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """The fast one for the device."""
    backend = path_attention if query.device.type == "cpu" else triton_attention
    return backend(query, *arguments)


BACKENDS: dict[str, Backend] = {
    "auto": automatic_attention,
    "sdpa": masked_attention,
    "path": path_attention,
    "triton": triton_attention,
    "flex": flex_tree_attention,
    "varlen": varlen_tree_attention,
}


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
    tree: TreeMask | None = None,
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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = BACKENDS[backend]
    output = attend(*(x.squeeze(0) for x in (query, key, value)), tree, scale, sliding_window)
    return output.transpose(0, 1)[None], None


for _backend in BACKENDS:
    AttentionInterface.register(attention_name(_backend), partial(tree_attention, backend=_backend))
    AttentionMaskInterface.register(attention_name(_backend), ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
