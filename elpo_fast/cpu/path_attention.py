"""Tree attention on CPUs: allowed pairs only, whatever lies between them in the row.

A tree of `L` leaves is `L` runs of consecutive path tokens, and what a run sees besides itself is a
few slices of earlier tokens. Memory is linear in the row. `path_layout` has kernels, which compute
in float32; float64 is plain PyTorch here.
"""

from __future__ import annotations

from typing import Any

import torch
from elpo_kernels.attention.plan import Chain, TreePlan
from torch import library

from elpo_fast.cpu import path_layout

TILE = 256  # queries at once
_last: list[TreePlan] = []


def path_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: TreePlan,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Arguments and result as of `elpo_kernels.tree_attention`."""
    by_head = (x.transpose(0, 1) for x in (query, key, value))
    output, _ = _path_op(*by_head, plan.end, scale, window)
    return output.transpose(0, 1)


@library.custom_op("elpo_fast::path_attention", mutates_args=())
def _path_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    end: torch.Tensor,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[heads, N, D]`, `[kv_heads, N, D]` -> `[heads, N, D]`. One operator to a compiler, whatever
    the trees: it knows them by their tensor.

    Returns the kernels' statistics for the backward too, empty where there are none.

    Heads that share a key head are stacked as further query rows of it: `[kv_heads, G n, D]`.
    """
    plan = _plan(end)
    if _has_kernels(query):
        return path_layout.forward(query, key, value, plan, scale, window)
    output = _by_token(query)
    for tile in plan.pieces(TILE, window):
        own = slice(tile.start, tile.stop)
        weights = _probabilities(query, key, tile, scale, window)
        output[:, own] = torch.bmm(weights, _gather(value, tile.path)).view_as(output[:, own])
    return output, query.new_empty(0)


@library.custom_op("elpo_fast::path_attention_backward", mutates_args=())
def _path_backward_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    end: torch.Tensor,
    scale: float,
    window: int | None,
    output: torch.Tensor,
    statistics: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value.

    Probabilities are computed again, so that nothing quadratic is kept.
    """
    plan = _plan(end)
    if _has_kernels(query):
        return path_layout.backward(
            query, key, value, plan, scale, window, output, statistics, grad
        )
    heads, _, size = query.shape
    shared = (key.shape[0], -1, size)
    correction = (grad * output).sum(-1, keepdim=True)
    query_grad = _by_token(query)
    key_grad, value_grad = (_by_token(key).zero_() for _ in range(2))
    for tile in plan.pieces(TILE, window):
        own = slice(tile.start, tile.stop)
        weights = _probabilities(query, key, tile, scale, window)
        above = grad[:, own].reshape(shared)
        part = torch.bmm(weights.transpose(1, 2), above)
        _scatter_add(value_grad, part, tile.path)
        score_grad = torch.bmm(above, _gather(value, tile.path).transpose(1, 2))
        score_grad = score_grad - correction[:, own].reshape(key.shape[0], -1, 1)
        score_grad = weights.mul_(score_grad).mul_(scale)
        query_grad[:, own] = torch.bmm(score_grad, _gather(key, tile.path)).view(heads, -1, size)
        part = torch.bmm(score_grad.transpose(1, 2), query[:, own].reshape(shared))
        _scatter_add(key_grad, part, tile.path)
    return query_grad, key_grad, value_grad


@_path_op.register_fake
def _(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    heads, tokens, _ = query.shape
    if _has_kernels(query):
        return _by_token(query), query.new_empty(2, tokens, heads, dtype=torch.float32)
    return _by_token(query), query.new_empty(0)


@_path_backward_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
    return _by_token(query), _by_token(key), _by_token(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    *tensors, output, statistics = ctx.saved_tensors
    found = torch.ops.elpo_fast.path_attention_backward(
        *tensors, ctx.scale, ctx.window, output, statistics, grad
    )
    return *found, None, None, None


_path_op.register_autograd(_gradients, setup_context=_save)


def _plan(end: torch.Tensor) -> TreePlan:
    """What is derived of these trees, once for all layers of a batch: an operator is given tensors
    alone. The last one is kept, so that its memory is at an address that no other's has."""
    plan = _last[0] if _last else None
    if plan is None or plan.end.data_ptr() != end.data_ptr() or plan.end.shape != end.shape:
        plan = TreePlan(end)
        _last[:] = [plan]
    return plan


def _has_kernels(query: torch.Tensor) -> bool:
    return query.dtype != torch.float64 and query.numel() > 0


def _by_token(like: torch.Tensor) -> torch.Tensor:
    """An empty tensor `[heads, N, D]` with memory order `[N, heads, D]`, as projections have it."""
    heads, tokens, size = like.shape
    return like.new_empty(tokens, heads, size).transpose(0, 1)


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, tile: Chain, scale: float, window: int | None
) -> torch.Tensor:
    """Softmax over a tile's path, `[kv_heads, G n, path]` for `n` queries."""
    keys = _gather(key, tile.path)
    kv_heads, length, size = keys.shape
    rows = tile.stop - tile.start
    stacked = query[:, tile.start : tile.stop].reshape(kv_heads, -1, size)
    scores = torch.bmm(stacked, keys.transpose(1, 2)).mul_(scale)
    # The tile's own tokens are the path's last ones: row i stands at length - rows + i.
    hidden = torch.ones(rows, length, dtype=torch.bool).triu_(length - rows + 1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril_(length - rows - window)
    scores.view(kv_heads, -1, rows, length).masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1)


def _gather(tensor: torch.Tensor, path: list[slice]) -> torch.Tensor:
    return torch.cat([tensor[:, part] for part in path], dim=1)


def _scatter_add(total: torch.Tensor, part: torch.Tensor, path: list[slice]) -> None:
    offset = 0
    for piece in path:
        length = piece.stop - piece.start
        total[:, piece] += part[:, offset : offset + length]
        offset += length
