"""The policy loss and its gradients in one pass over the vocabulary: see `passes` for the algebra.

Two passes are made where the weight's gradient is narrower than its sum, which would have to be
kept from the first block of tokens to the last, and there is no room for it: see `Tiling`. GPUs
always make one.

Tokens are dropped twice: those without a coefficient before they meet the head, those whose
gradient turns out to be zero (clipped) before the backward products. The powers E of the remaining
rows are packed into one buffer, and whenever it is full both backward products run over all of it;
their cost is proportional to the tokens that have a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elpo_kernels.linear.head import Head, Rows, anchored, column, guessed, subset
from elpo_kernels.linear.passes import (
    ANCHOR_LIMIT,
    ROUNDED_ANCHOR_LIMIT,
    Gradients,
    Problem,
    backward,
    forward,
)
from elpo_kernels.policy import Clip, Surrogate, statistics, surrogate
from elpo_kernels.rows import LN2, measured


class Objective(NamedTuple):
    """The loss of every token; those without a target have no coefficients."""

    clip: Clip
    entropy_coef: Tensor | None  # [T]
    backend: str

    def surrogate(self, logprob: Tensor, index: Tensor) -> Surrogate:
        """`policy.surrogate` of the tokens `index`, whose log-probs are given."""
        return surrogate(logprob, self.clip.at(index), self.backend)

    def live(self) -> Tensor:
        """Which tokens have a coefficient, `[T]`."""
        live = self.clip.live
        return live if self.entropy_coef is None else live | (self.entropy_coef != 0)

    def guess(self, index: Tensor) -> Tensor:
        """Expected log-prob: the old one where it is sane."""
        if self.clip.old_logprob is None:
            return torch.zeros_like(self.clip.pos[index])
        return self.clip.old_logprob[index].nan_to_num(0, 0, 0).clamp(-1e4, 0)


class Result(NamedTuple):
    loss: Tensor
    logprob: Tensor  # [T]
    entropy: Tensor  # [T]
    stats: Tensor  # [7]
    gradients: list[Tensor]


def loss_and_gradients(
    problem: Problem,
    objective: Objective,
    index: Tensor,
    want_entropy: bool,
    main_grad: Tensor | None,
) -> Result:
    """Loss, statistics and gradients over the tokens `index` (distinct, ascending)."""
    tiling, entropy_coef = problem.head.tiling, objective.entropy_coef
    want_entropy = want_entropy or entropy_coef is not None
    room = tiling.sums_fit or len(index) <= tiling.kept or main_grad is not None
    gradients = found = None
    if any(problem.needs) and room:
        sums = Gradients(problem, main_grad)
        logprob, entropy = _OnePass(problem, objective, sums, want_entropy).run(index)
        gradients = sums.finish()
    else:
        found = forward(problem, index, want_entropy)
        logprob, entropy = found.logprob, found.entropy
    loss = torch.zeros_like(logprob)
    log_ratio = torch.zeros_like(logprob)
    flags = torch.zeros(len(logprob), dtype=torch.int8, device=logprob.device)
    slope = torch.zeros_like(logprob)
    # For the sum and the statistics; one pass has used its slopes already, in `_measure`.
    loss[index], slope[index], log_ratio[index], flags[index] = objective.surrogate(
        logprob[index], index
    )
    if gradients is None:
        assert found is not None
        pull = None if entropy_coef is None else -entropy_coef
        live = slope != 0 if pull is None else (slope != 0) | (pull != 0)
        live &= any(problem.needs)
        gradients = backward(problem, found, slope, pull, live.nonzero()[:, 0])
    total = loss.sum()
    if entropy_coef is not None:
        total = total - (entropy_coef * entropy).sum()
    stats = statistics(log_ratio, flags, objective.clip)
    return Result(total, logprob, entropy, stats, gradients)


class _Measured(NamedTuple):
    """Of a block's rows, each `[R]`."""

    log_total: Tensor  # log2 Z
    logprob: Tensor
    slope: Tensor  # the loss's derivative by it
    live: Tensor  # which rows have a gradient


class _OnePass:
    """Powers of block after block, and both backward products whenever their buffer is full."""

    def __init__(
        self, problem: Problem, objective: Objective, gradients: Gradients, want_entropy: bool
    ) -> None:
        self.problem, self.objective, self.gradients = problem, objective, gradients
        self.want_entropy = want_entropy
        self.logprob = problem.per_token()
        self.entropy = torch.zeros_like(self.logprob)

    def run(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy `[T]` of the tokens `index`, whose gradients are added up."""
        tiling = self.problem.head.tiling
        kept = _memory(self.problem.head, len(index))
        most = _equal(len(kept), tiling.at_once, tiling.grain)
        pending: list[tuple[Tensor, Tensor]] = []  # index and row factor of what `kept` holds
        start = filled = 0
        while start < len(index):
            rest, room = len(index) - start, len(kept) - filled
            # Measured: a block of half size costs more than adding half as many rows at once.
            if room < min(5 * min(tiling.rows, len(kept)) // 8, tiling.kept, rest):
                if filled:
                    self._flush(pending, kept[:filled], last=False)
                pending.clear()
                filled, room = 0, len(kept)
            block = index[start : start + min(most, room)]
            start += len(block)
            pending.append(self.take(block, kept[filled : filled + len(block)]))
            filled += len(pending[-1][0])
        if pending:
            self._flush(pending, kept[:filled], last=True)
        return self.logprob, self.entropy

    def _flush(self, pending: list[tuple[Tensor, Tensor]], kept: Tensor, last: bool) -> None:
        where, factor = (torch.cat(parts) for parts in zip(*pending, strict=True))
        self.gradients.add(where, kept, factor, last)

    def take(self, block: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the logit gradients of the rows of `block` that have any in the first rows of
        `place`, but for a factor: these rows and their factors. The device is waited for once."""
        head, tiles = self.problem.head, self.problem.tiles
        rows = self.problem.rows(block)
        rows = anchored(head, rows, guessed(rows, self.objective.guess(block)))
        sums = self._powers(rows, place, None)
        found = self._measure(rows, sums, block)
        limit = ROUNDED_ANCHOR_LIMIT if tiles.rounds_logits else ANCHOR_LIMIT
        far = ~(found.log_total.abs() <= limit)
        counts = torch.stack([far.sum(), found.live.sum()])
        # With an entropy term only once; else all may be done again: not to wait before it.
        once = self.objective.entropy_coef is not None
        factor = found.log_total if once else self._finish(rows, sums, block, place, found)
        lost, count = counts.tolist()
        if lost:  # anchors too far from their log-sum-exp
            again = far.nonzero()[:, 0]
            worst = subset(rows, again)
            logprob_there, _ = measured(worst.target, *tiles.sums(worst, False))
            nearer = anchored(head, worst, guessed(worst, logprob_there))
            sums[:, again] = self._powers(nearer, place, again)
            rows.target[again] = nearer.target
            found = self._measure(rows, sums, block)
            count = int(found.live.sum())
        if lost or once:
            factor = self._finish(rows, sums, block, place, found)
        if count == len(found.live):
            return block, factor
        order = tiles.compact(place, found.live, count)
        return block[order], factor[order]

    def _powers(self, rows: Rows, place: Tensor, position: Tensor | None) -> Tensor:
        """Fill rows `position` of `place` (by default all) with E; Σ E and Σ E·L over all shards,
        `[2, R]`."""
        sums = self.problem.tiles.powers(rows, place, position, self.want_entropy)
        return self.problem.head.all_reduce(torch.stack(sums))

    def _measure(self, rows: Rows, sums: Tensor, block: Tensor) -> _Measured:
        odds = (sums[0].log2() - rows.target) * LN2
        found = -torch.logaddexp(torch.zeros_like(odds), odds)
        slope = self.objective.surrogate(found, block).slope
        live = slope != 0
        if self.objective.entropy_coef is not None:
            live |= self.objective.entropy_coef[block] != 0
        return _Measured(torch.logaddexp2(rows.target, sums[0].log2()), found, slope, live)

    def _finish(
        self, rows: Rows, sums: Tensor, block: Tensor, place: Tensor, measured: _Measured
    ) -> Tensor:
        """Note the block's log-probs and entropies, and turn its powers into the logits' gradients
        but for a factor, which is returned."""
        (total, moment), (log_total, found, slope, _) = sums, measured
        self.logprob[block] = found
        if self.want_entropy:
            others = (total * log_total - moment) * torch.exp2(-log_total)
            self.entropy[block] = others * LN2 - found.exp() * found
        factor = torch.exp2(-log_total) * column(rows.inv_temperature)
        if self.objective.entropy_coef is None:
            factor = -slope * factor
            at_target = -total
        else:
            # dloss/dentropy = -pull
            pull, entropy = self.objective.entropy_coef[block], self.entropy[block]
            offset = pull * (entropy - log_total * LN2) - slope
            self.problem.tiles.with_entropy(place, offset * factor, pull * factor)
            at_target = pull * found.exp() * (found + entropy) - slope * torch.expm1(found)
            at_target *= column(rows.inv_temperature)
            factor = torch.ones_like(factor)
        _write_targets(self.problem.head, rows, place, at_target)
        return factor


def _equal(count: int, most: int, grain: int) -> int:
    """Size of as few parts of equal size as hold `count`, rounded up to `grain`, which divides
    `most`: a short last one is inefficient."""
    size = -(-count // max(1, -(-count // most)))
    return min(count, -(-size // grain) * grain)


def _memory(head: Head, count: int) -> Tensor:
    """Where the powers of some of `count` rows are kept, `[n, V]`."""
    # With rows whole pages apart the same columns of all would share a few sets of the caches.
    row_bytes = head.vocabulary * head.dtype.itemsize
    stride = head.vocabulary + (64 // head.dtype.itemsize if row_bytes % 4096 == 0 else 0)
    rows = _equal(count, head.tiling.held(count), head.tiling.grain)
    kept = torch.empty(rows, stride, dtype=head.dtype, device=head.weights[0].device)
    return kept[:, : head.vocabulary]


def _write_targets(head: Head, rows: Rows, place: Tensor, values: Tensor) -> None:
    """Put the logit gradients of the targets, up to the rows' factors, into their columns."""
    if head.softcap:
        capped = rows.logit / column(rows.inv_temperature) / head.softcap
        values = values * (1 - capped * capped)
    if head.group is None:  # every target is here: nothing to wait for on a GPU
        mine = torch.arange(len(values), device=values.device)
    else:
        mine = (rows.column >= 0).nonzero()[:, 0]
    place[mine, rows.column[mine]] = values[mine].to(place.dtype)
