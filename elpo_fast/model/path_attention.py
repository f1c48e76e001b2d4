"""Tree attention on CPUs: allowed pairs only, whatever lies between them in the row.

A tree of `L` leaves is `L` runs of consecutive path tokens, and what a run sees besides itself is a
few slices of earlier tokens. Scores are float32 whatever the dtype; memory is linear in the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import library

from elpo_fast.model.tree_mask import Run, TreeMask

TILE = 256  # queries at once: its scores should stay in cache


def path_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreeMask,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """`[heads, N, D]`, `[kv_heads, N, D]` -> `[heads, N, D]`."""
    return _path_op(query, key, value, tree.end, tree.position, scale, window)


@library.custom_op("elpo_fast::path_attention", mutates_args=())
def _path_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    end: torch.Tensor,
    position: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """One operator to a compiler, whatever the trees: it knows them by their tensors.

    Heads that share a key head are stacked as further query rows of it: `[kv_heads, G n, D]`.
    """
    wide_query, wide_key, future = _widened(query, key, scale)
    output = _by_token(query)
    for tile in TreeMask.of(end, position).pieces(TILE, window):
        own = slice(tile.start, tile.stop)
        weights = _probabilities(wide_query, wide_key, tile, future, window).to(query.dtype)
        output[:, own] = torch.bmm(weights, _gather(value, tile.path)).view_as(output[:, own])
    return output


@library.custom_op("elpo_fast::path_attention_backward", mutates_args=())
def _path_backward_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    end: torch.Tensor,
    position: torch.Tensor,
    scale: float,
    window: int | None,
    output: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value.

    Probabilities are computed again, from float32 scores as in the forward, so that nothing
    quadratic is kept. What many tiles add to, the gradients of keys and values, is float32.
    """
    heads, _, size = query.shape
    shared = (key.shape[0], -1, size)
    wide_query, wide_key, future = _widened(query, key, scale)
    scaled_query = wide_query.to(query.dtype)
    correction = (grad * output).to(wide_query.dtype).sum(-1, keepdim=True)
    query_grad = _by_token(query)
    key_grad, value_grad = (_by_token(wide_key).zero_() for _ in range(2))
    for tile in TreeMask.of(end, position).pieces(TILE, window):
        own = slice(tile.start, tile.stop)
        weights = _probabilities(wide_query, wide_key, tile, future, window)
        above = grad[:, own].reshape(shared)
        part = torch.bmm(weights.to(query.dtype).transpose(1, 2), above)
        _scatter_add(value_grad, part, tile.path)
        score_grad = torch.bmm(above, _gather(value, tile.path).transpose(1, 2))
        score_grad = score_grad - correction[:, own].reshape(key.shape[0], -1, 1)
        score_grad = weights.mul_(score_grad).to(query.dtype)
        part = torch.bmm(score_grad, _gather(key, tile.path)).view(heads, -1, size)
        query_grad[:, own] = part * scale
        part = torch.bmm(score_grad.transpose(1, 2), scaled_query[:, own].reshape(shared))
        _scatter_add(key_grad, part, tile.path)
    return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype)


@_path_op.register_fake
def _(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _by_token(query)


@_path_backward_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
    return _by_token(query), _by_token(key), _by_token(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, output)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    *tensors, output = ctx.saved_tensors
    found = torch.ops.elpo_fast.path_attention_backward(
        *tensors, ctx.scale, ctx.window, output, grad
    )
    return *found, None, None, None, None


_path_op.register_autograd(_gradients, setup_context=_save)


def _by_token(like: torch.Tensor) -> torch.Tensor:
    """An empty tensor `[heads, N, D]` with memory order `[N, heads, D]`, as projections have it."""
    heads, tokens, size = like.shape
    return like.new_empty(tokens, heads, size).transpose(0, 1)


def _widened(
    query: torch.Tensor, key: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled queries and keys in at least float32; -inf above the diagonal of a tile."""
    wide = torch.promote_types(query.dtype, torch.float32)
    future = torch.full((TILE, TILE), float("-inf"), dtype=wide).triu_(1)
    return query.to(wide) * scale, key.to(wide), future


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, tile: Run, future: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Softmax over a tile's path, `[kv_heads, G n, path]` for `n` queries."""
    keys = _gather(key, tile.path)
    kv_heads, length, size = keys.shape
    rows = tile.stop - tile.start
    stacked = query[:, tile.start : tile.stop].reshape(kv_heads, -1, size)
    scores = torch.bmm(stacked, keys.transpose(1, 2))
    # The tile's own tokens are the path's last ones; only among them is there a future to hide.
    by_row = scores.view(kv_heads, -1, rows, length)
    by_row[..., length - rows :] += future[:rows, :rows]
    if window is not None and length > window:
        # Row i stands at length - rows + i; its first columns, if any, are out of reach.
        past = torch.full((rows, length), -torch.inf, dtype=scores.dtype)
        by_row += past.tril_(length - rows - window)
    return torch.softmax(scores, dim=-1)


def _gather(tensor: torch.Tensor, path: list[slice]) -> torch.Tensor:
    return torch.cat([tensor[:, part] for part in path], dim=1)


def _scatter_add(total: torch.Tensor, part: torch.Tensor, path: list[slice]) -> None:
    offset = 0
    for piece in path:
        length = piece.stop - piece.start
        total[:, piece] += part[:, offset : offset + length]
        offset += length
