r"""Log-prob, policy loss and their gradients from hidden states and head, never holding `[T, V]`.

With logits l, anchor m ≈ log-sum-exp and t the target, the passes work with

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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from elpo_kernels.linear.head import Head, Rows, anchored, column, subset
from elpo_kernels.rows import LN2, LOG2E, LogitGradient, blocks, cut, measured

# An anchor farther than this (in powers of two) from the log-sum-exp is replaced: for products
# that are rounded, to keep the large probabilities accurate; else, to stay within the exponents.
ROUNDED_ANCHOR_LIMIT = 6.0
ANCHOR_LIMIT = 60.0


class Tiles(Protocol):
    """Arithmetic on tiles of one head; see `TorchTiles` for what each does."""

    head: Head
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
    def gradient(self, rows: Rows, strip: slice, gradient: LogitGradient, out: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class Problem:
    """A head, its tokens, and who computes."""

    tiles: Tiles
    xs: tuple[Tensor, ...]  # each [T, H_i], in the dtype of the first
    targets: Tensor  # [T]
    like: Sequence[Tensor | None]  # xs, weights and bias as the caller has them
    needs: Sequence[bool]  # which of these get a gradient

    @property
    def head(self) -> Head:
        return self.tiles.head

    def per_token(self) -> Tensor:
        """Zeros `[T]`."""
        return torch.zeros(len(self.targets), dtype=self.tiles.acc, device=self.targets.device)

    def rows(self, index: Tensor) -> Rows:
        """Rows `index` of the flat arrays with their target logits, exact in the accumulation
        dtype; not yet anchored. Collective over the head's group."""
        head = self.head
        scale = head.inv_temperature
        if isinstance(scale, Tensor):
            scale = scale[index]
        xs = tuple(x[index].to(head.dtype) for x in self.xs)
        mine, both = self.tiles.at_targets(xs, self.targets[index])
        raw, logit = head.all_reduce(both)
        if head.softcap:
            logit = head.softcap * torch.tanh(logit / head.softcap)
        return Rows(xs, mine, raw, logit * column(scale), scale, raw[:, None], raw, raw)


class Found(NamedTuple):
    """What the forward of the log-prob finds, 0 where a token was not asked for."""

    logprob: Tensor  # [T]
    entropy: Tensor  # [T]
    log_sum: Tensor  # [T], log2 Σ e^l


class Gradients:
    """Sums of the gradients. A weight's is summed in its result where that has the accumulation
    dtype. Else it is summed piece by piece, written to its result with the last rows, and freed:
    with all rows at once there is no sum to keep."""

    def __init__(self, problem: Problem, main_grad: Tensor | None = None) -> None:
        head, tiles = problem.head, problem.tiles
        self.problem, self.main_grad = problem, main_grad
        parts = len(problem.xs)
        self.xs = [
            torch.zeros_like(x, dtype=x.dtype if head.group is None else tiles.acc)
            if want
            else None
            for x, want in zip(problem.xs, problem.needs, strict=False)
        ]
        self.weights: list[Tensor | None] = []
        self._sums: list[dict[int, Tensor]] = []
        for i, want in enumerate(problem.needs[parts : 2 * parts]):
            weight = problem.like[parts + i]
            assert weight is not None
            into = main_grad if i == 0 else None
            if want and into is None:
                into = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            self.weights.append(into if want else None)
            self._sums.append({})
        self.bias = None
        if problem.needs[-1]:
            device = problem.targets.device
            self.bias = torch.zeros(head.vocabulary, dtype=tiles.acc, device=device)
        self.written = False

    def add(self, index: Tensor, kept: Tensor, alpha: Tensor, last: bool) -> None:
        """Take up the rows `index`, whose logit gradients are `alpha * kept` `[n, V]`."""
        head, tiles = self.problem.head, self.problem.tiles
        self.written |= last
        if self.bias is not None:
            for strip in head.strips():
                self.bias[strip] += alpha @ kept[:, strip].to(alpha.dtype)
        for i, x in enumerate(self.problem.xs):
            gradient = self.xs[i]
            if gradient is not None:
                product = tiles.through_weight(kept, i).to(alpha.dtype)
                gradient[index] = product.mul_(alpha[:, None]).to(gradient.dtype)
                del product
            if self.weights[i] is not None:
                scaled = x[index].to(alpha.dtype).mul_(alpha[:, None]).to(head.dtype)
                self._add_weight(i, kept, scaled, last)

    def _add_weight(self, i: int, kept: Tensor, x: Tensor, last: bool) -> None:
        result, sums, tiles = self.weights[i], self._sums[i], self.problem.tiles
        tiling = self.problem.head.tiling
        assert result is not None
        if result is self.main_grad:
            for rows in cut(0, len(result), tiling.update):
                tiles.accumulate(result[rows], kept[:, rows].t(), x)
            return
        wider = result.dtype != tiles.acc
        for piece in cut(0, len(result), (wider and tiling.piece) or len(result)):
            total = sums.pop(piece.start, None)
            first = total is None
            if total is None:
                total = result[piece]
                if wider and not last:
                    total = torch.empty_like(total, dtype=tiles.acc)
            at_once = total.dtype != tiles.acc  # with all rows: rounded to the result's dtype
            size = (at_once and tiling.rounded) or tiling.update
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
        xs = [None if x is None else self.problem.head.all_reduce(x) for x in self.xs]
        return [
            self.problem.xs[0].new_empty(0)
            if gradient is None or tensor is None
            else gradient.to(tensor.dtype)
            for gradient, tensor in zip([*xs, *weights, self.bias], self.problem.like, strict=True)
        ]


def forward(problem: Problem, index: Tensor, want_entropy: bool) -> Found:
    """What there is to find of the tokens `index`."""
    head, tiles = problem.head, problem.tiles
    logprob = problem.per_token()
    entropy, log_sum = torch.zeros_like(logprob), torch.zeros_like(logprob)

    def found(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        log_rest, rest = tiles.sums(rows, want_entropy)
        values = measured(rows.target, log_rest, rest)
        return *values, torch.logaddexp2(rows.target, log_rest) - rows.offset

    for block in blocks(index, head.tiling.rows):
        rows = problem.rows(block)
        # Products that are not rounded need no anchor; one at an improbable target would be far
        # off.
        rounded = head.dtype != tiles.acc
        origin = LOG2E * rows.logit if rounded else torch.zeros_like(rows.logit)
        rows = anchored(head, rows, origin)
        values = found(rows)
        if tiles.rounds_logits:
            far = (values[0].abs() > ROUNDED_ANCHOR_LIMIT * LN2).nonzero()[:, 0]
            if len(far):
                nearer = anchored(head, subset(rows, far), values[2][far])
                for value, better in zip(values, found(nearer), strict=True):
                    value[far] = better
        logprob[block], entropy[block], log_sum[block] = values
    return Found(logprob, entropy, log_sum)


def backward(
    problem: Problem,
    found: Found,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    index: Tensor,
) -> list[Tensor]:
    """Gradients of Σ grad_logprob · logprob + grad_entropy · entropy over the tokens `index`, whose
    logits are computed once more, strip by strip, so that nothing of size V·T or V·H is held
    beyond the results."""
    head, tiles = problem.head, problem.tiles
    gradients = Gradients(problem)
    if not len(index):
        return gradients.finish()
    rows = problem.rows(index)
    logprob, entropy, g = found.logprob[index], found.entropy[index], grad_logprob[index]
    g, log_sum = g.to(tiles.acc), found.log_sum[index]
    rows = anchored(head, rows, log_sum)
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
    gradient = LogitGradient(alpha, beta, at_target)
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
            tiles.gradient(piece, strip, gradient.at(block), tile[block])
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
