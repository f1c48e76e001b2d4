"""The output layer and its tokens: as operators take them, as the passes see them, and blocks of
rows on their way through it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from elpo_kernels.linear.tiling import Tiling
from elpo_kernels.rows import LN2, LOG2E, cut


class HeadInputs(NamedTuple):
    """A head and its tokens, checked: the first fields of every operator's schema.

    `xs` and `weights` are of equal length; second members are those of a low-rank update."""

    xs: list[Tensor]  # each [T, H_i]
    weights: list[Tensor]  # each [V, H_i]
    bias: Tensor | None  # [V]
    temperatures: Tensor | None  # [T], beside a temperature of 1
    targets: Tensor  # [T]
    temperature: float
    softcap: float  # 0: none
    first: int  # row of the whole vocabulary that is this shard's first
    group: str  # of the shards; empty: the head is whole
    ignore_index: int
    backend: str

    @property
    def tensors(self) -> list[Tensor | None]:
        """Those that have gradients, in the order in which operators return these."""
        return [*self.xs, *self.weights, self.bias]

    @property
    def valid(self) -> Tensor:
        """Which tokens have a target, `[T]`."""
        return self.targets != self.ignore_index

    def detached(self) -> HeadInputs:
        return self._replace(
            xs=[x.detach() for x in self.xs],
            weights=[weight.detach() for weight in self.weights],
            bias=None if self.bias is None else self.bias.detach(),
        )


@dataclass(frozen=True, slots=True)
class Head:
    """Logits are Σ_i x_i W_iᵀ + bias, then soft-capped, then divided by the temperature. The sum
    over i has a second member where a low-rank update lies beside the base weight.

    A vocabulary-sharded head holds rows `first … first + V` of the whole; `group` connects the
    shards."""

    weights: tuple[Tensor, ...]  # each [V, H_i]
    dtype: torch.dtype  # of the matrix products; weights of another are converted strip by strip
    bias: Tensor | None  # [V], accumulation dtype
    softcap: float  # 0: none
    inv_temperature: float | Tensor  # Tensor: [T, 1]
    first: int
    group: dist.ProcessGroup | None
    tiling: Tiling

    @property
    def vocabulary(self) -> int:
        return self.weights[0].shape[0]

    @property
    def plain(self) -> bool:
        """Anchor, scale and logits come out of a single matrix product."""
        return self.bias is None and not self.softcap and isinstance(self.inv_temperature, float)

    def strips(self, width: int | None = None) -> Iterator[slice]:
        """The vocabulary in pieces of `width`, by default a tile's."""
        return cut(0, self.vocabulary, width or self.tiling.strip)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Elementwise sum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def all_max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values


def column(inv_temperature: float | Tensor) -> float | Tensor:
    """The inverse temperature as a factor for `[R]` arrays."""
    return inv_temperature[:, 0] if isinstance(inv_temperature, Tensor) else inv_temperature


@dataclass(slots=True)
class Rows:
    """One block of tokens on its way through the head. Its logits are held as base-2 logarithms
    relative to an anchor near the row's log-sum-exp: L_v = log2(e) · l_v + offset. A product of
    bfloat16 operands that is rounded to bfloat16 then loses nothing where it matters, at L ≈ 0."""

    xs: tuple[Tensor, ...]  # each [R, H_i]
    column: Tensor  # [R] target's column in this shard, -1 where another shard holds it
    raw: Tensor  # [R] target's logit before bias, soft cap and temperature
    logit: Tensor  # [R] target's logit
    inv_temperature: float | Tensor  # Tensor: [R, 1]
    anchor: Tensor  # [R, 1] added inside the product by `TorchTiles`
    offset: Tensor  # [R]
    target: Tensor  # [R] L of the target, once `anchored`


def guessed(rows: Rows, logprob: Tensor) -> Tensor:
    """log2 Σ e^l `[R]` of rows whose targets have this log-prob `[R]`."""
    return LOG2E * rows.logit - LOG2E * logprob


def anchored(head: Head, rows: Rows, log_sum: Tensor) -> Rows:
    """The same rows anchored where log2 Σ e^l is thought to be, `log_sum` [R]."""
    level, offset = LOG2E * rows.logit, -log_sum
    if head.plain:
        anchor = offset.to(head.dtype)
        offset = anchor.to(offset.dtype)
    else:
        anchor = LN2 * (level + offset) / column(rows.inv_temperature) - rows.raw
        anchor = anchor.to(head.dtype)
    return replace(rows, anchor=anchor[:, None], offset=offset, target=level + offset)


def subset(rows: Rows, index: Tensor | slice) -> Rows:
    """Rows `index` of a block."""
    scale = rows.inv_temperature
    return Rows(
        tuple(x[index] for x in rows.xs),
        rows.column[index],
        rows.raw[index],
        rows.logit[index],
        scale[index] if isinstance(scale, Tensor) else scale,
        rows.anchor[index],
        rows.offset[index],
        rows.target[index],
    )
