"""The decoder's operations in plain PyTorch, for any device; they define the CPU's kernels."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def add_norm(
    residual: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`residual += delta` in place, then its RMS norm times `weight`; all `[Q, H]`."""
    residual += delta
    return F.rms_norm(residual, weight.shape, weight, eps).to(dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `gate_up` `[Q, 2 I]`."""
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `x` `[Q, heads, D]` by `cos` and `sin` `[Q, D / 2]`."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    paths: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Attention of `queries` `[B, q, heads, D]` over the slots `paths` `[B, L]`.

    A query at position p sees the first p + 1 slots of its path; `positions` `[B, q]`, `keys` and
    `values` `[S, kv_heads, D]`. Returns `[B, q, heads * D]`.
    """
    # The query heads of a key head become queries of it. Told of grouped heads, PyTorch 2.13 leaves
    # its memory-efficient kernel out and, where cuDNN cannot serve, repeats keys and values.
    grouped = queries.unflatten(2, (keys.shape[1], -1))
    groups = grouped.shape[3]
    positions = positions.repeat(1, groups)
    seen = torch.arange(paths.shape[1], device=paths.device) <= positions[..., None]
    mean = F.scaled_dot_product_attention(
        grouped.permute(0, 2, 3, 1, 4).flatten(2, 3),
        keys[paths].transpose(1, 2),
        values[paths].transpose(1, 2),
        attn_mask=seen[:, None],
    )
    return mean.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(2)
