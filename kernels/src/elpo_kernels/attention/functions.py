"""Attention along the paths of packed trees, by whatever computes it.

Trees lie end to end in preorder, where a query sees its ancestors and itself:

    out_q = Σ_k softmax_k(scale · query_q · key_k) value_k  over  k <= q < end[k].

With a window, only ancestors less than `window` positions above. All backends compute the same up
to rounding:

    triton  blocks that hold an allowed pair, nothing quadratic kept; the fast one on CUDA
    sdpa    a dense mask a tree; any device, the reference; `torch` is another name of it
    flex    PyTorch's FlexAttention, compiled on CUDA
    varlen  flash attention over gathered paths, CUDA only
    auto    triton on CUDA, sdpa elsewhere
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from elpo_kernels.attention.blocks import NO_WINDOW
from elpo_kernels.attention.dense import dense_attention
from elpo_kernels.attention.flex import flex_attention
from elpo_kernels.attention.ops import tree_attention_op
from elpo_kernels.attention.plan import TreePlan
from elpo_kernels.attention.tiles import tiles
from elpo_kernels.attention.varlen import varlen_attention
from elpo_kernels.backend import resolve_backend
from elpo_kernels.checks import check_device

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Attention = Callable[[Tensor, Tensor, Tensor, TreePlan, float, int | None], Tensor]
"""`(query [T, Hq, D], key, value [T, Hkv, D], plan, scale, window) -> [T, Hq, D]`."""


def _triton(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float, window: int | None
) -> Tensor:
    resolve_backend("triton", query.device, query.dtype)
    trees = plan.trees(window or NO_WINDOW)
    blocks = plan.blocks(tiles(query.device, query.dtype, query.shape[-1]), trees.window)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out: Tensor = tree_attention_op(query, key, value, *trees, blocks, scale)[0]
    return out


BACKENDS: dict[str, Attention] = {
    "torch": dense_attention,
    "sdpa": dense_attention,
    "triton": _triton,
    "flex": flex_attention,
    "varlen": varlen_attention,
}


def register_attention(name: str, attend: Attention) -> None:
    """Let `backend=name` be `attend`."""
    BACKENDS[name] = attend


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    end: Tensor | TreePlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of `query [T, Hq, D]` to `key` and `value [T, Hkv, D]` along paths: `[T, Hq, D]`.

    `end [T]` as above, or a `TreePlan` made of it once for all layers; `window` needs a plan with
    positions. Query heads `g Hq/Hkv` and on share key head `g`. `scale` is `D^-1/2` by default.
    A query without any key gives 0. Raises `ValueError` for arguments that do not fit each other,
    `RuntimeError` for a backend that cannot run.
    """
    plan = end if isinstance(end, TreePlan) else TreePlan(end)
    _check(query, key, value, plan)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1, or None, got {window}")
    if window is not None:
        plan.windowed()
    if backend == "auto":
        backend = resolve_backend("auto", query.device, query.dtype)
    if backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"backend {backend!r} is unknown; choose one of {known}")
    return BACKENDS[backend](query, key, value, plan, scale, window)


def _check(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan) -> None:
    if query.dtype not in DTYPES:
        raise ValueError(f"query must be a floating-point tensor, got {query.dtype}")
    tokens, dim = len(query), query.shape[-1]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 3 or len(tensor) != tokens or tensor.shape[-1] != dim:
            raise ValueError(
                f"{name} must be [{tokens}, heads, {dim}] as query is, got {list(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and query {query.dtype}; give equal dtypes")
        check_device(name, tensor, query)
    if value.shape != key.shape or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads cannot share {key.shape[1]} key and {value.shape[1]} "
            "value heads; give as many values as keys, and a divisor of the queries"
        )
    if len(plan.end) != tokens:
        raise ValueError(f"end has {len(plan.end)} tokens and query {tokens}; give equal numbers")
    check_device("end", plan.end, query)
