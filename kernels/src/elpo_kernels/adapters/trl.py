"""The fused loss inside TRL's `GRPOTrainer`:

    class Trainer(elpo_kernels.trl.FusedPolicyLoss, trl.GRPOTrainer): ...

The head's products, the loss and its gradients then are one operator inside the model's forward,
so that wrappers (DDP, FSDP2, autocast) see what they expect. Configurations whose loss this
operator does not compute are refused when the trainer is made. Nothing of TRL is imported.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elpo_kernels.adapters.aggregate import token_weights
from elpo_kernels.linear import linear_policy_loss
from elpo_kernels.policy import PolicyLossOutput

Loss = Callable[..., PolicyLossOutput]


class FusedPolicyLoss:
    """Mixin before `GRPOTrainer`: replaces its loss and keeps the names of its metrics."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        _refuse_unsupported(trainer)
        _accept_loss(trainer.model)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        trainer: Any = self
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        attention = torch.cat([inputs["prompt_mask"], mask], 1)
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        shape, flat = ids.shape, (lambda x: None if x is None else x.expand(shape).flatten())
        advantages = inputs["advantages"]
        if advantages.ndim == 1:
            advantages = advantages[:, None]
        training, config = trainer.model.training, trainer.model.config.get_text_config()
        corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        old = inputs.get("old_per_token_logps")
        out = model(
            input_ids=torch.cat([inputs["prompt_ids"], ids], 1),
            attention_mask=attention,
            policy_loss=lambda hidden, weight, bias: linear_policy_loss(
                hidden[:, -shape[1] - 1 : -1].flatten(0, 1),
                weight,
                ids.flatten(),
                flat(old),
                eps_low=trainer.epsilon_low,
                eps_high=trainer.epsilon_high,
                advantages=flat(advantages),
                weights=self._token_weights(mask, inputs, training).flatten(),
                is_weight=flat(inputs["importance_sampling_ratio"]) if corrected else None,
                ratio_cap=math.inf if trainer.args.delta is None else trainer.args.delta,
                bias=bias,
                softcap=getattr(config, "final_logit_softcapping", None),
                temperature=trainer.temperature,
                return_entropy=True,
                logprob_for_all=True,
            ),
        )
        logprob = out.logprob.view(shape)
        ratio = torch.exp(logprob - (logprob if old is None else old))
        low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + trainer.epsilon_high) & (advantages > 0)
        self._log_shares(mask, low, high, out.entropy.view(shape), training)
        return out.loss

    def _token_weights(self, mask: Tensor, inputs: dict[str, Any], training: bool) -> Tensor:
        trainer: Any = self
        accumulated = trainer.current_gradient_accumulation_steps if training else 1.0
        items = inputs["num_items_in_batch"] if trainer.loss_type == "dapo" else None
        if items is not None and training:
            # It spans the generation batch; the window of one optimizer step is a part of that.
            items, accumulated = items * accumulated / trainer.args.steps_per_generation, 1.0
        weights = token_weights(
            mask,
            trainer.loss_type,
            max_completion_length=trainer.max_completion_length,
            num_items_in_batch=items,
        )
        return weights / accumulated

    def _log_shares(
        self, mask: Tensor, low: Tensor, high: Tensor, entropy: Tensor, training: bool
    ) -> None:
        """The metrics of the loss that is replaced, under its names."""
        trainer: Any = self
        metrics = trainer._metrics["train" if training else "eval"]
        tokens = mask.sum(1).clamp_min(1)

        def mean(values: Tensor) -> float:
            totals = torch.stack([(values * mask).sum().float(), mask.sum().float()])
            total, count = trainer.accelerator.reduce(totals, reduction="sum")
            return float(total / count.clamp_min(1))

        metrics["entropy"].append(mean(entropy))
        metrics["clip_ratio/low_mean"].append(mean(low.float()))
        metrics["clip_ratio/high_mean"].append(mean(high.float()))
        metrics["clip_ratio/region_mean"].append(mean((low | high).float()))
        lowest = trainer.accelerator.gather((low * mask).sum(1) / tokens).min()
        highest = trainer.accelerator.gather((high * mask).sum(1) / tokens).max()
        metrics["clip_ratio/low_min"].append(float(lowest))
        metrics["clip_ratio/high_max"].append(float(highest))


def _refuse_unsupported(trainer: Any) -> None:
    config = trainer.model.config.get_text_config()
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
            if (value := getattr(config, name, None)) is not None
        ),
        1.0,
    )
    wrong = {
        "loss_type": trainer.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo"),
        "beta": trainer.beta != 0,
        "importance_sampling_level": trainer.importance_sampling_level != "token",
        "top_entropy_quantile": trainer.top_entropy_quantile < 1,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "entropy_coef": trainer._entropy_bonus_enabled,
        "cast_lm_head_to_fp32": trainer.args.cast_lm_head_to_fp32,
        "router_aux_loss_coef": trainer.aux_loss_enabled,
        "the model's logit scale": scale != 1,
        "an adapted head": not isinstance(trainer.model.get_output_embeddings(), nn.Linear),
        "use_liger_kernel": trainer.args.use_liger_kernel,
    }
    named = [name for name, is_wrong in wrong.items() if is_wrong]
    if named:
        raise ValueError(
            f"FusedPolicyLoss does not support {', '.join(named)} as configured; "
            "use GRPOTrainer without it or change these settings"
        )


def _accept_loss(model: Any) -> None:
    """Teach the forward `policy_loss=f`: it then returns f(hidden, head weight, head bias)."""
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(self: Any, *args: Any, policy_loss: Loss | None = None, **kwargs: Any) -> Any:
        if policy_loss is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        head = self.get_output_embeddings()
        return policy_loss(hidden, head.weight, head.bias)

    model.forward = types.MethodType(forward, model)
