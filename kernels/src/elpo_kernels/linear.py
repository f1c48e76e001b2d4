"""Public functions on hidden states and head: the log-prob primitive and the fused policy loss.

Each is one `torch.library` operator with a fake, so that `torch.compile` traces the caller without
a graph break, and so that autograd, autocast and checkpointing see a single step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from elpo_kernels._backend import resolve_backend
from elpo_kernels._head import accumulation
from elpo_kernels._ops import linear_logprob_op, linear_policy_op, with_gradients_op
from elpo_kernels.policy import (
    Number,
    PolicyLossOutput,
    PolicyStats,
    bound,
    check_per_token,
    coefficients,
    policy_loss,
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of `targets` `[T]` under softmax(hidden · weightᵀ), without `[T, V]` in memory.

    `hidden` `[T, H]`, `weight` `[V, H]`, `bias` `[V]`, `temperature` a number or `[T]`; logits are
    soft-capped, cap · tanh(l / cap), before the temperature divides them. Returns float32 `[T]` in
    nats (float64 for float64 inputs), with `return_entropy` also the entropy of every token's
    distribution, both differentiable with respect to hidden, weight and bias. Tokens whose target
    is `ignore_index` give 0 and no gradient. Matrix products run in the dtype of `hidden`; the
    backward computes the logits once more.

    Raises `ValueError` for shapes, dtypes, devices or targets that do not fit.
    """
    hidden, bias = _inputs(hidden, weight, targets, bias)
    scalar, per_token = _temperature(temperature, hidden)
    logprob, entropy = linear_logprob_op(
        [hidden],
        [weight],
        bias,
        per_token,
        targets,
        scalar,
        _softcap(softcap),
        0,
        "",
        ignore_index,
        resolve_backend(backend, hidden.device),
        return_entropy,
    )
    return (logprob, entropy) if return_entropy else logprob


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor | None,
    pos_coef: Tensor | None = None,
    neg_coef: Tensor | None = None,
    eps_low: Number = 0.2,
    eps_high: Number = 0.2,
    *,
    advantages: Tensor | None = None,
    weights: Tensor | None = None,
    is_weight: Tensor | None = None,
    entropy_coef: Number = 0.0,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    logprob_for_all: bool = False,
    ignore_index: int = -100,
    backend: str = "auto",
) -> PolicyLossOutput:
    """The clipped policy loss of `policy.py`, summed over tokens, gradients made in one pass.

    `hidden` `[T, H]`, `weight` `[V, H]`; `targets`, `old_logprob`, `pos_coef`, `neg_coef` `[T]`;
    `eps_low`, `eps_high` numbers or `[T]`. `old_logprob=None` stands for the current policy (ratio
    1, gradient of the plain policy gradient). Instead of the coefficient pair, `advantages` and
    optionally `weights` `[T]` may be given. `is_weight` `[T]` multiplies the coefficients
    (truncated importance sampling). `entropy_coef` (number or `[T]`) subtracts
    Σ entropy_coef · entropy.
    The coefficients carry all weights: nothing is divided by a number of tokens.

    Tokens without coefficient are never computed: their `logprob` and `entropy` are 0 unless
    `logprob_for_all`; what their `old_logprob` holds is of no account. `logprob`, `entropy` and
    `stats` are detached; use `linear_logprob` to differentiate through them.

    Raises `ValueError` for shapes, dtypes, devices, signs or targets that do not fit.
    """
    hidden, bias = _inputs(hidden, weight, targets, bias)
    scalar, per_token = _temperature(temperature, hidden)
    pos, neg = coefficients(pos_coef, neg_coef, advantages, weights, is_weight)
    entropy_weight = _entropy_coef(entropy_coef, hidden)
    for name, values in (("old_logprob", old_logprob), ("pos_coef", pos), ("neg_coef", neg)):
        check_per_token(name, values, hidden)
    low, high = bound("eps_low", eps_low, hidden), bound("eps_high", eps_high, hidden)
    if softcap is not None and entropy_weight is not None:
        # The kept powers carry the soft cap's derivative and no longer tell the entropy's.
        valid = targets != ignore_index
        pos, neg = torch.where(valid, pos, 0), torch.where(valid, neg, 0)
        live = (pos != 0) | (neg != 0) | (entropy_weight != 0)
        values, spread = linear_logprob(
            hidden,
            weight,
            targets if logprob_for_all else torch.where(live, targets, ignore_index),
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            return_entropy=True,
            ignore_index=ignore_index,
            backend=backend,
        )
        composed = policy_loss(
            values, old_logprob, pos, neg, low, high, entropy=spread, entropy_coef=entropy_weight
        )
        return composed if return_entropy else composed._replace(entropy=None)
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    loss, logprob, entropy, stats, gradients = linear_policy_op(
        [hidden.detach()],
        [weight.detach()],
        None if bias is None else bias.detach(),
        per_token,
        targets,
        None if old_logprob is None else old_logprob.detach(),
        pos,
        neg,
        low,
        high,
        entropy_weight,
        None,
        scalar,
        _softcap(softcap),
        0,
        "",
        ignore_index,
        resolve_backend(backend, hidden.device),
        return_entropy,
        logprob_for_all,
        needs,
    )
    loss = _attached(loss, needs, (hidden, weight, bias), gradients)
    return PolicyLossOutput(
        loss, logprob, entropy if return_entropy else None, PolicyStats(*stats.unbind())
    )


def _attached(
    loss: Tensor,
    needs: Sequence[bool],
    tensors: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
) -> Tensor:
    """The loss as a function of those `tensors` that need a gradient."""
    chosen = [
        (tensor, gradient)
        for need, tensor, gradient in zip(needs, tensors, gradients, strict=True)
        if need and tensor is not None
    ]
    if not chosen:
        return loss
    return with_gradients_op(loss, [t for t, _ in chosen], [g for _, g in chosen])


def _inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check shapes, dtypes and devices; the rows of what the caller gives may be strided."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [T, H] and "
            "[V, H]; flatten batch and sequence into T"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"targets must be int64 or int32 [{hidden.shape[0]}], "
            f"got {targets.dtype} {list(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (
            torch.bfloat16,
            torch.float32,
            torch.float64,
        ):
            raise ValueError(f"{name} must be bfloat16, float32 or float64, got {tensor.dtype}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device} but hidden on {hidden.device}; move one of them"
            )
    return hidden.contiguous(), bias


def _temperature(temperature: Number, hidden: Tensor) -> tuple[float, Tensor | None]:
    if isinstance(temperature, Tensor):
        check_per_token("temperature", temperature, hidden)
        return 1.0, temperature
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    return float(temperature), None


def _softcap(softcap: float | None) -> float:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    return softcap or 0.0


def _entropy_coef(value: Number, hidden: Tensor) -> Tensor | None:
    if isinstance(value, Tensor):
        if value.ndim:
            check_per_token("entropy_coef", value, hidden)
        return value.detach().expand(hidden.shape[0])
    if value == 0:
        return None
    dtype = accumulation(hidden.dtype)
    return torch.full((hidden.shape[0],), value, dtype=dtype, device=hidden.device)
