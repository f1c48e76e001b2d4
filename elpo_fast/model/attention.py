"""Tree attention, registered with transformers as `elpo_sdpa`.

Several trees lie end to end on one row of tokens in preorder. A query sees its ancestors and
itself, which in preorder is one comparison per pair,

    allowed(q, k) = k <= q < end[k],

with `end[k]` the first position after the subtree of `k`'s node. Two trees never see each other, so
each is attended to on its own: the memory is that of the largest tree, not of the whole row.

The trees reach the attention through the keyword argument `tree`, which transformers passes down to
every layer. Without it the model behaves as under transformers' own `sdpa`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

ATTENTION = "elpo_sdpa"


class TreeMask:
    """The ancestor relation of packed trees: `position` and `end` are integer `[N]`."""

    def __init__(self, position: torch.Tensor, end: torch.Tensor) -> None:
        self.position = position
        self.end = end
        self._dense: dict[tuple[int, int | None], torch.Tensor] = {}

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
    def depth(self) -> int:
        """Tokens on the longest path."""
        return int(self.position.max()) + 1 if len(self.position) else 0

    def dense(self, start: int, stop: int, window: int | None) -> torch.Tensor:
        """`allowed` of one span, bool `[stop - start, stop - start]`; kept for the next layer."""
        if window is not None and window >= self.depth:
            window = None
        mask = self._dense.get((start, window))
        if mask is None:
            index = torch.arange(start, stop, device=self.end.device)
            mask = (index <= index[:, None]) & (index[:, None] < self.end[start:stop])
            if window is not None:
                position = self.position[start:stop]
                mask &= position[:, None] - position < window
            self._dense[start, window] = mask
        return mask


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
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for start, stop in tree.spans:
        part = slice(start, stop)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, part],
                key[:, :, part].repeat_interleave(groups, dim=1),
                value[:, :, part].repeat_interleave(groups, dim=1),
                attn_mask=tree.dense(start, stop, sliding_window),
                scale=scaling,
            ).transpose(1, 2)
        )
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
