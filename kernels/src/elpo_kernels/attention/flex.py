"""Tree attention by PyTorch's FlexAttention.

The block mask is made from extremes of `end` and `position` over blocks (`TreePlan.lists`),
never from an `N x N` mask. On CUDA the kernel is compiled, and what cannot be raises: eager
FlexAttention has dense scores. On CPUs it runs so, without a backward, which suffices for tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from elpo_kernels.attention.plan import TreePlan

BLOCK = 128
COMPILATIONS = 64
"""Dynamo's limit for FlexAttention; its own is 8. One model takes up to 10: with and without a
window, one block and more, with gradients and without, and those of its check in float32."""


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    scale: float,
    window: int | None = None,
    *,
    dynamic: bool = True,
) -> Tensor:
    """Compiled once for any number of tokens, or else for each: then a multiple of 128 needs no
    checks of bounds. Arguments and result as of `tree_attention`."""
    attend = flex.flex_attention if query.device.type == "cpu" else _compiled(dynamic)
    mask = plan.kept(("flex", window), lambda: block_mask(plan, window))
    by_head = (x.transpose(0, 1)[None] for x in (query, key, value))
    output: Tensor = attend(*by_head, None, mask, scale, enable_gqa=True)
    return output[0].transpose(0, 1)


def block_mask(plan: TreePlan, window: int | None) -> BlockMask:
    """Blocks to visit, and the exact mask within those that are not wholly visible."""
    end = plan.end
    position = plan.end if window is None else plan.windowed()

    def allowed(batch: Any, head: Any, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < end[k])
        return seen if window is None else seen & (position[q] - position[k] < window)

    blocks, counts, _ = plan.lists(BLOCK, BLOCK, window or 0, by_column=False)
    partial, full = counts.unbind(1)
    # The full blocks follow the partial ones in each row: turn them to the front.
    columns = torch.arange(blocks.shape[1], device=blocks.device)
    turned = blocks.gather(1, (columns + partial[:, None]) % blocks.shape[1])
    return BlockMask.from_kv_blocks(
        partial[None, None],
        blocks[None, None],
        full[None, None],
        turned[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=allowed,
        seq_lengths=(len(end), len(end)),
    )


@cache
def _compiled(dynamic: bool) -> Any:
    # Without `fullgraph`, whatever is beyond Dynamo's limit runs eagerly.
    compiled = torch.compile(flex.flex_attention, dynamic=dynamic, fullgraph=True)

    def attend(*arguments: Any, **options: Any) -> Any:
        # For each call: some releases keep settings by thread, and recomputation has its own.
        with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
            return compiled(*arguments, **options)

    return attend
