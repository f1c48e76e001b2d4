"""A policy loss with the signature that verl registers:

    from verl.trainer.ppo.core_algos import register_policy_loss
    register_policy_loss("elpo_kernels")(elpo_kernels.verl.policy_loss)

Value, gradient and metrics are those of verl's `vanilla` loss, dual clip included. Nothing of verl
is imported: the configuration is read by attribute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elpo_kernels.policy import policy_loss as elementwise_loss

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Loss and metrics; the tensors are `[B, T]`, `config` is verl's actor configuration."""
    if config is None:
        raise ValueError("verl's actor configuration is needed: its clip_ratio has no default")
    low, high = (
        config.clip_ratio if value is None else value
        for value in (config.clip_ratio_low, config.clip_ratio_high)
    )
    cap = config.get("clip_ratio_c", 3.0)
    weights = _token_weights(response_mask, loss_agg_mode, **config.global_batch_info)
    is_weight = rollout_is_weights
    out = elementwise_loss(
        log_prob.flatten().float(),
        old_log_prob.flatten().float(),
        advantages=advantages.flatten(),
        weights=weights.flatten(),
        is_weight=None if is_weight is None else is_weight.expand_as(advantages).flatten(),
        eps_low=low,
        eps_high=high,
        ratio_cap=cap,
    )
    mask = response_mask.bool()
    count = mask.sum().clamp_min(1)
    kl = torch.where(mask, (old_log_prob - log_prob.detach()).clamp(-20, 20), 0).sum() / count
    share = out.stats.tokens / count  # a token of advantage 0 is never clipped
    clipped = (out.stats.clipped_low + out.stats.clipped_high) * share
    return out.loss, {
        "actor/pg_clipfrac": clipped.item(),
        "actor/ppo_kl": kl.item(),
        "actor/pg_clipfrac_lower": (out.stats.capped * share).item(),
    }


def _token_weights(
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> Tensor:
    """Weights `[B, T]` that make the sum what verl's `agg_loss` makes of the losses."""
    mask = mask.float()
    if mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode {mode!r} is unknown; choose one of {AGGREGATIONS}")
    lengths = mask.sum(1, keepdim=True)
    per_token = mode == "token-mean"
    divisor = batch_num_tokens if per_token else global_batch_size
    if divisor is None:
        if dp_size > 1:
            name = "batch_num_tokens" if per_token else "global_batch_size"
            raise ValueError(f"{name} is needed in config.global_batch_info when dp_size > 1")
        divisor = lengths.sum() if per_token else (lengths > 0).sum()
    weights = mask * (dp_size / divisor)
    if mode == "seq-mean-token-mean":
        weights = weights / (lengths + 1e-8)
    elif mode == "seq-mean-token-sum-norm":
        weights = weights / (loss_scale_factor or mask.shape[1])
    return weights
