"""Log-prob and policy loss from logits `[T, V]` that exist already."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from elpo_kernels.checks import (
    Number,
    SoftmaxOptions,
    check_dtype,
    check_softcap,
    check_targets,
    entropy_coefficient,
    split_temperature,
)
from elpo_kernels.gradients import with_gradients_op
from elpo_kernels.logits.ops import Pulled, Softmax, gradient_of, logits_logprob_op
from elpo_kernels.policy import (
    ClipOptions,
    PolicyLossOutput,
    PolicyStats,
    make_clip,
    policy_loss_op,
    split_options,
)


class SoftmaxAndClip(SoftmaxOptions, ClipOptions, total=False):
    """The options of a loss from logits."""


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    return_entropy: bool = False,
    in_place: bool = False,
    **options: Unpack[SoftmaxOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of `targets` `[T]`, with `return_entropy` also the entropy, from logits `[T, V]`.

    As `linear_logprob` otherwise. `in_place` lets the backward write the gradient over the logits,
    which then are gone. Logits of −inf (masked vocabulary) are impossible tokens.
    """
    softmax = _checked(logits, targets, **options)
    logprob, entropy = logits_logprob_op(logits, *softmax, return_entropy, in_place)
    return (logprob, entropy) if return_entropy else logprob


def logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprob: Tensor | None,
    pos_coef: Tensor | None = None,
    neg_coef: Tensor | None = None,
    eps_low: Number = 0.2,
    eps_high: Number = 0.2,
    *,
    entropy_coef: Number = 0.0,
    return_entropy: bool = False,
    logprob_for_all: bool = False,
    in_place: bool = False,
    **options: Unpack[SoftmaxAndClip],
) -> PolicyLossOutput:
    """`linear_policy_loss` from logits `[T, V]` before soft cap and temperature, contiguous along
    the vocabulary; without `bias`, `lora`, `vocab_group`, `vocab_start` and `main_grad`.

    The gradient is made in the forward. With `in_place` it is written over the logits at once;
    nothing may read them afterwards.
    """
    clipping, others = split_options(options)
    softmax = _checked(logits, targets, **others)
    clip = make_clip(logits, old_logprob, pos_coef, neg_coef, eps_low, eps_high, **clipping)
    pull = entropy_coefficient(entropy_coef, logits)
    valid = softmax.valid
    clip = clip.masked(valid)
    live = clip.live
    if pull is not None:
        pull = torch.where(valid, pull, 0)
        live = live | (pull != 0)
    if not logprob_for_all:
        softmax = softmax._replace(targets=torch.where(live, targets, softmax.ignore_index))
    plain = logits.detach()
    want_entropy = return_entropy or pull is not None
    logprob, entropy = logits_logprob_op(plain, *softmax, want_entropy, False)
    loss, slope, stats = policy_loss_op(logprob, *clip, softmax.backend)
    if pull is not None:
        loss = loss - (pull * entropy).sum()
    if torch.is_grad_enabled() and logits.requires_grad:
        pulled = Pulled(logprob, entropy, slope, None if pull is None else -pull)
        out = gradient_of(plain, softmax, pulled, in_place=in_place)
        loss = with_gradients_op(loss, [logits], [out], False)
    return PolicyLossOutput(
        loss, logprob, entropy if return_entropy else None, PolicyStats(*stats.unbind())
    )


def _checked(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Number = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Softmax:
    if logits.ndim != 2:
        raise ValueError(f"logits must be [T, V], got {list(logits.shape)}; flatten the batch")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError("logits must be contiguous along the vocabulary; call .contiguous()")
    check_dtype("logits", logits)
    check_targets(targets, logits)
    scalar, temperatures = split_temperature(temperature, logits)
    return Softmax(temperatures, targets, scalar, check_softcap(softcap), ignore_index, backend)
