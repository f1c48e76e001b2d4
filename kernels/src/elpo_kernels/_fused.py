"""The policy loss and its gradients in one pass over the vocabulary: see `_engine` for the algebra.

Two passes are made where the weight's gradient is narrower than its sum, which would have to be
kept from the first block of tokens to the last, and there is no room for it: see `Tiling`.

Tokens are dropped twice: those without a coefficient before they meet the head, those whose
gradient turns out to be zero (clipped) before the backward products. The powers E of the remaining
rows are packed into one buffer, and whenever it is full both backward products run over all of it;
their cost is proportional to the tokens that have a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elpo_kernels._engine import (
    ANCHOR_LIMIT,
    ROUNDED_ANCHOR_LIMIT,
    Gradients,
    Tiles,
    Wanted,
    backward,
    forward,
    gather_rows,
    measured,
)
from elpo_kernels._head import (
    LN2,
    Head,
    Rows,
    anchored,
    column,
    guessed,
    subset,
)
from elpo_kernels.policy import statistics, surrogate


@dataclass(frozen=True, slots=True)
class Policy:
    """What the loss needs per token, each `[T]` in the accumulation dtype; bounds may be 0-d."""

    old_logprob: Tensor | None
    pos: Tensor
    neg: Tensor
    eps_low: Tensor
    eps_high: Tensor
    entropy_coef: Tensor | None
    ratio_cap: float
    backend: str

    def surrogate(self, logprob: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`policy.surrogate` of the tokens `index`, whose log-probs are given."""
        old = None if self.old_logprob is None else self.old_logprob[index]
        low = self.eps_low[index] if self.eps_low.ndim else self.eps_low
        high = self.eps_high[index] if self.eps_high.ndim else self.eps_high
        pos, neg = self.pos[index], self.neg[index]
        return surrogate(logprob, old, pos, neg, low, high, self.ratio_cap, self.backend)

    def guess(self, index: Tensor) -> Tensor:
        """Expected log-prob: the old one where it is sane."""
        if self.old_logprob is None:
            return torch.zeros_like(self.pos[index])
        return self.old_logprob[index].nan_to_num(0, 0, 0).clamp(-1e4, 0)


@dataclass(frozen=True, slots=True)
class Fused:
    loss: Tensor
    logprob: Tensor  # [T]
    entropy: Tensor  # [T]
    stats: Tensor  # [7]
    gradients: list[Tensor]


def fused(
    head: Head,
    xs: tuple[Tensor, ...],
    targets: Tensor,
    tiles: Tiles,
    wanted: Wanted,
    policy: Policy,
    index: Tensor,
    want_entropy: bool,
    like: Sequence[Tensor | None],
    main_grad: Tensor | None,
) -> Fused:
    """Loss, statistics and gradients over the tokens `index` (distinct, ascending)."""
    want_entropy = want_entropy or policy.entropy_coef is not None
    room = head.tiling.sums_fit or len(index) <= head.tiling.kept or main_grad is not None
    gradients = log_sum = None
    if wanted.any and room:
        sums = Gradients(head, xs, wanted, tiles, like, main_grad)
        logprob, entropy = _one_pass(head, xs, targets, tiles, policy, index, want_entropy, sums)
        gradients = sums.finish()
    else:
        logprob, entropy, log_sum = forward(head, xs, targets, tiles, index, want_entropy)
    loss = torch.zeros_like(logprob)
    log_ratio = torch.zeros_like(logprob)
    flags = torch.zeros(len(targets), dtype=torch.int8, device=targets.device)
    slope = torch.zeros_like(logprob)
    loss[index], slope[index], log_ratio[index], flags[index] = policy.surrogate(
        logprob[index], index
    )
    if gradients is None:
        assert log_sum is not None
        pull = None if policy.entropy_coef is None else -policy.entropy_coef
        live = slope != 0 if pull is None else (slope != 0) | (pull != 0)
        live &= wanted.any
        gradients = backward(
            head, xs, targets, tiles, wanted, logprob, entropy, log_sum, slope, pull,
            live.nonzero()[:, 0], like,
        )  # fmt: skip
    total = loss.sum()
    if policy.entropy_coef is not None:
        total = total - (policy.entropy_coef * entropy).sum()
    stats = statistics(log_ratio, flags, policy.pos, policy.neg)
    return Fused(total, logprob, entropy, stats, gradients)


def _one_pass(
    head: Head,
    xs: tuple[Tensor, ...],
    targets: Tensor,
    tiles: Tiles,
    policy: Policy,
    index: Tensor,
    want_entropy: bool,
    gradients: Gradients,
) -> tuple[Tensor, Tensor]:
    logprob = torch.zeros(len(targets), dtype=tiles.acc, device=targets.device)
    entropy = torch.zeros_like(logprob)
    kept = _memory(head, len(index))
    pending: list[tuple[Tensor, Tensor]] = []  # index and row factor of what `kept` holds
    limit = ROUNDED_ANCHOR_LIMIT if tiles.rounds_logits else ANCHOR_LIMIT
    start = filled = 0

    def flush(last: bool) -> None:
        nonlocal filled
        if filled or last:
            where, factor = (torch.cat(parts) for parts in zip(*pending, strict=True))
            gradients.add(where, kept[:filled], factor, last)
        pending.clear()
        filled = 0

    def take(block: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the logit gradients of the rows of `block` that have any in the first rows of
        `place`, but for a factor: these rows and their factors. The device is waited for once."""
        rows = gather_rows(head, tiles, xs, targets, block)
        # With anchors far from the log-sum-exp the entropy's sums would cancel.
        rows = anchored(head, rows, guessed(rows, policy.guess(block)), loose=not want_entropy)
        sums = _powers(head, tiles, rows, place, None, want_entropy)
        log_total, found, slope, live = measure(rows, sums, block)
        far = ~(log_total.abs() <= limit)
        counts = torch.stack([far.sum(), live.sum()])
        once = policy.entropy_coef is not None  # else all may be done again: not to wait before it
        factor = log_total if once else finish(rows, sums, block, place, log_total, found, slope)
        lost, count = counts.tolist()
        if lost:  # anchors too far from their log-sum-exp
            again = far.nonzero()[:, 0]
            worst = subset(rows, again)
            logprob_there, _ = measured(worst.target, *tiles.sums(worst, False))
            nearer = anchored(head, worst, guessed(worst, logprob_there))
            sums[:, again] = _powers(head, tiles, nearer, place, again, want_entropy)
            rows.target[again] = nearer.target
            log_total, found, slope, live = measure(rows, sums, block)
            count = int(live.sum())
        if lost or once:
            factor = finish(rows, sums, block, place, log_total, found, slope)
        if count == len(live):
            return block, factor
        order = tiles.compact(place, live, count)
        return block[order], factor[order]

    def finish(
        rows: Rows,
        sums: Tensor,
        block: Tensor,
        place: Tensor,
        log_total: Tensor,
        found: Tensor,
        slope: Tensor,
    ) -> Tensor:
        """Note the block's log-probs and entropies, and turn its powers into the logits' gradients
        but for a factor, which is returned."""
        total, moment = sums
        logprob[block] = found
        if want_entropy:
            others = (total * log_total - moment) * torch.exp2(-log_total)
            entropy[block] = others * LN2 - found.exp() * found
        factor = torch.exp2(-log_total) * column(rows.inv_temperature)
        if policy.entropy_coef is None:
            factor = -slope * factor
            at_target = -total
        else:
            pull, spread = policy.entropy_coef[block], entropy[block]  # dloss/dentropy = -pull
            offset = pull * (spread - log_total * LN2) - slope
            tiles.with_entropy(place, offset * factor, pull * factor)
            at_target = pull * found.exp() * (found + spread) - slope * torch.expm1(found)
            at_target *= column(rows.inv_temperature)
            factor = torch.ones_like(factor)
        _write_targets(head, rows, place, at_target)
        return factor

    def measure(rows: Rows, sums: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log2 Z, the log-prob, the loss's derivative by it, and which rows have a gradient."""
        odds = (sums[0].log2() - rows.target) * LN2
        found = -torch.logaddexp(torch.zeros_like(odds), odds)
        _, slope, _, _ = policy.surrogate(found, block)
        live = slope != 0
        if policy.entropy_coef is not None:
            live |= policy.entropy_coef[block] != 0
        return torch.logaddexp2(rows.target, sums[0].log2()), found, slope, live

    while start < len(index):
        rest, room = len(index) - start, len(kept) - filled
        # Measured: on a CPU a block of half size costs more than adding half as many rows at once.
        if room < min(5 * min(head.tiling.rows, len(kept)) // 8, head.tiling.kept, rest):
            flush(last=False)
            room = len(kept)
        most = _equal(len(kept), head.tiling.at_once, head.tiling.grain)
        block = index[start : start + min(most, room)]
        start += len(block)
        pending.append(take(block, kept[filled : filled + len(block)]))
        filled += len(pending[-1][0])
    if pending:
        flush(last=True)
    return logprob, entropy


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


def _powers(
    head: Head,
    tiles: Tiles,
    rows: Rows,
    place: Tensor,
    position: Tensor | None,
    want_entropy: bool,
) -> Tensor:
    """Fill rows `position` of `place` (by default all) with E; Σ E and Σ E·L over all shards,
    `[2, R]`."""
    return head.all_reduce(torch.stack(tiles.powers(rows, place, position, want_entropy)))


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
