"""Tree attention on CPUs: allowed pairs only, whatever lies between them in the row.

A tree of `L` leaves is `L` runs of consecutive path tokens, and what a run sees besides itself is a
few slices of earlier tokens. Scores are float32 whatever the dtype; memory is linear in the row.
"""

from __future__ import annotations

from typing import Any

import torch

from elpo_fast.model.tree_mask import Run, TreeMask

TILE = 128  # queries at once: its scores should stay in cache


def path_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreeMask,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """`[heads, N, D]`, `[kv_heads, N, D]` -> `[heads, N, D]`."""
    return _PathAttention.apply(query, key, value, tree.pieces(TILE, window), scale, window)


class _PathAttention(torch.autograd.Function):
    """Heads that share a key head are stacked as further query rows of it: `[kv_heads, G n, D]`.

    The backward computes the probabilities again, from float32 scores as the forward did, so that
    nothing quadratic is kept. Gradients of keys and values, to which many tiles add, are summed in
    float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tiles: list[Run],
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        wide_query, wide_key, future = _widened(query, key, scale)
        # Memory order [N, heads, D] is what the output projection reads.
        output = query.new_empty(query.shape[1], query.shape[0], query.shape[2]).transpose(0, 1)
        for tile in tiles:
            own = slice(tile.start, tile.stop)
            weights = _probabilities(wide_query, wide_key, tile, future, window).to(query.dtype)
            output[:, own] = torch.bmm(weights, _gather(value, tile.path)).view_as(output[:, own])
        ctx.save_for_backward(query, key, value, output)
        ctx.tiles, ctx.scale, ctx.window = tiles, scale, window
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        query, key, value, output = ctx.saved_tensors
        heads, _, size = query.shape
        shared = (key.shape[0], -1, size)
        wide_query, wide_key, future = _widened(query, key, ctx.scale)
        scaled_query = wide_query.to(query.dtype)
        correction = (grad * output).to(wide_query.dtype).sum(-1, keepdim=True)
        query_grad = torch.empty_like(output)
        key_grad, value_grad = torch.zeros_like(wide_key), torch.zeros_like(wide_key)
        for tile in ctx.tiles:
            own = slice(tile.start, tile.stop)
            weights = _probabilities(wide_query, wide_key, tile, future, ctx.window)
            above = grad[:, own].reshape(shared)
            part = torch.bmm(weights.to(query.dtype).transpose(1, 2), above)
            _scatter_add(value_grad, part, tile.path)
            score_grad = torch.bmm(above, _gather(value, tile.path).transpose(1, 2))
            score_grad = score_grad - correction[:, own].reshape(key.shape[0], -1, 1)
            score_grad = weights.mul_(score_grad).to(query.dtype)
            part = torch.bmm(score_grad, _gather(key, tile.path)).view(heads, -1, size)
            query_grad[:, own] = part * ctx.scale
            part = torch.bmm(score_grad.transpose(1, 2), scaled_query[:, own].reshape(shared))
            _scatter_add(key_grad, part, tile.path)
        return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype), None, None, None


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
