"""Public functions on hidden states and head: the log-prob primitive and the fused policy loss.

Each is one custom operator with a fake, so that `torch.compile` traces the caller without a graph
break, and so that autograd, autocast and checkpointing see a single step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from elpo_kernels.checks import (
    Number,
    SoftmaxOptions,
    check_device,
    check_dtype,
    check_softcap,
    check_targets,
    entropy_coefficient,
    split_temperature,
)
from elpo_kernels.gradients import with_gradients_op
from elpo_kernels.linear.head import HeadInputs
from elpo_kernels.linear.ops import linear_logprob_op, linear_policy_op
from elpo_kernels.linear.shards import local_head
from elpo_kernels.policy import (
    Clip,
    ClipOptions,
    PolicyLossOutput,
    PolicyStats,
    make_clip,
    policy_loss,
    split_options,
)


class LoRA(NamedTuple):
    """A low-rank update of the head: logits are x Wᵀ + scale · (x Aᵀ) Bᵀ."""

    a: Tensor  # [r, H]
    b: Tensor  # [V, r]
    scale: float = 1.0


class HeadOptions(SoftmaxOptions, total=False):
    """What a head may be beside its weight."""

    bias: Tensor | None  # [V]
    lora: LoRA | None
    vocab_group: dist.ProcessGroup | None  # of the shards of the vocabulary
    vocab_start: int  # first row of this shard


class HeadAndClip(HeadOptions, ClipOptions, total=False):
    """The options of a loss from a head."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_entropy: bool = False,
    **options: Unpack[HeadOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of `targets` `[T]` under softmax(hidden · weightᵀ), without `[T, V]` in memory.

    `hidden` `[T, H]`, `weight` `[V, H]`, `options` those of `HeadOptions`; logits are soft-capped,
    cap · tanh(l / cap), before the temperature divides them. Returns float32 `[T]` in nats (float64
    for float64 inputs), with `return_entropy` also the entropy of every token's distribution, both
    differentiable with respect to hidden, weight, bias and the LoRA factors. Tokens whose target is
    `ignore_index` give 0 and no gradient. Matrix products run in the dtype of `hidden` (of
    autocast, where that is on); the backward computes the logits once more.

    A vocabulary-sharded head: every rank of `vocab_group` calls with the same tokens and its own
    rows `vocab_start …` of weight, bias and LoRA `b`; results and the gradient of `hidden` are
    those of the whole head. A `weight` that is a DTensor sharded over its rows, with `hidden` a
    replicated DTensor on the same mesh, is such a head.

    Raises `ValueError` for shapes, dtypes, devices or targets that do not fit, `RuntimeError` for a
    backend that cannot run.
    """
    head = _checked(hidden, weight, targets, **options)
    logprob, entropy, _ = linear_logprob_op(*head, return_entropy)
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
    entropy_coef: Number = 0.0,
    return_entropy: bool = False,
    logprob_for_all: bool = False,
    main_grad: Tensor | None = None,
    **options: Unpack[HeadAndClip],
) -> PolicyLossOutput:
    """The clipped policy loss, summed over tokens, gradients made in one pass:

        −Σ [pos_coef · min(ρ, clip ρ) + neg_coef · max(ρ, clip ρ)],  ρ = exp(logprob − old_logprob),

    clip to `[1 − eps_low, 1 + eps_high]`. `old_logprob`, under the same temperature and soft cap,
    `pos_coef` (≥ 0) and `neg_coef` (≤ 0) are `[T]`; the bounds numbers or `[T]`, ≥ 0 (not checked
    in tensors), infinity for none. `old_logprob=None` stands for the current policy (ratio 1, plain
    policy gradient). The coefficients carry all weights: nothing is divided by a number of tokens.

    Options of the clip: `advantages` `[T]`, with `weights` `[T]` or without, in the place of the
    coefficient pair; `is_weight` `[T]` times the coefficients (truncated importance sampling);
    `ratio_cap`, at least 1, bounds the ratio of negative advantages (dual clip; infinity: none).
    Options of the head, as in `linear_logprob`: `temperature`, `softcap`, `bias`, `lora`,
    `vocab_group`, `vocab_start`, `ignore_index`, `backend`.

    `entropy_coef` (number or `[T]`) subtracts Σ entropy_coef · entropy. A number counts for every
    token that has a target, masked or not: give `[T]`, with 0 on those. With `softcap` as well the
    loss is composed of `linear_logprob` and `policy_loss` (8THV), and `main_grad` is refused.

    Tokens without coefficient are never computed: their `logprob` and `entropy` are 0 unless
    `logprob_for_all`; what their `old_logprob` holds is of no account. `logprob`, `entropy` and
    `stats` are detached; use `linear_logprob` to differentiate through them.

    The weight's gradient is summed in float32 and returned in the weight's dtype. With `main_grad`
    (float32 `[V, H]`) it is added there instead, in this call, for an upstream gradient of 1: scale
    the coefficients rather than the loss, and keep the call out of gradient checkpointing.
    Gradients go to `hidden`, `weight`, `bias` and `lora` alone, once: a second backward raises.

    Raises `ValueError` for shapes, dtypes (float16 among them), devices, signs or targets that do
    not fit, `RuntimeError` for a backend that cannot run and `main_grad` under checkpointing.
    """
    clipping, others = split_options(options)
    head = _checked(hidden, weight, targets, **others)
    clip = make_clip(head.xs[0], old_logprob, pos_coef, neg_coef, eps_low, eps_high, **clipping)
    pull = entropy_coefficient(entropy_coef, head.xs[0])
    _check_main_grad(main_grad, head.weights[0])
    if head.softcap and pull is not None:
        # The kept powers carry the soft cap's derivative and no longer tell the entropy's.
        if main_grad is not None:
            raise ValueError("main_grad cannot be combined with softcap and entropy_coef together")
        composed = _composed(head, clip, pull, logprob_for_all)
        return composed if return_entropy else composed._replace(entropy=None)
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in head.tensors
    ]
    loss, logprob, entropy, stats, *gradients = linear_policy_op(
        *head.detached(), *clip, pull, main_grad, return_entropy, logprob_for_all, needs
    )
    if main_grad is not None:
        needs[len(head.xs)] = False
    chosen = [i for i, need in enumerate(needs) if need]
    if chosen:
        tensors = head.tensors
        loss = with_gradients_op(
            loss,
            [tensors[i] for i in chosen],
            [gradients[i] for i in chosen],
            main_grad is not None,
        )
    return PolicyLossOutput(
        loss, logprob, entropy if return_entropy else None, PolicyStats(*stats.unbind())
    )


def _composed(
    head: HeadInputs, clip: Clip, entropy_coef: Tensor, logprob_for_all: bool
) -> PolicyLossOutput:
    """The loss of log-probs and entropies that are differentiated themselves."""
    clip = clip.masked(head.valid)
    live = logprob_for_all | clip.live | (entropy_coef != 0)
    chosen = head._replace(targets=torch.where(live, head.targets, head.ignore_index))
    logprob, entropy, _ = linear_logprob_op(*chosen, True)
    return policy_loss(
        logprob, *clip[:-1],
        ratio_cap=clip.ratio_cap, entropy=entropy, entropy_coef=entropy_coef, backend=head.backend,
    )  # fmt: skip


def _checked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: float | None = None,
    lora: LoRA | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> HeadInputs:
    hidden, weight, bias, group, first = local_head(hidden, weight, bias, vocab_group, vocab_start)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [T, H] and "
            "[V, H]; flatten batch and sequence into T"
        )
    size, width = weight.shape
    check_targets(targets, hidden)
    given: list[tuple[str, Tensor | None, Sequence[int]]] = [
        ("hidden", hidden, hidden.shape),
        ("weight", weight, weight.shape),
        ("bias", bias, (size,)),
    ]
    if lora is not None:
        rank = lora.a.shape[0]
        given += [("lora.a", lora.a, (rank, width)), ("lora.b", lora.b, (size, rank))]
    for name, tensor, shape in given:
        if tensor is not None:
            check_dtype(name, tensor)
            check_device(name, tensor, hidden)
            if tensor.shape != tuple(shape):
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
        check_dtype("autocast", hidden)
    xs, weights = [hidden.contiguous()], [weight]
    if lora is not None:
        xs.append(lora.scale * (hidden @ lora.a.to(hidden.dtype).t()))
        weights.append(lora.b)
    scalar, temperatures = split_temperature(temperature, hidden)
    return HeadInputs(
        xs,
        weights,
        bias,
        temperatures,
        targets,
        temperature=scalar,
        softcap=check_softcap(softcap),
        first=first,
        group="" if group is None else group.group_name,
        ignore_index=ignore_index,
        backend=backend,
    )


def _check_main_grad(main_grad: Tensor | None, weight: Tensor) -> None:
    if main_grad is None:
        return
    if main_grad.dtype != torch.float32 or main_grad.shape != weight.shape:
        raise ValueError(
            f"main_grad must be float32 {list(weight.shape)}, "
            f"got {main_grad.dtype} {list(main_grad.shape)}"
        )
    check_device("main_grad", main_grad, weight)
    if not weight.requires_grad:
        raise ValueError("main_grad was given, but the weight does not require a gradient")
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "main_grad would be filled twice under gradient checkpointing; "
            "call linear_policy_loss outside the checkpointed region"
        )
