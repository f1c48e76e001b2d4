"""Tree attention, registered with transformers as `elpo_sdpa`.

Several trees lie end to end on one row of tokens in preorder. A query sees its ancestors and
itself, which in preorder is one comparison per pair,

    allowed(q, k) = k <= q < end[k],

with `end[k]` the first position after the subtree of `k`'s node. Two backends compute it, equal up
to rounding. On accelerators each tree goes through SDPA with that mask, so that memory grows with
the largest tree, not with the row. On CPUs `path_attention` computes allowed pairs only: a tree of
`L` leaves is `L` runs of consecutive path tokens, and what a run sees besides itself is a few
slices of earlier tokens. Scores are float32 whatever the dtype; memory is linear in the row.

The trees reach the attention through the keyword argument `tree`, which transformers passes down to
every layer. Without it the model behaves as under transformers' own `sdpa`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

ATTENTION = "elpo_sdpa"
TILE = 128  # queries at once: its scores should stay in cache


class Tile(NamedTuple):
    """Queries `start:stop` of one run, and the slices that make up their path up to `stop`."""

    start: int
    stop: int
    path: list[slice]


class TreeMask:
    """The ancestor relation of packed trees: `position` and `end` are integer `[N]`."""

    def __init__(self, position: torch.Tensor, end: torch.Tensor) -> None:
        self.position = position
        self.end = end
        self._dense: dict[int, torch.Tensor] = {}

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Half-open ranges that see nothing of each other: the trees, in order.

        A root's first token spans its whole tree; a tree whose root has no tokens falls into its
        first steps, which do not see each other either.
        """
        ends = self.end.tolist()
        spans, start = [], 0
        while start < len(ends):
            spans.append((start, ends[start]))
            start = ends[start]
        return spans

    @cached_property
    def tiles(self) -> list[Tile]:
        """All queries, in order; token `t` goes on with the path of `t - 1` if `t < end[t - 1]`."""
        end = self.end.cpu().numpy()
        index = np.arange(len(end))
        tiles = []
        for tree_start, tree_stop in self.spans:
            inner = index[tree_start + 1 : tree_stop]
            starts = [tree_start, *inner[end[inner - 1] == inner].tolist()]
            for start, stop in zip(starts, [*starts[1:], tree_stop], strict=True):
                above = tree_start + np.flatnonzero(end[tree_start:start] > start)
                breaks = np.flatnonzero(np.diff(above) != 1) + 1
                path = [slice(int(p[0]), int(p[-1]) + 1) for p in np.split(above, breaks) if len(p)]
                for first in range(start, stop, TILE):
                    last = min(first + TILE, stop)
                    tiles.append(Tile(first, last, [*path, slice(start, last)]))
        return tiles

    @cached_property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return int(self.position.max()) + 1 if len(self.position) else 0

    def dense(self, start: int, stop: int) -> torch.Tensor:
        """`allowed` of one span, bool `[stop - start, stop - start]`; kept for the next layer."""
        if start not in self._dense:
            index = torch.arange(start, stop, device=self.end.device)
            below = index[:, None] < self.end[start:stop]
            self._dense[start] = (index <= index[:, None]) & below
        return self._dense[start]


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
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
    if sliding_window is not None and sliding_window < tree.depth:
        raise ValueError(
            f"tree attention has no sliding window, and a path of {tree.depth} tokens exceeds the "
            f"model's window of {sliding_window}; lower rollout.max_tokens"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    backend = path_attention if query.device.type == "cpu" else masked_attention
    return backend(query[0], key[0], value[0], tree, scale).transpose(0, 1)[None], None


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: TreeMask, scale: float
) -> torch.Tensor:
    """SDPA with a dense mask per tree; `[heads, N, D]`, `[kv_heads, N, D]` -> `[heads, N, D]`."""
    groups = query.shape[0] // key.shape[0]
    key = key.repeat_interleave(groups, dim=0)
    value = value.repeat_interleave(groups, dim=0)
    outputs = [
        F.scaled_dot_product_attention(
            query[None, :, start:stop],
            key[None, :, start:stop],
            value[None, :, start:stop],
            attn_mask=tree.dense(start, stop),
            scale=scale,
        )[0]
        for start, stop in tree.spans
    ]
    return torch.cat(outputs, dim=1)


def path_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: TreeMask, scale: float
) -> torch.Tensor:
    """Attention along paths only; `[heads, N, D]`, `[kv_heads, N, D]` -> `[heads, N, D]`."""
    return _PathAttention.apply(query, key, value, tree.tiles, scale)


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
        tiles: list[Tile],
        scale: float,
    ) -> torch.Tensor:
        wide_query, wide_key, future = _widened(query, key, scale)
        # Memory order [N, heads, D] is what the output projection reads.
        output = query.new_empty(query.shape[1], query.shape[0], query.shape[2]).transpose(0, 1)
        for tile in tiles:
            own = slice(tile.start, tile.stop)
            weights = _probabilities(wide_query, wide_key, tile, future).to(query.dtype)
            output[:, own] = torch.bmm(weights, _gather(value, tile.path)).view_as(output[:, own])
        ctx.save_for_backward(query, key, value, output)
        ctx.tiles, ctx.scale = tiles, scale
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
            weights = _probabilities(wide_query, wide_key, tile, future)
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
        return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype), None, None


def _widened(
    query: torch.Tensor, key: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled queries and keys in at least float32; -inf above the diagonal of a tile."""
    wide = torch.promote_types(query.dtype, torch.float32)
    future = torch.full((TILE, TILE), float("-inf"), dtype=wide).triu_(1)
    return query.to(wide) * scale, key.to(wide), future


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, tile: Tile, future: torch.Tensor
) -> torch.Tensor:
    """Softmax over a tile's path, `[kv_heads, G n, path]` for `n` queries."""
    keys = _gather(key, tile.path)
    kv_heads, length, size = keys.shape
    rows = tile.stop - tile.start
    stacked = query[:, tile.start : tile.stop].reshape(kv_heads, -1, size)
    scores = torch.bmm(stacked, keys.transpose(1, 2))
    # The tile's own tokens are the path's last ones; only among them is there a future to hide.
    scores.view(kv_heads, -1, rows, length)[..., length - rows :] += future[:rows, :rows]
    return torch.softmax(scores, dim=-1)


def _gather(tensor: torch.Tensor, path: list[slice]) -> torch.Tensor:
    return torch.cat([tensor[:, part] for part in path], dim=1)


def _scatter_add(total: torch.Tensor, part: torch.Tensor, path: list[slice]) -> None:
    offset = 0
    for piece in path:
        length = piece.stop - piece.start
        total[:, piece] += part[:, offset : offset + length]
        offset += length


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
