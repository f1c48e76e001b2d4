"""The operator of the Triton kernels, with fake and autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elpo_kernels.attention.blocks import Trees, unpacked
from elpo_kernels.attention.tiles import tiles
from elpo_kernels.schema import operator

OPERANDS = "Tensor query, Tensor key, Tensor value"
"""`[T, Hq, D]` and `[T, Hkv, D]`."""


@operator(
    "tree_attention", OPERANDS, Trees, "Tensor blocks, float scale", returns="(Tensor, Tensor)"
)
def tree_attention_op(
    query: Tensor, key: Tensor, value: Tensor, trees: Trees, blocks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[T, Hq, D]` and log-sum-exp `[Hq, T]`; `blocks` as `TreePlan.blocks` makes them."""
    # Imported here: whether kernels are compiled or interpreted is settled at import.
    from elpo_kernels.attention.kernels import Operands, forward

    sizes = tiles(query.device, query.dtype, query.shape[-1]).sizes
    by_row, _, _ = unpacked(blocks, len(query), sizes)
    return forward(Operands(query, key, value, *trees, scale), by_row)


@tree_attention_op.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    size, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, size), dtype=torch.float32)


@operator(
    "tree_attention_backward",
    OPERANDS,
    Trees,
    "Tensor blocks, float scale, Tensor out, Tensor lse, Tensor grad",
    returns="(Tensor, Tensor, Tensor)",
)
def tree_attention_backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    trees: Trees,
    blocks: Tensor,
    scale: float,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    from elpo_kernels.attention.kernels import Operands, backward

    sizes = tiles(query.device, query.dtype, query.shape[-1]).sizes
    _, by_row, by_column = unpacked(blocks, len(query), sizes)
    return backward(Operands(query, key, value, *trees, scale), by_row, by_column, *rest)


@tree_attention_backward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, end, position, ctx.window, blocks, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, end, position, blocks, *output)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    query, key, value, end, position, blocks, out, lse = ctx.saved_tensors
    trees = Trees(end, position, ctx.window)
    found = torch.ops.elpo_kernels.tree_attention_backward(
        query, key, value, *trees, blocks, ctx.scale, out, lse, grad
    )
    return *found, *(None,) * 5


tree_attention_op.register_autograd(_gradients, setup_context=_save)
