"""Tree attention by PyTorch's own, with a dense mask a tree: the reference, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elpo_kernels.attention.blocks import NO_WINDOW
from elpo_kernels.attention.plan import TreePlan


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float, window: int | None
) -> Tensor:
    """Memory grows with the largest tree. Arguments and result as of `tree_attention`."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, dim=0) for x in (key, value))
    outputs = [
        F.scaled_dot_product_attention(
            query[None, :, start:stop],
            key[None, :, start:stop],
            value[None, :, start:stop],
            attn_mask=plan.allowed(window or NO_WINDOW, start, stop),
            scale=scale,
        )[0]
        for start, stop in plan.spans
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1) if outputs else query.transpose(0, 1)
