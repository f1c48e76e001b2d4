r"""Log-prob, policy loss and their gradients from hidden states and head, never holding `[T, V]`.

With logits l, anchor m ≈ log-sum-exp and t the target, the engine works with

    E_v = e^(l_v − m) for v ≠ t,   S = Σ_{v≠t} E_v,   Z = S + e^(l_t − m)
    log p_t = −log(1 + S e^(m − l_t)),   1 − p_t = S / Z,

so a log-prob is never positive and 1 − p_t never cancels. For g = dloss/dlog p_t the gradient is

    dloss/dl_v = −(g/Z) E_v for v ≠ t,   dloss/dl_t = g (1 − p_t) = −(g/Z) (−S).

Hence E with −S written at the target *is* the gradient up to one factor a row, before Z or g are
known: one pass over the vocabulary serves the forward and both backward products (6THV
multiply-adds counted twice), rows without gradient are dropped between the two, and nothing
is computed for tokens that carry no coefficient. The weight's gradient is summed in a fixed
order in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from elpo_kernels._head import (
    LN2,
    LOG2E,
    MIB,
    Head,
    Rows,
    anchored,
    blocks,
    column,
    cut,
    subset,
)

# An anchor farther than this (in powers of two) from the log-sum-exp is replaced: for products
# that are rounded, to keep the large probabilities accurate; else, to stay within the exponents.
ROUNDED_ANCHOR_LIMIT = 6.0
ANCHOR_LIMIT = 60.0

# Least size of a piece of a weight's sum: from 32 MiB on, glibc gives each back to the system.
PIECE_BYTES = 34 * MIB


class Tiles(Protocol):
    """Arithmetic on tiles; see `TorchTiles` for what each does."""

    rounds_logits: bool
    acc: torch.dtype

    def product(self, a: Tensor, b: Tensor) -> Tensor: ...
    def accumulate(self, total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None: ...
    def at_targets(self, xs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]: ...
    def compact(self, place: Tensor, live: Tensor, count: int) -> Tensor: ...
    def weight(self, i: int, strip: slice) -> Tensor: ...
    def through_weight(self, kept: Tensor, i: int) -> Tensor: ...
    def sums(self, rows: Rows, want_entropy: bool) -> tuple[Tensor, Tensor]: ...
    def powers(
        self, rows: Rows, out: Tensor, position: Tensor | None, want_entropy: bool
    ) -> tuple[Tensor, Tensor]: ...
    def with_entropy(self, kept: Tensor, alpha: Tensor, beta: Tensor) -> None: ...
    def gradient(
        self,
        rows: Rows,
        strip: slice,
        alpha: Tensor,
        beta: Tensor | None,
        at_target: Tensor,
        out: Tensor,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients to make."""

    xs: tuple[bool, ...]
    weights: tuple[bool, ...]
    bias: bool

    @property
    def any(self) -> bool:
        return any(self.xs) or any(self.weights) or self.bias


class Gradients:
    """Sums of the gradients. A weight's is summed in its result where that has the accumulation
    dtype. Else it is summed piece by piece, written to its result with the last rows, and freed:
    with all rows at once there is no sum to keep."""

    def __init__(
        self,
        head: Head,
        xs: tuple[Tensor, ...],
        wanted: Wanted,
        tiles: Tiles,
        like: Sequence[Tensor | None],
        main_grad: Tensor | None = None,
    ) -> None:
        """`like`: xs, weights and bias as the caller has them, for the dtypes of the results."""
        self.head, self.inputs, self.tiles, self.main_grad = head, xs, tiles, main_grad
        self.like = like
        acc = tiles.acc
        self.xs = [
            torch.zeros_like(x, dtype=x.dtype if head.group is None else acc) if want else None
            for x, want in zip(xs, wanted.xs, strict=True)
        ]
        self.weights: list[Tensor | None] = []
        self._sums: list[dict[int, Tensor]] = []
        for i, want in enumerate(wanted.weights):
            weight = like[len(xs) + i]
            assert weight is not None
            into = main_grad if i == 0 else None
            if want and into is None:
                into = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            self.weights.append(into if want else None)
            self._sums.append({})
        self.bias = None
        if wanted.bias:
            self.bias = torch.zeros(head.vocabulary, dtype=acc, device=xs[0].device)
        self.written = False

    def add(self, index: Tensor, kept: Tensor, alpha: Tensor, last: bool) -> None:
        """Take up the rows `index`, whose logit gradients are `alpha * kept` `[n, V]`."""
        self.written |= last
        if self.bias is not None:
            for strip in self.head.strips():
                self.bias[strip] += alpha @ kept[:, strip].to(alpha.dtype)
        for i, x in enumerate(self.inputs):
            gradient = self.xs[i]
            if gradient is not None:
                product = self.tiles.through_weight(kept, i).to(alpha.dtype)
                gradient[index] = product.mul_(alpha[:, None]).to(gradient.dtype)
                del product
            if self.weights[i] is not None:
                scaled = x[index].to(alpha.dtype).mul_(alpha[:, None]).to(self.head.dtype)
                self._add_weight(i, kept, scaled, last)

    def _add_weight(self, i: int, kept: Tensor, x: Tensor, last: bool) -> None:
        result, sums, tiles = self.weights[i], self._sums[i], self.tiles
        assert result is not None
        if result is self.main_grad:
            for rows in cut(0, len(result), self.head.tiling.update):
                tiles.accumulate(result[rows], kept[:, rows].t(), x)
            return
        wider, tiling = result.dtype != tiles.acc, self.head.tiling
        on_cpu = result.device.type == "cpu"
        sum_bytes = result.numel() * tiles.acc.itemsize
        pieces = max(1, sum_bytes // PIECE_BYTES) if wider and on_cpu else 1
        for piece in cut(0, len(result), -(-len(result) // pieces)):
            total = sums.pop(piece.start, None)
            first = total is None
            if total is None:
                total = result[piece]
                if wider and not last:
                    total = torch.empty_like(total, dtype=tiles.acc)
            at_once = total.dtype != tiles.acc  # with all rows: rounded to the result's dtype
            size = tiling.strip if at_once and on_cpu else tiling.update
            for rows in cut(piece.start, piece.stop, size):
                part = total[rows.start - piece.start : rows.stop - piece.start]
                tiles.accumulate(part, kept[:, rows].t(), x, first)
                if last and wider and not at_once:
                    result[rows] = part
            if not last:
                sums[piece.start] = total

    def finish(self) -> list[Tensor]:
        """Gradients of xs, weights and bias; empty where not wanted, or where they went to the
        caller's own buffer."""
        weights = [None if w is self.main_grad else w for w in self.weights]
        if not self.written:  # no row had a gradient
            weights = [None if w is None else w.zero_() for w in weights]
        xs = [None if x is None else self.head.all_reduce(x) for x in self.xs]
        return [
            self.inputs[0].new_empty(0)
            if gradient is None or tensor is None
            else gradient.to(tensor.dtype)
            for gradient, tensor in zip([*xs, *weights, self.bias], self.like, strict=True)
        ]


def gather_rows(
    head: Head, tiles: Tiles, xs: tuple[Tensor, ...], targets: Tensor, index: Tensor
) -> Rows:
    """Rows `index` of the flat arrays with their target logits, exact in the accumulation dtype;
    not yet anchored. Collective over the head's group."""
    scale = head.inv_temperature
    if isinstance(scale, Tensor):
        scale = scale[index]
    xs = tuple(x[index].to(head.dtype) for x in xs)
    mine, both = tiles.at_targets(xs, targets[index])
    raw, logit = head.all_reduce(both)
    if head.softcap:
        logit = head.softcap * torch.tanh(logit / head.softcap)
    return Rows(xs, mine, raw, logit * column(scale), scale, None, raw, raw)


def forward(
    head: Head,
    xs: tuple[Tensor, ...],
    targets: Tensor,
    tiles: Tiles,
    index: Tensor,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and log2 Σ e^l `[T]` of the tokens `index`, 0 elsewhere."""
    logprob = torch.zeros(len(targets), dtype=tiles.acc, device=targets.device)
    entropy, log_sum = torch.zeros_like(logprob), torch.zeros_like(logprob)

    def found(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        log_rest, rest = tiles.sums(rows, want_entropy)
        values = measured(rows.target, log_rest, rest)
        return *values, torch.logaddexp2(rows.target, log_rest) - rows.offset

    for block in blocks(index, head.tiling.rows):
        rows = gather_rows(head, tiles, xs, targets, block)
        # Products that are not rounded need no anchor; one at an improbable target would be far
        # off.
        rounded = head.dtype != tiles.acc
        origin = LOG2E * rows.logit if rounded else torch.zeros_like(rows.logit)
        rows = anchored(head, rows, origin, loose=True)
        values = found(rows)
        if tiles.rounds_logits:
            far = (values[0].abs() > ROUNDED_ANCHOR_LIMIT * LN2).nonzero()[:, 0]
            if len(far):
                nearer = anchored(head, subset(rows, far), values[2][far])
                for value, better in zip(values, found(nearer), strict=True):
                    value[far] = better
        logprob[block], entropy[block], log_sum[block] = values
    return logprob, entropy, log_sum


def measured(target: Tensor, log_rest: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy in nats from L of the target, log2 S and the entropy in bits among the
    other tokens; either the target or the others may be impossible (−inf)."""
    odds = (log_rest - target) * LN2  # of all other tokens against the target
    zero = torch.zeros_like(odds)
    logprob, log_others = -torch.logaddexp(zero, odds), -torch.logaddexp(zero, -odds)
    own = torch.where(logprob == -torch.inf, 0, logprob.exp() * logprob)
    others = torch.where(log_others == -torch.inf, 0, log_others.exp() * (rest * LN2 - log_others))
    return logprob, others - own


def backward(
    head: Head,
    xs: tuple[Tensor, ...],
    targets: Tensor,
    tiles: Tiles,
    wanted: Wanted,
    logprob: Tensor,
    entropy: Tensor,
    log_sum: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    index: Tensor,
    like: Sequence[Tensor | None],
) -> list[Tensor]:
    """Gradients of Σ grad_logprob · logprob + grad_entropy · entropy over the tokens `index`, whose
    logits are computed once more, strip by strip, so that nothing of size V·T or V·H is held
    beyond the results."""
    gradients = Gradients(head, xs, wanted, tiles, like)
    if not len(index):
        return gradients.finish()
    rows = gather_rows(head, tiles, xs, targets, index)
    logprob, entropy, g = logprob[index], entropy[index], grad_logprob[index].to(tiles.acc)
    log_sum = log_sum[index]
    rows = anchored(head, rows, log_sum, loose=grad_entropy is None)
    # What the anchor left between ln 2^L and ln p. The log-prob is no measure of it: rounded, one
    # near −88 would give all of its row's gradient an error of up to 1e-5.
    off = LN2 * (log_sum + rows.offset)
    scale = torch.exp(-off) * column(rows.inv_temperature)
    at_target = -g * torch.expm1(logprob)
    alpha, beta = -g * scale, None
    if grad_entropy is not None:
        e = grad_entropy[index].to(tiles.acc)
        at_target -= e * logprob.exp() * (logprob + entropy)
        alpha -= e * (entropy - off) * scale
        beta = -e * scale
    at_target *= column(rows.inv_temperature)
    sums = [
        None if total is None else torch.zeros_like(x, dtype=tiles.acc)
        for total, x in zip(gradients.xs, rows.xs, strict=True)
    ]
    pieces = [(part, subset(rows, part)) for part in cut(0, len(index), head.tiling.rows)]
    held = torch.empty(len(index) * head.tiling.strip, dtype=head.dtype, device=index.device)
    for strip in head.strips():
        width = strip.stop - strip.start
        tile = held[: len(index) * width].view(len(index), width)
        for block, piece in pieces:
            tiles.gradient(
                piece,
                strip,
                alpha[block],
                None if beta is None else beta[block],
                at_target[block],
                tile[block],
            )
        for i, x in enumerate(rows.xs):
            if (total := sums[i]) is not None:
                tiles.accumulate(total, tile, tiles.weight(i, strip))
            if (result := gradients.weights[i]) is not None:
                result[strip] = tiles.product(tile.t(), x)
        if gradients.bias is not None:
            gradients.bias[strip] = tile.to(tiles.acc).sum(0)
    for total, target in zip(sums, gradients.xs, strict=True):
        if total is not None and target is not None:
            target[index] = total.to(target.dtype)
    gradients.written = True
    return gradients.finish()
