"""`LinearPolicyLoss`: the fused loss under the calling convention of Liger's chunked GRPO loss."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from elpo_kernels.adapters.aggregate import LOSS_TYPES, token_weights
from elpo_kernels.checks import Number
from elpo_kernels.linear import linear_policy_loss
from elpo_kernels.policy import PolicyStats


class LinearPolicyLoss(nn.Module):
    """Loss of a padded batch; beside Liger's arguments, clip bounds and advantages may be given for
    each token. `stats` holds the statistics of the last call.

    There is no KL term: a reference log-prob is refused rather than ignored.
    """

    stats: PolicyStats | None = None

    def __init__(
        self,
        *,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        temperature: float = 1.0,
        delta: float | None = None,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if loss_type not in LOSS_TYPES:
            known = ", ".join(LOSS_TYPES)
            raise ValueError(f"loss_type {loss_type!r} is unknown; choose one of {known}")
        self.epsilon_low, self.epsilon_high = epsilon_low, epsilon_high
        self.loss_type, self.max_completion_length = loss_type, max_completion_length
        self.head: dict[str, Any] = {
            "temperature": temperature,
            "ratio_cap": math.inf if delta is None else delta,
            "softcap": softcap,
            "backend": backend,
        }

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        *,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        eps_low: Number | None = None,
        eps_high: Number | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss and, as Liger returns it, a list with the clipped share of the tokens.

        `_input` `[B, T, H]`, `lin_weight` `[V, H]`, `selected_token_ids` and `attention_mask`
        `[B, T]`, `advantages` `[B]` or `[B, T]`, the others `[B, T]`, or `[B, 1]` for
        `vllm_is_ratio`.
        """
        if ref_per_token_logps is not None:
            raise ValueError("LinearPolicyLoss has no KL term; pass ref_per_token_logps=None")
        shape = selected_token_ids.shape
        weights = token_weights(
            attention_mask,
            self.loss_type,
            max_completion_length=self.max_completion_length,
            num_items_in_batch=num_items_in_batch,
        )
        if advantages.ndim == 1:
            advantages = advantages[:, None]
        low = self.epsilon_low if eps_low is None else eps_low
        high = self.epsilon_high if eps_high is None else eps_high
        out = linear_policy_loss(
            _input.flatten(0, 1),
            lin_weight,
            selected_token_ids.flatten(),
            None if old_per_token_logps is None else old_per_token_logps.flatten(),
            eps_low=low.flatten() if isinstance(low, Tensor) else low,
            eps_high=high.flatten() if isinstance(high, Tensor) else high,
            advantages=advantages.expand(shape).flatten(),
            weights=weights.flatten(),
            is_weight=None if vllm_is_ratio is None else vllm_is_ratio.expand(shape).flatten(),
            bias=bias,
            **self.head,
        )
        self.stats = out.stats
        clipped = (out.stats.clipped_low + out.stats.clipped_high) * out.stats.tokens
        return out.loss, [clipped / attention_mask.sum().clamp_min(1)]
