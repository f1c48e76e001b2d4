"""What the kernels compute, written plainly: the whole `[T, V]` matrix, autograd for the rest.

For tests and benchmarks. In float64 it is the truth the kernels are judged by; in the dtype of the
inputs it is what eager PyTorch makes of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elpo_kernels.policy import LOG_RATIO_LIMIT


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy `[T]`; products in the dtype of `hidden`, the rest at least float32."""
    logits = hidden @ weight.t()
    if logits.dtype != torch.float64:
        logits = logits.float()
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    logprobs = torch.log_softmax(logits / temperature, -1)
    valid = targets != ignore_index
    chosen = logprobs.gather(1, torch.where(valid, targets, 0)[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.where(valid, chosen, 0), torch.where(valid, entropy, 0)


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    pos_coef: Tensor,
    neg_coef: Tensor,
    eps_low: float | Tensor,
    eps_high: float | Tensor,
    ratio_cap: float = math.inf,
) -> Tensor:
    """−Σ c⁺·min(ρ, clip ρ) + c⁻·max(ρ, clip ρ) over the tokens with a coefficient."""
    live = (pos_coef != 0) | (neg_coef != 0)
    old = logprob.detach() if old_logprob is None else old_logprob
    log_ratio = torch.where(live, logprob - torch.where(live, old, 0), 0)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = torch.minimum(
        torch.maximum(ratio, 1 - _like(eps_low, ratio)), 1 + _like(eps_high, ratio)
    )
    upper = torch.maximum(ratio, clipped).clamp_max(ratio_cap)
    gain = pos_coef * torch.minimum(ratio, clipped) + neg_coef * upper
    return -torch.where(live, gain, 0).sum()


def _like(value: float | Tensor, other: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=other.dtype, device=other.device)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scale: float,
) -> Tensor:
    """Softmax over the `allowed [T, T]` keys; `[T, Hq, D]`, 0 where there is none."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("hqk,khd->qhd", weights, values)
