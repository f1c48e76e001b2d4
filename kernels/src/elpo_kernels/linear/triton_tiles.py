"""Tile arithmetic on GPUs: the vendor's matrix products with float32 results, Triton for the rest.

A strip of logits is produced by one product and consumed while it is still in the second-level
cache, so that of the `[rows, V]` block only the powers, in the operands' dtype, reach memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elpo_kernels.linear.head import Head, Rows, column
from elpo_kernels.linear.torch_tiles import combined
from elpo_kernels.rows import LOG2E, LogitGradient, cut
from elpo_kernels.rows_triton import (
    gradient_kernel,
    launch,
    move_kernel,
    powers_kernel,
    sums_kernel,
    target_kernel,
    with_entropy_kernel,
)


class TritonTiles:
    """See `TorchTiles` for what each method does."""

    rounds_logits = False
    acc = torch.float32

    def __init__(self, head: Head) -> None:
        self.head = head
        self._held: Tensor | None = None

    def _out(self, operand: Tensor) -> dict[str, Any]:
        """Ask for float32 results where operands are narrower; CPU tensors exist for the
        interpreter alone, in float32."""
        return {} if operand.dtype == self.acc else {"out_dtype": self.acc}

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, **self._out(a))

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
        if not first:
            torch.addmm(total, a, b, **self._out(a), out=total)
        elif total.dtype == self.acc:
            torch.mm(a, b, **self._out(a), out=total)
        elif total.dtype == a.dtype:  # rounded once, as it is written
            torch.mm(a, b, out=total)
        else:
            total.copy_(torch.mm(a, b))

    def at_targets(self, xs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        head = self.head
        column = torch.empty_like(targets, dtype=torch.int64)
        both = torch.zeros(2, len(targets), dtype=self.acc, device=targets.device)
        for i, (x, weight) in enumerate(zip(xs, head.weights, strict=True)):
            launch(
                target_kernel,
                len(targets),
                x,
                weight,
                x if head.bias is None else head.bias,
                targets,
                column,
                *both,
                head.first,
                *weight.shape,
                x.stride(0),
                *weight.stride(),
                HAS_BIAS=i == 0 and head.bias is not None,
            )
        return column, both

    def compact(self, place: Tensor, live: Tensor, count: int) -> Tensor:
        """Without a wait: which rows move is known on the device alone."""
        dead = ~live
        movers = count + torch.argsort(dead[count:].byte(), stable=True)
        hole = (torch.cumsum(dead[:count], 0) - 1).clamp_(0, len(movers) - 1)
        order = torch.arange(count, device=live.device)
        order = torch.where(dead[:count], movers[hole], order)
        launch(move_kernel, count, place, order, place.shape[1], place.stride(0))
        return order

    def weight(self, i: int, strip: slice) -> Tensor:
        return self.head.weights[i][strip]

    def through_weight(self, kept: Tensor, i: int) -> Tensor:
        return self.product(kept, self.head.weights[i])

    def _logits(self, xs: tuple[Tensor, ...], weights: Sequence[Tensor]) -> Tensor:
        """Raw logits `[R, strip]`, float32, in scratch memory; `weights` each `[H_i, strip]`."""
        shape = len(xs[0]), weights[0].shape[1]
        if self._held is None or self._held.numel() < shape[0] * shape[1]:
            self._held = torch.empty(shape, dtype=self.acc, device=xs[0].device).view(-1)
        tile = self._held[: shape[0] * shape[1]].view(shape)
        for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
            self.accumulate(tile, x, weight, first=i == 0)
        return tile

    def _strips(self) -> list[tuple[slice, list[Tensor]]]:
        """Every strip of the vocabulary, and the weights `[H_i, strip]` there."""
        return [
            (strip, [weight[strip].t() for weight in self.head.weights])
            for strip in self.head.strips()
        ]

    def _every(self, rows: Rows) -> Tensor:
        return torch.arange(len(rows.column), device=rows.column.device)

    def _scale(self, rows: Rows) -> Tensor:
        scale = LOG2E * column(rows.inv_temperature)
        return scale if isinstance(scale, Tensor) else torch.full_like(rows.raw, scale)

    def _bias(self, rows: Rows) -> Tensor:
        """Read only where there is one."""
        return rows.raw if self.head.bias is None else self.head.bias

    def _flags(self, entropy: bool) -> dict[str, bool | float]:
        return {
            "HAS_BIAS": self.head.bias is not None,
            "SOFTCAP": self.head.softcap,
            "ENTROPY": entropy,
        }

    def sums(self, rows: Rows, want_entropy: bool) -> tuple[Tensor, Tensor]:
        top = torch.full_like(rows.raw, -torch.inf)
        total, moment = torch.zeros_like(top), torch.zeros_like(top)
        every, scale = self._every(rows), self._scale(rows)
        for strip, weights in self._strips():
            tile = self._logits(rows.xs, weights)
            launch(
                sums_kernel,
                len(top),
                tile,
                every,
                self._bias(rows),
                scale,
                rows.offset,
                rows.column,
                top,
                total,
                moment,
                strip.start,
                tile.shape[1],
                tile.stride(0),
                **self._flags(want_entropy),
            )
        return combined(self.head, top, total, moment)

    def powers(
        self, rows: Rows, out: Tensor, position: Tensor | None, want_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(rows.raw)
        moment = torch.zeros_like(total)
        if position is None:
            position = self._every(rows)
        scale, strips, flags = self._scale(rows), self._strips(), self._flags(want_entropy)
        for part in cut(0, len(total), self.head.tiling.rows):  # a strip each is a product
            xs = tuple(x[part] for x in rows.xs)
            per_row = self._bias(rows), scale[part], rows.offset[part], rows.column[part]
            sums = position[part], total[part], moment[part]
            for strip, weights in strips:
                tile = self._logits(xs, weights)
                launch(
                    powers_kernel,
                    len(tile),
                    tile,
                    *per_row,
                    out,
                    *sums,
                    strip.start,
                    tile.shape[1],
                    tile.stride(0),
                    out.stride(0),
                    **flags,
                )
        return total, moment

    def with_entropy(self, kept: Tensor, alpha: Tensor, beta: Tensor) -> None:
        columns, stride = kept.shape[1], kept.stride(0)
        launch(with_entropy_kernel, len(kept), kept, alpha, beta, columns, stride)

    def gradient(self, rows: Rows, strip: slice, gradient: LogitGradient, out: Tensor) -> None:
        tile = self._logits(rows.xs, [weight[strip].t() for weight in self.head.weights])
        alpha, beta, at_target = gradient
        launch(
            gradient_kernel,
            len(alpha),
            tile,
            self._every(rows),
            self._bias(rows),
            self._scale(rows),
            rows.offset,
            rows.column,
            alpha,
            alpha if beta is None else beta,
            at_target,
            out,
            strip.start,
            tile.shape[1],
            tile.stride(0),
            out.stride(0),
            **self._flags(beta is not None),
        )
