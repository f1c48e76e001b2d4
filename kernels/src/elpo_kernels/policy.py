r"""The clipped policy loss of one token, its derivative, and the statistics people plot.

For a token with importance ratio ρ = exp(logprob − old_logprob), coefficients c⁺ ≥ 0 ≥ c⁻ and clip
bounds of its own,

    loss = −[c⁺ · min(ρ, clip ρ) + c⁻ · max(ρ, clip ρ)],   clip ρ = clip(ρ, 1 − ε_low, 1 + ε_high).

With c⁺ = Σ_i w_i max(A_i, 0) and c⁻ = Σ_i w_i min(A_i, 0) this is exactly the weighted sum of the
clipped surrogates min(ρA_i, clip(ρ)A_i) of every trajectory i through the token, because the
surrogate is positively homogeneous in the advantage. A finite `ratio_cap` bounds ρ in the c⁻ part
from above too (dual clip). All normalisation lives in the weights w_i: nothing here divides by a
number of tokens or sequences.

Invariants: a token with c⁺ = c⁻ = 0 is masked; whatever its log-probs hold (NaN, inf), it gives
loss 0, gradient 0 and enters no statistic. The log-ratio is held at ±40, so that ρ stays finite.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from elpo_kernels.backend import resolve_backend
from elpo_kernels.checks import (
    Number,
    accumulation,
    bound,
    check_per_token,
    check_ratio_cap,
    check_signs,
    entropy_coefficient,
)
from elpo_kernels.schema import operator

LOG_RATIO_LIMIT = 40.0


class PolicyStats(NamedTuple):
    """Plain means over the unmasked tokens, those with a coefficient other than 0, as 0-dimensional
    tensors (no device synchronisation); all of them 0 where no token is unmasked."""

    tokens: Tensor  # number of unmasked tokens
    clipped_low: Tensor  # share whose c⁻ part has no gradient because ρ < 1 − ε_low
    clipped_high: Tensor  # share whose c⁺ part has no gradient because ρ > 1 + ε_high
    capped: Tensor  # share whose c⁻ part has no gradient because ρ > ratio_cap
    approx_kl: Tensor  # ρ − 1 − log ρ, the non-negative "k3" estimate of KL(old ‖ new), nats
    ratio_mean: Tensor
    ratio_max: Tensor


class PolicyLossOutput(NamedTuple):
    loss: Tensor  # scalar, differentiable
    logprob: Tensor  # [T] float32, detached; 0 where the token was not computed
    entropy: Tensor | None  # [T] float32 in nats, detached; None unless asked for
    stats: PolicyStats


class ClipOptions(TypedDict, total=False):
    """What else decides about coefficients and bounds."""

    advantages: Tensor | None  # [T], in the place of the coefficient pair
    weights: Tensor | None  # [T], of the advantages
    is_weight: Tensor | None  # [T], times the coefficients (truncated importance sampling)
    ratio_cap: float  # bounds the ratio of negative advantages from above (dual clip)


def split_options(options: Any) -> tuple[Any, Any]:
    """A function's options: those of the clip, and the others."""
    names = ("advantages", "weights", "is_weight", "ratio_cap")
    clip = {name: options.pop(name) for name in names if name in options}
    return clip, options


def coefficients(
    pos_coef: Tensor | None,
    neg_coef: Tensor | None,
    advantages: Tensor | None,
    weights: Tensor | None,
    is_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(c⁺, c⁻) `[T]` from the pair itself or from plain `advantages` (times `weights`), times
    the truncated importance-sampling weight. Masked tokens stay exactly 0."""
    if advantages is not None:
        if pos_coef is not None or neg_coef is not None:
            raise ValueError("give either advantages (and weights) or pos_coef and neg_coef")
        scaled = advantages if weights is None else advantages * weights
        scaled = torch.where(advantages == 0, 0, scaled)
        if weights is not None:
            scaled = torch.where(weights == 0, 0, scaled)
        pos_coef, neg_coef = scaled.clamp_min(0), scaled.clamp_max(0)
    elif pos_coef is None or neg_coef is None:
        raise ValueError("pos_coef and neg_coef are both needed unless advantages are given")
    elif weights is not None:
        raise ValueError("weights go with advantages; pos_coef and neg_coef already carry them")
    if is_weight is not None:
        pos_coef = torch.where(pos_coef == 0, 0, pos_coef * is_weight)
        neg_coef = torch.where(neg_coef == 0, 0, neg_coef * is_weight)
    return pos_coef.detach(), neg_coef.detach()


class Clip(NamedTuple):
    """What the loss takes beside log-probs: checked, detached and in the accumulation dtype."""

    old_logprob: Tensor | None  # [T]; None: the current policy's, ρ = 1
    pos: Tensor  # [T]
    neg: Tensor  # [T]
    eps_low: Tensor  # [T] or 0-dimensional
    eps_high: Tensor  # [T] or 0-dimensional
    ratio_cap: float  # infinity: none

    @property
    def live(self) -> Tensor:
        """Which tokens have a coefficient, `[T]`."""
        return (self.pos != 0) | (self.neg != 0)

    def at(self, index: Tensor) -> Clip:
        """That of the tokens `index`."""
        return Clip(
            None if self.old_logprob is None else self.old_logprob[index],
            self.pos[index],
            self.neg[index],
            self.eps_low[index] if self.eps_low.ndim else self.eps_low,
            self.eps_high[index] if self.eps_high.ndim else self.eps_high,
            self.ratio_cap,
        )

    def masked(self, valid: Tensor) -> Clip:
        """The same with coefficients for `valid` tokens only."""
        pos, neg = torch.where(valid, self.pos, 0), torch.where(valid, self.neg, 0)
        return self._replace(pos=pos, neg=neg)


def make_clip(
    like: Tensor,
    old_logprob: Tensor | None,
    pos_coef: Tensor | None,
    neg_coef: Tensor | None,
    eps_low: Number,
    eps_high: Number,
    *,
    advantages: Tensor | None = None,
    weights: Tensor | None = None,
    is_weight: Tensor | None = None,
    ratio_cap: float = math.inf,
) -> Clip:
    """The public functions' arguments, one value for each row of `like`."""
    pos, neg = coefficients(pos_coef, neg_coef, advantages, weights, is_weight)
    for name, values in (("old_logprob", old_logprob), ("pos_coef", pos), ("neg_coef", neg)):
        check_per_token(name, values, like)
    acc = accumulation(like.dtype)
    return Clip(
        None if old_logprob is None else old_logprob.detach().to(acc),
        pos.to(acc),
        neg.to(acc),
        bound("eps_low", eps_low, like),
        bound("eps_high", eps_high, like),
        check_ratio_cap(ratio_cap),
    )


class Surrogate(NamedTuple):
    """The loss of each token `[T]`, and what goes with it."""

    loss: Tensor
    slope: Tensor  # its derivative with respect to the log-prob
    log_ratio: Tensor
    flags: Tensor  # int8: 1 clipped low, 2 high, 4 capped


def surrogate(logprob: Tensor, clip: Clip, backend: str = "torch") -> Surrogate:
    """The loss of tokens with these log-probs `[T]`."""
    if resolve_backend(backend, logprob.device, logprob.dtype) == "triton":
        # Imported here: whether kernels are compiled or interpreted is settled at import.
        from elpo_kernels import policy_triton

        return Surrogate(*policy_triton.surrogate(logprob, clip, LOG_RATIO_LIMIT))
    old_logprob, pos, neg, eps_low, eps_high, ratio_cap = clip
    old = logprob if old_logprob is None else old_logprob
    log_ratio = torch.where(clip.live, logprob - old, 0)
    bounded = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = bounded.exp()
    high, low, capped = ratio > 1 + eps_high, ratio < 1 - eps_low, ratio > ratio_cap
    pos_ratio = torch.where(high, 1 + eps_high, ratio)
    neg_ratio = torch.where(low, 1 - eps_low, ratio.clamp_max(ratio_cap))
    # A coefficient of 0 must not meet an infinite bound.
    loss = -(torch.where(pos == 0, 0, pos * pos_ratio) + torch.where(neg == 0, 0, neg * neg_ratio))
    slope = torch.where(high, 0, pos) + torch.where(low | capped, 0, neg)
    slope = torch.where(bounded == log_ratio, -slope * ratio, 0)
    has_neg = neg != 0
    flags = (has_neg & low) + 2 * ((pos != 0) & high) + 4 * (has_neg & capped)
    # `bounded == log_ratio` is false for NaN: let a NaN of an unmasked token through.
    slope = torch.where(log_ratio.isnan(), log_ratio, slope)
    return Surrogate(loss, slope, bounded, flags.to(torch.int8))


def statistics(log_ratio: Tensor, flags: Tensor, clip: Clip) -> Tensor:
    """The fields of `PolicyStats` as one `[7]` tensor."""
    live = clip.live
    count = live.sum()
    per_token = torch.where(live, 1 / count.clamp_min(1).to(log_ratio.dtype), 0)
    ratio = torch.where(live, log_ratio.exp(), 0)
    largest = torch.cat([ratio, ratio.new_zeros(1)]).amax()
    return torch.stack(
        [
            count.to(log_ratio.dtype),
            ((flags & 1) * per_token).sum(),
            ((flags >> 1 & 1) * per_token).sum(),
            ((flags >> 2 & 1) * per_token).sum(),
            (torch.where(live, log_ratio.expm1() - log_ratio, 0) * per_token).sum(),
            (ratio * per_token).sum(),
            largest,
        ]
    )


@operator("policy_loss", "Tensor logprob", Clip, "str backend", returns="(Tensor, Tensor, Tensor)")
def policy_loss_op(logprob: Tensor, clip: Clip, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, its derivative `[T]` and the statistics `[7]`."""
    check_signs(clip.pos, clip.neg)
    loss, slope, log_ratio, flags = surrogate(logprob, clip, backend)
    return loss.sum(), slope, statistics(log_ratio, flags, clip)


@policy_loss_op.register_fake
def _(logprob: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return logprob.new_empty(()), torch.empty_like(logprob), logprob.new_empty(7)


def _save_slope(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])


def _policy_loss_backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Any, ...]:
    return ctx.saved_tensors[0] * grad_loss, *(None,) * 7


policy_loss_op.register_autograd(_policy_loss_backward, setup_context=_save_slope)


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    pos_coef: Tensor | None = None,
    neg_coef: Tensor | None = None,
    eps_low: Number = 0.2,
    eps_high: Number = 0.2,
    *,
    entropy: Tensor | None = None,
    entropy_coef: Number = 0.0,
    backend: str = "auto",
    **options: Unpack[ClipOptions],
) -> PolicyLossOutput:
    """The loss of this module from log-probs `[T]` (float32 or float64) that are there already,
    differentiable with respect to `logprob` and `entropy`; `old_logprob`, coefficients, bounds and
    options of the clip as in `linear_policy_loss`. A token is masked by coefficients of 0."""
    if logprob.ndim != 1 or logprob.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logprob must be float32 or float64 [T], got {logprob.dtype} {list(logprob.shape)}"
        )
    clip = make_clip(logprob, old_logprob, pos_coef, neg_coef, eps_low, eps_high, **options)
    loss, _, stats = policy_loss_op(logprob, *clip, backend)
    pull = entropy_coefficient(entropy_coef, logprob)
    if entropy is not None:
        check_per_token("entropy", entropy, logprob)
    if pull is not None:
        if entropy is None:
            raise ValueError("entropy_coef needs the tokens' entropy=")
        loss = loss - (pull * entropy).sum()
    return PolicyLossOutput(
        loss,
        logprob.detach(),
        None if entropy is None else entropy.detach(),
        PolicyStats(*stats.detach().unbind()),
    )
