"""Arithmetic on rows of logits: a tile `[R, columns]` in plain PyTorch, mostly in place.

`rows_triton` has the same as kernels: `add_sums` is `sums_kernel`, `to_gradient` `gradient_kernel`.

Tiles are in the accumulation dtype. A target column outside `0 … columns − 1` is not in the tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = 1 / math.log(2)
LN2 = math.log(2)


class LogitGradient(NamedTuple):
    """dloss/dlogits of rows of levels L: 2^L · (α + β ln 2^L), and `at_target` at the target."""

    alpha: Tensor  # [R]
    beta: Tensor | None  # [R]; None: 0
    at_target: Tensor  # [R]

    def at(self, rows: slice | Tensor) -> LogitGradient:
        """That of some of the rows."""
        beta = None if self.beta is None else self.beta[rows]
        return LogitGradient(self.alpha[rows], beta, self.at_target[rows])


def cut(start: int, stop: int, size: int) -> Iterator[slice]:
    """`start … stop` in slices of `size`."""
    for low in range(start, stop, size):
        yield slice(low, min(low + size, stop))


def blocks(index: Tensor, rows: int) -> Sequence[Tensor]:
    """`index` in pieces of `rows`; none where it is empty."""
    return index.split(rows) if len(index) else ()


def levels(
    tile: Tensor, bias: Tensor | None, scale: Tensor, offset: Tensor, softcap: float
) -> Tensor | None:
    """Raw logits become L = scale · softcap(z + bias) + offset in place, `scale` and `offset`
    `[R]`; returns the soft cap's derivative."""
    if bias is not None:
        tile.add_(bias)
    cap_grad = None
    if softcap:
        # tanh(x) = 2σ(2x) − 1; PyTorch's sigmoid is ten times faster on CPU
        tile.mul_(2 / softcap).sigmoid_().mul_(2).sub_(1)
        cap_grad = 1 - tile * tile
        tile.mul_(softcap)
    tile.mul_(scale[:, None]).add_(offset[:, None])
    return cap_grad


def locate(target: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every target that lies in the tile."""
    row = ((target >= 0) & (target < columns)).nonzero()[:, 0]
    return row, target[row]


def moved(top: Tensor, origin: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Sums Σ 2^(L−top) and Σ 2^(L−top)·(L−top), taken relative to `origin` instead."""
    shift = torch.where(top.isinf(), 0, top - origin)
    fade = shift.exp2()
    return fade * total, fade * (moment + shift * total)


def add_sums(
    tile: Tensor, target: Tensor, state: tuple[Tensor, Tensor, Tensor], want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The running maximum of L, Σ 2^(L−top) and Σ 2^(L−top)·(L−top) without the target `[R]`, after
    this tile of L, which is overwritten."""
    top, total, moment = state
    at = locate(target, tile.shape[1])
    tile[at] = -torch.inf
    higher = torch.maximum(top, tile.amax(1))
    origin = torch.where(higher == -torch.inf, 0, higher)
    tile.sub_(origin[:, None])
    total, moment = moved(top, origin, total, moment)
    if want_entropy:
        power = tile.exp2()
        moment = moment + power.mul(tile.clamp_min_(-1e4)).sum(1)  # 0 · −inf is 0 here
        return higher, total + power.sum(1), moment
    return higher, total + tile.exp2_().sum(1), moment


def closed(top: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """log2 Σ 2^L and the entropy in bits of the normalised 2^L, from the finished sums."""
    bits = total.log2()
    return top + bits, torch.where(total > 0, bits - moment / total, 0)


def measured(target: Tensor, log_rest: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy in nats from L of the target, log2 S and the entropy in bits among the
    other tokens; either the target or the others may be impossible (−inf)."""
    odds = (log_rest - target) * LN2  # of all other tokens against the target
    zero = torch.zeros_like(odds)
    logprob, log_others = -torch.logaddexp(zero, odds), -torch.logaddexp(zero, -odds)
    own = torch.where(logprob == -torch.inf, 0, logprob.exp() * logprob)
    others = torch.where(log_others == -torch.inf, 0, log_others.exp() * (rest * LN2 - log_others))
    return logprob, others - own


def to_gradient(
    tile: Tensor, cap_grad: Tensor | None, target: Tensor, gradient: LogitGradient
) -> None:
    """L becomes `gradient` in place, times the soft cap's derivative `cap_grad`."""
    alpha, beta, at_target = gradient
    if beta is None:
        tile.exp2_().mul_(alpha[:, None])
    else:
        tile.clamp_min_(-1e4)  # 0 · −inf is 0 here
        factor = (tile * LN2).mul_(beta[:, None]).add_(alpha[:, None])
        tile.exp2_().mul_(factor)
    row, column = locate(target, tile.shape[1])
    tile[row, column] = at_target[row]
    if cap_grad is not None:
        tile.mul_(cap_grad)
