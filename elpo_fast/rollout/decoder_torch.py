"""The decoder's operations in plain PyTorch, for any device; the definition of `decoder_cpu`."""

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
    seen = torch.arange(paths.shape[1], device=paths.device) <= positions[..., None]
    mean = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys[paths].transpose(1, 2),
        values[paths].transpose(1, 2),
        attn_mask=seen[:, None],
        enable_gqa=True,
    )
    return mean.transpose(1, 2).flatten(2)
