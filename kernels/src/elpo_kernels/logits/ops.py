"""The operator behind `logprob_from_logits`, its backward, and what runs them.

Only rows with a target, and in the backward only rows with a gradient, are read. The gradient may
be written over the logits, which saves a second `[T, V]` tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elpo_kernels.backend import resolve_backend
from elpo_kernels.checks import accumulation, chosen_tokens
from elpo_kernels.rows import (
    LN2,
    LOG2E,
    LogitGradient,
    add_sums,
    blocks,
    closed,
    levels,
    measured,
    to_gradient,
)
from elpo_kernels.schema import operator

State = tuple[Tensor, Tensor, Tensor]

TILE_BYTES = 32 << 20  # of float32 scratch memory of the `torch` backend


class Softmax(NamedTuple):
    """Which token of each row is asked for, and how logits become probabilities."""

    temperatures: Tensor | None  # [T], beside a temperature of 1
    targets: Tensor  # [T]
    temperature: float
    softcap: float  # 0: none
    ignore_index: int
    backend: str

    @property
    def valid(self) -> Tensor:
        """Which rows have a target, `[T]`."""
        return self.targets != self.ignore_index

    def rows(self, logits: Tensor, index: Tensor) -> tuple[Chosen, Tensor]:
        """The rows `index`, and their targets' logits over the temperature, in bits `[R]`."""
        dtype = accumulation(logits.dtype)
        if self.temperatures is not None:
            scale = (LOG2E / self.temperatures.to(dtype))[index]
        else:
            value = LOG2E / self.temperature
            scale = torch.full((len(index),), value, dtype=dtype, device=logits.device)
        column = self.targets[index]
        level = logits[index, column].to(dtype)
        if self.softcap:
            level = self.softcap * torch.tanh(level / self.softcap)
        return Chosen(logits, index, column, scale, self.softcap), level * scale

    def on_triton(self, logits: Tensor) -> bool:
        return resolve_backend(self.backend, logits.device, logits.dtype) == "triton"


class Chosen(NamedTuple):
    """The rows that are read."""

    logits: Tensor  # [T, V]
    which: Tensor  # [R], the rows
    column: Tensor  # [R], of the target
    scale: Tensor  # [R], from logits to levels in bits
    softcap: float

    def blocks(self) -> Sequence[Tensor]:
        """Positions in `which`, in pieces whose tiles fit the scratch memory."""
        rows = max(1, TILE_BYTES // max(1, 4 * self.logits.shape[1]))
        return blocks(torch.arange(len(self.which), device=self.which.device), rows)


@operator(
    "logits_logprob",
    "Tensor logits",
    Softmax,
    "bool want_entropy, bool in_place",
    returns="(Tensor, Tensor)",
)
def logits_logprob_op(
    logits: Tensor, softmax: Softmax, want_entropy: bool, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy `[T]`; `in_place` lets the backward write over the logits."""
    targets = softmax.targets
    index = chosen_tokens(softmax.valid, targets, logits.shape[1], softmax.ignore_index)
    rows, level = softmax.rows(logits, index)
    state = (_triton_sums if softmax.on_triton(logits) else _torch_sums)(rows, want_entropy)
    logprob = torch.zeros(len(targets), dtype=level.dtype, device=level.device)
    entropy = torch.zeros_like(logprob)
    logprob[index], entropy[index] = measured(level, *closed(*state))
    return logprob, entropy


@logits_logprob_op.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    values = logits.new_empty(len(logits), dtype=accumulation(logits.dtype))
    return values, torch.empty_like(values)


def _torch_sums(rows: Chosen, want_entropy: bool) -> State:
    """Running sums of the rows, as `add_sums` leaves them."""
    state = torch.zeros(3, len(rows.which), dtype=rows.scale.dtype, device=rows.scale.device)
    for part in rows.blocks():
        tile = rows.logits[rows.which[part]].to(rows.scale.dtype)
        zero = torch.zeros_like(rows.scale[part])
        levels(tile, None, rows.scale[part], zero, rows.softcap)
        start = torch.full_like(zero, -torch.inf), zero, zero
        state[:, part] = torch.stack(add_sums(tile, rows.column[part], start, want_entropy))
    return state[0], state[1], state[2]


def _triton_sums(rows: Chosen, want_entropy: bool) -> State:
    # Imported here: whether kernels are compiled or interpreted is settled at import.
    from elpo_kernels.rows_triton import launch, sums_kernel

    logits, which, column, scale, softcap = rows
    state = torch.full_like(scale, -torch.inf), torch.zeros_like(scale), torch.zeros_like(scale)
    launch(
        sums_kernel,
        len(which),
        logits,
        which,
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


class Pulled(NamedTuple):
    """What the backward is given of every row, each `[T]`."""

    logprob: Tensor
    entropy: Tensor
    grad_logprob: Tensor
    grad_entropy: Tensor | None


@operator(
    "logits_gradient_",
    "Tensor(a!) out, Tensor? logits",
    Softmax,
    Pulled,
    returns="()",
    mutates=("out",),
)
def logits_gradient_op(
    out: Tensor, logits: Tensor | None, softmax: Softmax, pulled: Pulled
) -> None:
    """Write the gradient of Σ grad_logprob · logprob + grad_entropy · entropy with respect to the
    logits into `out` `[T, V]`; `logits=None` says that `out` holds them."""
    source = out if logits is None else logits
    live = pulled.grad_logprob != 0
    if pulled.grad_entropy is not None:
        live = live | (pulled.grad_entropy != 0)
    live = live & softmax.valid
    index, dead = live.nonzero()[:, 0], (~live).nonzero()[:, 0]
    rows, level = softmax.rows(source, index)
    scale = rows.scale
    logprob, entropy = pulled.logprob[index], pulled.entropy[index]
    g = pulled.grad_logprob[index].to(scale.dtype)
    # L is anchored at the row's log-sum-exp, so that 2^L = p.
    offset = logprob * LOG2E - level
    rate = scale * LN2  # one over the temperature
    alpha, beta, at_target = -g * rate, None, -g * torch.expm1(logprob) * rate
    if pulled.grad_entropy is not None:
        e = pulled.grad_entropy[index].to(scale.dtype)
        alpha, beta = alpha - e * entropy * rate, -e * rate
        at_target = at_target - e * logprob.exp() * (logprob + entropy) * rate
    write = _triton_gradient if softmax.on_triton(source) else _torch_gradient
    write(out, rows, offset, LogitGradient(alpha, beta, at_target))
    out[dead] = 0


@logits_gradient_op.register_fake
def _(*unused: Any) -> None:
    return None


def _torch_gradient(out: Tensor, rows: Chosen, offset: Tensor, gradient: LogitGradient) -> None:
    for part in rows.blocks():
        tile = rows.logits[rows.which[part]].to(rows.scale.dtype)
        cap_grad = levels(tile, None, rows.scale[part], offset[part], rows.softcap)
        to_gradient(tile, cap_grad, rows.column[part], gradient.at(part))
        out[rows.which[part]] = tile.to(out.dtype)


def _triton_gradient(out: Tensor, rows: Chosen, offset: Tensor, gradient: LogitGradient) -> None:
    # Imported here: whether kernels are compiled or interpreted is settled at import.
    from elpo_kernels.rows_triton import gradient_kernel, launch

    logits, which, column, scale, softcap = rows
    alpha, beta, at_target = gradient
    launch(
        gradient_kernel,
        len(which),
        logits,
        which,
        scale,  # stands for the bias, which is not read
        scale,
        offset,
        column,
        alpha,
        alpha if beta is None else beta,
        at_target,
        out,
        0,
        logits.shape[1],
        logits.stride(0),
        out.stride(0),
        HAS_BIAS=False,
        SOFTCAP=softcap,
        ENTROPY=beta is not None,
    )


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, temperatures, targets, *ctx.numbers, ctx.want_entropy, ctx.in_place = inputs
    ctx.save_for_backward(logits, temperatures, targets, *output)


def _logits_backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Any, ...]:
    logits, temperatures, targets, logprob, entropy = ctx.saved_tensors
    pulled = Pulled(logprob, entropy, grad_logprob, grad_entropy if ctx.want_entropy else None)
    softmax = Softmax(temperatures, targets, *ctx.numbers)
    return gradient_of(logits.detach(), softmax, pulled, in_place=ctx.in_place), *(None,) * 8


def gradient_of(logits: Tensor, softmax: Softmax, pulled: Pulled, *, in_place: bool) -> Tensor:
    """What `logits_gradient_op` writes: over the logits, or beside them."""
    out = logits if in_place else torch.empty_like(logits)
    torch.ops.elpo_kernels.logits_gradient_(out, None if in_place else logits, *softmax, *pulled)
    return out


logits_logprob_op.register_autograd(_logits_backward, setup_context=_save_logits)
