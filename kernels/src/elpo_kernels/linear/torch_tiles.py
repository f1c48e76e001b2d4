"""Tile arithmetic in plain PyTorch operations, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from elpo_kernels.checks import accumulation
from elpo_kernels.linear.head import Head, Rows, column
from elpo_kernels.rows import (
    LN2,
    LOG2E,
    LogitGradient,
    add_sums,
    closed,
    cut,
    levels,
    locate,
    moved,
    to_gradient,
)


def combined(head: Head, top: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """`closed` over all shards."""
    if head.group is not None:
        highest = head.all_max(top.clone())
        origin = torch.where(highest.isinf(), 0, highest)
        total, moment = head.all_reduce(torch.stack(moved(top, origin, total, moment)))
        top = highest
    return closed(top, total, moment)


class TorchTiles:
    """Scratch memory and the operations on tiles: a block of rows times a strip of vocabulary. Not
    to be shared by callers; make one a call."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.acc = accumulation(head.dtype)
        # Products are rounded to the operands' dtype: see `Rows`.
        self.rounds_logits = head.dtype != self.acc
        self._held: dict[tuple[torch.dtype, str], Tensor] = {}  # scratch by dtype and use
        # Of each weight the strip that was converted last.
        self._converted: dict[int, tuple[slice, Tensor]] = {}

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a·b, perhaps rounded to the operands' dtype."""
        return torch.mm(a, b)

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
        """total += a·b, `total` in the accumulation dtype; `first`: it holds nothing yet."""
        if a.dtype == total.dtype:
            total.addmm_(a, b, beta=0 if first else 1)
        elif first:
            total.copy_(torch.mm(a, b))
        else:
            total += torch.mm(a, b)

    def at_targets(self, xs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the targets in this shard `[R]`, -1 where they are in another, and their
        logits before and after the bias `[2, R]`, 0 there."""
        head = self.head
        column = targets - head.first
        mine = (column >= 0) & (column < head.vocabulary)
        safe = torch.where(mine, column, 0)
        raw = torch.zeros(len(targets), dtype=self.acc, device=targets.device)
        for x, weight in zip(xs, head.weights, strict=True):
            # With all rows at once the copies would be the peak of the memory.
            for part in cut(0, len(raw), head.tiling.rows):
                raw[part] += weight[safe[part]].to(self.acc).mul_(x[part]).sum(1)
        logit = raw if head.bias is None else raw + head.bias[safe]
        both = torch.where(mine, torch.stack([raw, logit]), 0)
        return torch.where(mine, column, -1), both

    def compact(self, place: Tensor, live: Tensor, count: int) -> Tensor:
        """Move the last of the `count` live rows of `place` onto the dead ones among the first, so
        that the live ones come first; the rows they were, in their new order. As little is moved as
        can be."""
        order = torch.arange(count, device=live.device)
        holes, movers = (~live[:count]).nonzero()[:, 0], live[count:].nonzero()[:, 0] + count
        order[holes] = movers
        for part in place.split(self.head.tiling.strip, 1):
            source = movers[:, None].expand(-1, part.shape[1])
            part.index_copy_(0, holes, part.gather(0, source))
        return order

    def weight(self, i: int, strip: slice) -> Tensor:
        """Rows `strip` of a weight in the dtype of the products, valid until the next strip."""
        weight = self.head.weights[i]
        if weight.dtype == self.head.dtype:
            return weight[strip]
        known, rows = self._converted.get(i), strip.stop - strip.start
        if known is not None and known[0] == strip:
            return known[1][:rows]
        if known is None or len(known[1]) < rows:
            memory = torch.empty(rows, weight.shape[1], dtype=self.head.dtype, device=weight.device)
        else:
            memory = known[1]
        self._converted[i] = strip, memory
        return memory[:rows].copy_(weight[strip])

    def through_weight(self, kept: Tensor, i: int) -> Tensor:
        """kept · W_i, perhaps rounded to the operands' dtype."""
        weight = self.head.weights[i]
        if weight.dtype == kept.dtype:
            return self.product(kept, weight)
        total = kept.new_zeros(len(kept), weight.shape[1])
        for strip in self.head.strips():
            total.addmm_(kept[:, strip], self.weight(i, strip))
        return total

    def _scratch(self, rows: int, columns: int, dtype: torch.dtype, use: str = "tile") -> Tensor:
        """The same memory for every tile: new for each, it would leave holes in glibc's heap."""
        held = self._held.get((dtype, use))
        if held is None or held.numel() < rows * columns:
            held = torch.empty(rows * columns, dtype=dtype, device=self.head.weights[0].device)
            self._held[dtype, use] = held
        return held[: rows * columns].view(rows, columns)

    def _levels(self, rows: Rows, strip: slice, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """L `[R, strip]` in the accumulation dtype, written over `out` where that is its dtype;
        and the soft cap's derivative."""
        head = self.head
        factor = LOG2E * float(rows.inv_temperature) if head.plain else 1.0
        for i, x in enumerate(rows.xs):
            before = out if i else rows.anchor.expand_as(out)
            torch.addmm(before, x, self.weight(i, strip).t(), alpha=factor, out=out)
        tile = (
            out
            if out.dtype == self.acc
            else self._scratch(out.shape[0], out.shape[1], self.acc).copy_(out)
        )
        if head.plain:
            return tile, None
        tile.sub_(rows.anchor.to(self.acc))
        scale = (LOG2E * column(rows.inv_temperature)) * torch.ones_like(rows.raw)
        bias = None if head.bias is None else head.bias[strip]
        return tile, levels(tile, bias, scale, rows.offset, head.softcap)

    def sums(self, rows: Rows, want_entropy: bool) -> tuple[Tensor, Tensor]:
        """log2 Σ 2^L without the target and the entropy in bits of those 2^L `[R]`, for any L, over
        all shards."""
        zeros = torch.zeros_like(rows.raw)
        state = torch.full_like(zeros, -torch.inf), zeros, zeros
        for strip in self.head.strips():
            place = self._scratch(len(zeros), strip.stop - strip.start, self.head.dtype)
            tile, _ = self._levels(rows, strip, place)
            state = add_sums(tile, rows.column - strip.start, state, want_entropy)
        return combined(self.head, *state)

    def powers(
        self, rows: Rows, out: Tensor, position: Tensor | None, want_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Write E = 2^L `[R, V]`, 0 at the target, to rows `position` of `out` (to all of them by
        default); return Σ E and Σ E·L over this shard. E holds the soft cap's derivative too."""
        total = torch.zeros_like(rows.raw)
        moment = torch.zeros_like(total)
        for strip in self.head.strips():
            place = out[:, strip]
            if position is not None:
                place = self._scratch(len(total), strip.stop - strip.start, self.head.dtype)
            tile, cap_grad = self._levels(rows, strip, place)
            at = locate(rows.column - strip.start, tile.shape[1])
            if want_entropy:
                power = self._scratch(len(tile), tile.shape[1], self.acc, "powers")
                torch.exp2(tile, out=power)[at] = 0
                moment += tile.mul_(power).sum(1)
                tile.copy_(power)
            else:
                tile.exp2_()[at] = 0
            total += tile.sum(1)
            if cap_grad is not None:
                tile.mul_(cap_grad)
            if tile is not place:
                place.copy_(tile)
            if position is not None:
                out[position, strip] = place
        return total, moment

    def with_entropy(self, kept: Tensor, alpha: Tensor, beta: Tensor) -> None:
        """E ← E · (α + β ln E) in place, α and β `[R]`."""
        for strip in self.head.strips():
            power = kept[:, strip].to(self.acc)
            log = self._scratch(len(power), power.shape[1], self.acc, "powers")
            torch.clamp_min(power, torch.finfo(torch.float32).tiny, out=log).log2_().mul_(LN2)
            kept[:, strip] = power.mul_(log.mul_(beta[:, None]).add_(alpha[:, None]))

    def gradient(self, rows: Rows, strip: slice, gradient: LogitGradient, out: Tensor) -> None:
        """dloss/dlogits `[R, strip]` before soft cap and temperature; the rows are anchored near
        their log-sum-exp."""
        tile, cap_grad = self._levels(rows, strip, out)
        to_gradient(tile, cap_grad, rows.column - strip.start, gradient)
        if tile is not out:
            out.copy_(tile)
