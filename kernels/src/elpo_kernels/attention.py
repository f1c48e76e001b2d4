"""Attention along the paths of packed trees.

Trees lie end to end in preorder, where a query sees its ancestors and itself:

    out_q = Σ_k softmax_k(scale · query_q · key_k) value_k  over  k <= q < end[k].

With a window, only ancestors less than `window` positions above. The `triton` backend visits blocks
that hold an allowed pair and keeps nothing quadratic; `torch` is a dense mask, for small `T`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from elpo_kernels._backend import resolve_backend
from elpo_kernels._checks import check_device
from elpo_kernels._tree_blocks import NO_WINDOW, BlockLists, TreePlan

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@library.custom_op("elpo_kernels::tree_attention", mutates_args=())
def tree_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    end: Tensor,
    position: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[T, Hq, D]` and log-sum-exp `[Hq, T]`. Block lists are those of `TreePlan.of`."""
    # Imported here: whether kernels are compiled or interpreted is settled at import.
    from elpo_kernels import _triton_attention

    tile = _triton_attention.tiles(query.device, query.dtype, query.shape[-1]).forward
    lists = _lists(end, position, tile, window, by_column=False)
    position = position if window else None
    return _triton_attention.forward(query, key, value, end, position, lists, window, scale)


@tree_attention_op.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    size, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, size), dtype=torch.float32)


@library.custom_op("elpo_kernels::tree_attention_backward", mutates_args=())
def tree_attention_backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    end: Tensor,
    position: Tensor | None,
    window: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    from elpo_kernels import _triton_attention

    shipped = _triton_attention.tiles(query.device, query.dtype, query.shape[-1])
    by_row = _lists(end, position, shipped.query, window, by_column=False)
    by_column = _lists(end, position, shipped.key, window, by_column=True)
    position = position if window else None
    return _triton_attention.backward(
        query, key, value, end, position, by_row, by_column, window, scale, out, lse, grad
    )


@tree_attention_backward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))  # type: ignore[return-value]


def _lists(
    end: Tensor, position: Tensor | None, tile: Any, window: int, *, by_column: bool
) -> BlockLists:
    plan = TreePlan.of(end, position)
    return plan.lists(tile.rows, tile.columns, window, by_column=by_column)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, end, position, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, end, position, *output)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    query, key, value, end, position, out, lse = ctx.saved_tensors
    found = torch.ops.elpo_kernels.tree_attention_backward(
        query, key, value, end, position, ctx.window, ctx.scale, out, lse, grad
    )
    return *found, None, None, None, None


tree_attention_op.register_autograd(_gradients, setup_context=_save)


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
    A query without any key gives 0. Raises `ValueError` for arguments that do not fit each other.
    """
    plan = end if isinstance(end, TreePlan) else TreePlan(end)
    _check(query, key, value, plan)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1, or None, got {window}")
    reach = window or NO_WINDOW
    if resolve_backend(backend, query.device, query.dtype) == "torch":
        return _dense(query, key, value, plan.allowed(reach), scale)
    if reach:
        plan.windowed()
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return tree_attention_op(query, key, value, plan.end, plan.position, reach, scale)[0]


def _dense(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, allowed, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


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
