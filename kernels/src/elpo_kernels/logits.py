"""Log-prob and policy loss from logits `[T, V]` that exist already.

Only rows with a target, and in the backward only rows with a gradient, are read. The gradient may
be written over the logits, which saves a second `[T, V]` tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from elpo_kernels._backend import resolve_backend
from elpo_kernels._checks import (
    Number,
    accumulation,
    check_dtype,
    check_softcap,
    check_targets,
    chosen_tokens,
    entropy_coefficient,
    split_temperature,
)
from elpo_kernels._engine import measured
from elpo_kernels._head import LN2, LOG2E, blocks
from elpo_kernels._ops import with_gradients_op
from elpo_kernels._torch_rows import add_sums, closed, levels, to_gradient
from elpo_kernels.policy import PolicyLossOutput, PolicyStats, policy_inputs, policy_loss_op

State = tuple[Tensor, Tensor, Tensor]

TILE_BYTES = 32 << 20  # of float32 scratch memory of the `torch` backend


def _scale(temperature: float, temperatures: Tensor | None, like: Tensor) -> Tensor:
    """Factor `[T]` from logits to base-2 levels."""
    dtype = accumulation(like.dtype)
    if temperatures is not None:
        return LOG2E / temperatures.to(dtype)
    return torch.full((len(like),), LOG2E / temperature, dtype=dtype, device=like.device)


def _blocks(index: Tensor, logits: Tensor) -> Sequence[Tensor]:
    """Positions in `index`, in pieces whose tiles fit the scratch memory."""
    rows = max(1, TILE_BYTES // max(1, 4 * logits.shape[1]))
    return blocks(torch.arange(len(index), device=index.device), rows)


@library.custom_op("elpo_kernels::logits_logprob", mutates_args=())
def logits_logprob_op(
    logits: Tensor,
    temperatures: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    backend: str,
    want_entropy: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy `[T]`; `in_place` lets the backward write over the logits."""
    index = chosen_tokens(targets != ignore_index, targets, logits.shape[1], ignore_index)
    column, scale = targets[index], _scale(temperature, temperatures, logits)[index]
    level = logits[index, column].to(scale.dtype)
    if softcap:
        level = softcap * torch.tanh(level / softcap)
    backend = resolve_backend(backend, logits.device, logits.dtype)
    sums = _triton_sums if backend == "triton" else _torch_sums
    state = sums(logits, index, column, scale, softcap, want_entropy)
    logprob = torch.zeros(len(targets), dtype=scale.dtype, device=scale.device)
    entropy = torch.zeros_like(logprob)
    logprob[index], entropy[index] = measured(level * scale, *closed(*state))
    return logprob, entropy


@logits_logprob_op.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    values = logits.new_empty(len(logits), dtype=accumulation(logits.dtype))
    return values, torch.empty_like(values)


def _torch_sums(
    logits: Tensor,
    index: Tensor,
    column: Tensor,
    scale: Tensor,
    softcap: float,
    want_entropy: bool,
) -> State:
    """Running sums of the rows `index`, as `add_sums` leaves them."""
    state = torch.zeros(3, len(index), dtype=scale.dtype, device=scale.device)
    for rows in _blocks(index, logits):
        tile = logits[index[rows]].to(scale.dtype)
        zero = torch.zeros_like(scale[rows])
        levels(tile, None, scale[rows], zero, softcap)
        start = torch.full_like(zero, -torch.inf), zero, zero
        state[:, rows] = torch.stack(add_sums(tile, column[rows], start, want_entropy))
    return state[0], state[1], state[2]


def _triton_sums(
    logits: Tensor,
    index: Tensor,
    column: Tensor,
    scale: Tensor,
    softcap: float,
    want_entropy: bool,
) -> State:
    # Imported here: whether kernels are compiled or interpreted is settled at import.
    from elpo_kernels._triton_rows import launch, sums_kernel

    state = torch.full_like(scale, -torch.inf), torch.zeros_like(scale), torch.zeros_like(scale)
    launch(
        sums_kernel,
        len(index),
        logits,
        index,
        scale,  # stands for the bias, which is not read
        scale,
        torch.zeros_like(scale),
        column,
        *state,
        0,
        logits.shape[1],
        logits.stride(0),
        HAS_BIAS=False,
        SOFTCAP=softcap,
        ENTROPY=want_entropy,
    )
    return state


@library.custom_op("elpo_kernels::logits_gradient_", mutates_args=("out",))
def logits_gradient_op(
    out: Tensor,
    logits: Tensor | None,
    temperatures: Tensor | None,
    targets: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> None:
    """Write the gradient of Σ grad_logprob · logprob + grad_entropy · entropy with respect to the
    logits into `out` `[T, V]`; `logits=None` says that `out` holds them."""
    source = out if logits is None else logits
    live = grad_logprob != 0
    if grad_entropy is not None:
        live = live | (grad_entropy != 0)
    live = live & (targets != ignore_index)
    index, dead = live.nonzero()[:, 0], (~live).nonzero()[:, 0]
    column, scale = targets[index], _scale(temperature, temperatures, source)[index]
    logprob, entropy = logprob[index], entropy[index]
    g = grad_logprob[index].to(scale.dtype)
    level = source[index, column].to(scale.dtype)
    if softcap:
        level = softcap * torch.tanh(level / softcap)
    # L is anchored at the row's log-sum-exp, so that 2^L = p.
    offset = logprob * LOG2E - level * scale
    rate = scale * LN2  # one over the temperature
    alpha, beta, at_target = -g * rate, None, -g * torch.expm1(logprob) * rate
    if grad_entropy is not None:
        e = grad_entropy[index].to(scale.dtype)
        alpha, beta = alpha - e * entropy * rate, -e * rate
        at_target = at_target - e * logprob.exp() * (logprob + entropy) * rate
    backend = resolve_backend(backend, source.device, source.dtype)
    write = _triton_gradient if backend == "triton" else _torch_gradient
    write(out, source, index, column, scale, offset, alpha, beta, at_target, softcap)
    out[dead] = 0


@logits_gradient_op.register_fake
def _(*unused: Any) -> None:
    return None


def _torch_gradient(
    out: Tensor,
    source: Tensor,
    index: Tensor,
    column: Tensor,
    scale: Tensor,
    offset: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    at_target: Tensor,
    softcap: float,
) -> None:
    for rows in _blocks(index, source):
        tile = source[index[rows]].to(scale.dtype)
        slope = levels(tile, None, scale[rows], offset[rows], softcap)
        pull = None if beta is None else beta[rows]
        to_gradient(tile, slope, column[rows], alpha[rows], pull, at_target[rows])
        out[index[rows]] = tile.to(out.dtype)


def _triton_gradient(
    out: Tensor,
    source: Tensor,
    index: Tensor,
    column: Tensor,
    scale: Tensor,
    offset: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    at_target: Tensor,
    softcap: float,
) -> None:
    # Imported here: whether kernels are compiled or interpreted is settled at import.
    from elpo_kernels._triton_rows import gradient_kernel, launch

    launch(
        gradient_kernel,
        len(index),
        source,
        index,
        scale,  # stands for the bias, which is not read
        scale,
        offset,
        column,
        alpha,
        alpha if beta is None else beta,
        at_target,
        out,
        0,
        source.shape[1],
        source.stride(0),
        out.stride(0),
        HAS_BIAS=False,
        SOFTCAP=softcap,
        ENTROPY=beta is not None,
    )


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, temperatures, targets, *ctx.scalars, ctx.want_entropy, ctx.in_place = inputs
    ctx.save_for_backward(logits, temperatures, targets, *output)


def _logits_backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Any, ...]:
    logits, temperatures, targets, logprob, entropy = ctx.saved_tensors
    logits = logits.detach()
    out = logits if ctx.in_place else torch.empty_like(logits)
    torch.ops.elpo_kernels.logits_gradient_(
        out,
        None if ctx.in_place else logits,
        temperatures,
        targets,
        logprob,
        entropy,
        grad_logprob,
        grad_entropy if ctx.want_entropy else None,
        *ctx.scalars,
    )
    return out, *(None,) * 8


logits_logprob_op.register_autograd(_logits_backward, setup_context=_save_logits)


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Number = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    in_place: bool = False,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of `targets` `[T]`, with `return_entropy` also the entropy, from logits `[T, V]`.

    As `linear_logprob` otherwise. `in_place` lets the backward write the gradient over the logits,
    which then are gone. Logits of −inf (masked vocabulary) are impossible tokens.
    """
    scalars, temperatures = _arguments(logits, targets, temperature, softcap, ignore_index, backend)
    logprob, entropy = logits_logprob_op(
        logits, temperatures, targets, *scalars, return_entropy, in_place
    )
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
    advantages: Tensor | None = None,
    weights: Tensor | None = None,
    is_weight: Tensor | None = None,
    ratio_cap: float = math.inf,
    entropy_coef: Number = 0.0,
    temperature: Number = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    logprob_for_all: bool = False,
    in_place: bool = False,
    ignore_index: int = -100,
    backend: str = "auto",
) -> PolicyLossOutput:
    """`linear_policy_loss` from logits `[T, V]`, the gradient made in the forward.

    With `in_place` it is written over the logits at once; nothing may read them afterwards.
    """
    scalars, temperatures = _arguments(logits, targets, temperature, softcap, ignore_index, backend)
    given = policy_inputs(
        logits, old_logprob, pos_coef, neg_coef, eps_low, eps_high,
        advantages, weights, is_weight, ratio_cap,
    )  # fmt: skip
    pull = entropy_coefficient(entropy_coef, logits)
    valid = targets != ignore_index
    given = given._replace(
        pos=torch.where(valid, given.pos, 0), neg=torch.where(valid, given.neg, 0)
    )
    live = (given.pos != 0) | (given.neg != 0)
    if pull is not None:
        pull = torch.where(valid, pull, 0)
        live = live | (pull != 0)
    if not logprob_for_all:
        targets = torch.where(live, targets, ignore_index)
    plain = logits.detach()
    want_entropy = return_entropy or pull is not None
    logprob, entropy = logits_logprob_op(
        plain, temperatures, targets, *scalars, want_entropy, False
    )
    loss, slope, stats = policy_loss_op(logprob, *given, scalars[-1])
    if pull is not None:
        loss = loss - (pull * entropy).sum()
    if torch.is_grad_enabled() and logits.requires_grad:
        out = plain if in_place else torch.empty_like(plain)
        torch.ops.elpo_kernels.logits_gradient_(
            out,
            None if in_place else plain,
            temperatures,
            targets,
            logprob,
            entropy,
            slope,
            None if pull is None else -pull,
            *scalars,
        )
        loss = with_gradients_op(loss, [logits], [out], False)
    return PolicyLossOutput(
        loss, logprob, entropy if return_entropy else None, PolicyStats(*stats.unbind())
    )


def _arguments(
    logits: Tensor,
    targets: Tensor,
    temperature: Number,
    softcap: float | None,
    ignore_index: int,
    backend: str,
) -> tuple[tuple[float, float, int, str], Tensor | None]:
    if logits.ndim != 2:
        raise ValueError(f"logits must be [T, V], got {list(logits.shape)}; flatten the batch")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError("logits must be contiguous along the vocabulary; call .contiguous()")
    check_dtype("logits", logits)
    check_targets(targets, logits)
    scalar, temperatures = split_temperature(temperature, logits)
    return (scalar, check_softcap(softcap), ignore_index, backend), temperatures
