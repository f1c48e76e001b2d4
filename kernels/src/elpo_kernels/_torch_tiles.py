"""Tile arithmetic in plain PyTorch operations, for any device; the fast path on CPU.

Every function sees one tile: a block of rows times a strip of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elpo_kernels._head import LN2, LOG2E, Head, Rows, accumulation


def moved(top: Tensor, origin: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Sums Σ 2^(L−top) and Σ 2^(L−top)·(L−top), taken relative to `origin` instead."""
    shift = torch.where(top.isinf(), 0, top - origin)
    fade = shift.exp2()
    return fade * total, fade * (moment + shift * total)


def combined(head: Head, top: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Over all shards: log2 Σ 2^L and the mean of L under the normalised 2^L."""
    if head.group is not None:
        highest = head.all_max(top.clone())
        origin = torch.where(highest.isinf(), 0, highest)
        total, moment = head.all_reduce(torch.stack(moved(top, origin, total, moment)))
        top = highest
    return top + total.log2(), torch.where(total > 0, moment / total + top, 0)


class TorchTiles:
    """Scratch memory and the operations on tiles. Not thread-safe; make one a call."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.acc = accumulation(head.dtype)
        # Products are rounded to the operands' dtype: see `Rows`.
        self.rounds_logits = head.dtype != self.acc
        self._held: dict[torch.dtype, Tensor] = {}

    def _scratch(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        held = self._held.get(dtype)
        if held is None or held.numel() < rows * columns:
            held = torch.empty(rows * columns, dtype=dtype, device=self.head.weights[0].device)
            self._held[dtype] = held
        return held[: rows * columns].view(rows, columns)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a·b in the accumulation dtype."""
        return torch.mm(a, b).to(self.acc)

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a·b, `total` in the accumulation dtype."""
        if a.dtype == total.dtype:
            total.addmm_(a, b)
        else:
            total += torch.mm(a, b)

    def _logits(self, rows: Rows, strip: slice, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """L `[R, strip]` in the accumulation dtype, written over `out` where that is its dtype;
        and the soft cap's derivative."""
        head = self.head
        scale = LOG2E * float(rows.inv_temperature) if head.plain else 1.0
        for i, (x, weight) in enumerate(zip(rows.xs, head.weights, strict=True)):
            before = rows.anchor.expand_as(out) if i == 0 else out
            torch.addmm(before, x, weight[strip].t(), alpha=scale, out=out)
        tile = (
            out
            if out.dtype == self.acc
            else self._scratch(len(out), out.shape[1], self.acc).copy_(out)
        )
        if head.plain:
            return tile, None
        tile.sub_(rows.anchor.to(self.acc))
        if head.bias is not None:
            tile.add_(head.bias[strip])
        slope = None
        if head.softcap:
            # tanh(x) = 2σ(2x) − 1; PyTorch's sigmoid is ten times faster on CPU
            tile.mul_(2 / head.softcap).sigmoid_().mul_(2).sub_(1)
            slope = 1 - tile * tile
            tile.mul_(head.softcap)
        tile.mul_(rows.inv_temperature).sub_(rows.logit[:, None])
        return tile.mul_(LOG2E).add_(rows.target[:, None]), slope

    def _targets(self, rows: Rows, strip: slice) -> tuple[Tensor, Tensor]:
        """Row and column, within the tile, of every target that lies in it."""
        row = ((rows.column >= strip.start) & (rows.column < strip.stop)).nonzero()[:, 0]
        return row, rows.column[row] - strip.start

    def sums(self, rows: Rows, want_entropy: bool) -> tuple[Tensor, Tensor]:
        """log2 Σ_{v≠target} 2^L_v and Σ_{v≠target} p̂_v L_v `[R]`, p̂ normalised without the target;
        safe for any L."""
        count = len(rows.column)
        top = torch.full((count,), -torch.inf, dtype=self.acc, device=rows.column.device)
        total, moment = torch.zeros_like(top), torch.zeros_like(top)
        for strip in self.head.strips():
            width = strip.stop - strip.start
            tile, _ = self._logits(rows, strip, self._scratch(count, width, self.head.dtype))
            row, column = self._targets(rows, strip)
            tile[row, column] = -torch.inf
            higher = torch.maximum(top, tile.amax(1))
            origin = torch.where(higher.isinf(), 0, higher)
            tile.sub_(origin[:, None])
            total, moment = moved(top, origin, total, moment)
            if want_entropy:
                power = tile.exp2()
                tile[row, column] = 0
                moment += (power * tile).sum(1)
                tile = power
            else:
                tile.exp2_()
            total += tile.sum(1)
            top = higher
        return combined(self.head, top, total, moment)

    def powers(
        self, rows: Rows, out: Tensor, position: Tensor | None, want_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Write E = 2^L `[R, V]`, 0 at the target, to rows `position` of `out` (to all of them by
        default); return Σ E and Σ E·L over this shard. E holds the soft cap's derivative too."""
        count = len(rows.column)
        total = torch.zeros(count, dtype=self.acc, device=out.device)
        moment = torch.zeros_like(total)
        for strip in self.head.strips():
            place = out[:, strip]
            if position is not None:
                place = self._scratch(count, strip.stop - strip.start, self.head.dtype)
            tile, slope = self._logits(rows, strip, place)
            row, column = self._targets(rows, strip)
            if want_entropy:
                power = tile.exp2()
                power[row, column] = 0
                moment += (power * tile).sum(1)
                tile.copy_(power)
            else:
                tile.exp2_()[row, column] = 0
            total += tile.sum(1)
            if slope is not None:
                tile.mul_(slope)
            if tile is not place:
                place.copy_(tile)
            if position is not None:
                out[position, strip] = place
        return total, moment

    def with_entropy(self, kept: Tensor, alpha: Tensor, beta: Tensor) -> None:
        """E ← E · (α + β ln E) in place, α and β `[R]`."""
        for strip in self.head.strips():
            power = kept[:, strip].to(self.acc)
            log = power.clamp_min(torch.finfo(torch.float32).tiny).log2_().mul_(LN2)
            kept[:, strip] = power.mul_(log.mul_(beta[:, None]).add_(alpha[:, None]))

    def gradient(
        self,
        rows: Rows,
        strip: slice,
        alpha: Tensor,
        beta: Tensor | None,
        at_target: Tensor,
        out: Tensor,
    ) -> None:
        """dloss/dlogits `[R, strip]` before the soft cap and temperature: 2^L · (α + β ln 2^L), at
        the target `at_target`; the rows are anchored near their log-sum-exp."""
        tile, slope = self._logits(rows, strip, out)
        row, column = self._targets(rows, strip)
        if beta is None:
            tile.exp2_().mul_(alpha[:, None])
        else:
            factor = (tile * LN2).mul_(beta[:, None]).add_(alpha[:, None])
            # where p underflows to 0 its logarithm is finite, so the product is 0
            tile.exp2_().mul_(factor)
        tile[row, column] = at_target[row]
        if slope is not None:
            tile.mul_(slope)
        if tile is not out:
            out.copy_(tile)
