"""Trees to flat arrays: one entry for each token of a node, which is what is trained, and one row
for each distinct prefix, which is what is computed.

Tokens stand in preorder (depth first), several trees end to end. Siblings that begin alike, and
tasks with a common prompt, repeat tokens: a `Trie` of all paths has every prefix once, however many
tokens it stands for. It is a preorder as well. Then attention needs one integer a row,
`allowed(q, k) = k <= q < end[k]`, because the rows that may see `k` - all that begins with its
prefix - are consecutive. Positions are path depths. Equal prefixes have equal hidden states, so
that each token may keep coefficients, bounds and an old log-prob of its own.

Every trajectory `i` through a token shares its importance ratio `r` and its clip bounds, and the
clipped surrogate is positively homogeneous in the advantage, so that Eq. 1's sum collapses to

    sum_i w_i min(r A_i, clip(r) A_i) = pos * min(r, clip(r)) + neg * max(r, clip(r)),
    pos = sum_i w_i max(A_i, 0),  neg = sum_i w_i min(A_i, 0).

`pos` and `neg` of a node come from `elpo_fast.algo`; feedback masking makes them 0 on every token
that the agent did not write.
"""

from __future__ import annotations

import heapq
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from elpo_fast.tree import ops
from elpo_fast.tree.store import Forest


@dataclass(frozen=True, eq=False)
class Scored:
    """What an algorithm says about each node of a forest, `float64 [N]` each.

    `advantage` is made of the `branch` and `trajectory` parts (of the latter alone where advantages
    belong to trajectories); `pos` and `neg` already contain the token weights.
    """

    node_reward: NDArray[np.float64]
    branch: NDArray[np.float64]
    trajectory: NDArray[np.float64]
    advantage: NDArray[np.float64]
    pos: NDArray[np.float64]
    neg: NDArray[np.float64]
    eps_low: NDArray[np.float64]
    eps_high: float
    of_leaf: NDArray[np.float64] | None = None  # [L], advantages that belong to trajectories
    weight: NDArray[np.float64] | None = None  # [L], of one token of each trajectory


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """`P` tokens of the nodes of some trees. Token arrays are `[P]`, trees `tree_start` slices."""

    token_ids: NDArray[np.int32]
    position: NDArray[np.int32]  # depth along the path, from 0
    end: NDArray[np.int32]  # first packed index after the subtree of the token's node
    pred: NDArray[np.int32]  # packed index of the token before it on the path; -1: none
    pos_coef: NDArray[np.float32]  # >= 0, 0 where not the agent's
    neg_coef: NDArray[np.float32]  # <= 0, 0 where not the agent's
    old_logprob: NDArray[np.float32]
    eps_low: NDArray[np.float32]
    eps_high: NDArray[np.float32]
    agent: NDArray[np.uint8]
    node: NDArray[np.int32]  # node of the forest
    trees: NDArray[np.int64]  # [B], tree of the forest
    tree_start: NDArray[np.int64]  # [B + 1]
    entropy_coef: NDArray[np.float32] | None = None  # >= 0, 0 where not the agent's; None: 0

    def __len__(self) -> int:
        """Number of the nodes' tokens."""
        return len(self.token_ids)

    @cached_property
    def trie(self) -> Trie:
        """The distinct prefixes of the tokens."""
        prefix, token_ids, above = _prefixes(self.token_ids, self.pred)
        above.setflags(write=False)
        size = np.ones(len(above), np.int64)
        size[0] = 0  # the empty prefix is no row
        start, end = ops.preorder(above, size)
        position = ops.path_sum(above, size) - size
        rows = np.empty((3, len(above) - 1), np.int32)
        for column, value in zip(rows, (token_ids, position, end), strict=True):
            column[start[1:]] = value[1:]
        return Trie(rows[0], rows[1], rows[2], start.astype(np.int32)[prefix])

    @cached_property
    def spoken(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The agent's tokens `[A]`, the first of each distinct prefix among them `[D]`, and which
        of these has the prefix of each `[A]`."""
        tokens = np.flatnonzero(self.agent)
        _, first, place = np.unique(self.trie.row[tokens], return_index=True, return_inverse=True)
        return tokens, tokens[first], place

    @cached_property
    def loss_rows(self) -> LossRows:
        """What the loss is computed of."""
        chosen = np.flatnonzero((self.pos_coef != 0) | (self.neg_coef != 0))
        equal = self.old_logprob, self.eps_low, self.eps_high
        return LossRows(*_add_up(self.trie.row, chosen, *equal, self.pos_coef, self.neg_coef))


@dataclass(frozen=True, eq=False)
class LossRows:
    """The tokens with a coefficient, those as one that are equal in prefix, old log-prob and clip
    bounds: the loss is positively homogeneous in its coefficients, which are added."""

    index: NDArray[np.int64]  # [R], the first token of each row
    pos: NDArray[np.floating]  # [R]
    neg: NDArray[np.floating]  # [R]

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Trie:
    """`R` distinct prefixes of a batch's tokens in preorder, by their last token, `[R]` each."""

    token_ids: NDArray[np.int32]
    position: NDArray[np.int32]  # depth, from 0
    end: NDArray[np.int32]  # first row after those that begin with this prefix
    row: NDArray[np.int32]  # [P] of each token of the batch

    def __len__(self) -> int:
        """Number of distinct prefixes."""
        return len(self.token_ids)

    @cached_property
    def trunk(self) -> NDArray[np.int32]:
        """The tokens that all paths begin with."""
        branched = np.flatnonzero(self.end < len(self))
        return self.token_ids[: branched[0] if len(branched) else len(self)]


_COLUMNS: dict[str, type[np.generic]] = {
    "token_ids": np.int32,
    "position": np.int32,
    "end": np.int32,
    "pred": np.int32,
    "pos_coef": np.float32,
    "neg_coef": np.float32,
    "old_logprob": np.float32,
    "eps_low": np.float32,
    "eps_high": np.float32,
    "node": np.int32,
}
"""The four-byte token arrays of `PackedBatch`."""

_Columns = namedtuple("_Columns", _COLUMNS)  # type: ignore[misc]
_TOKEN_FIELDS = (*_COLUMNS, "agent")


def pack(
    forest: Forest, trees: Sequence[int], scored: Scored, *, scale: float = 1.0
) -> PackedBatch:
    """Lay the given trees end to end, in the given order; nothing is dropped.

    `scale` multiplies both coefficients, 1 / number of tasks for a mean over tasks.
    Raises `ValueError` for trees that are not in the forest, scores of another forest, more than
    2^31 - 1 tokens, and agent tokens with nothing before them, which no model predicts.
    """
    chosen = np.asarray(trees, np.int64).reshape(-1)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= len(forest)):
        raise ValueError(f"trees {list(trees)} are not all in a forest of {len(forest)} trees")
    if len(scored.pos) != len(forest.parent):
        raise ValueError(
            f"scores of {len(scored.pos)} nodes do not belong to a forest of "
            f"{len(forest.parent)} nodes; score this forest"
        )
    count = forest.token_count
    start, end = ops.preorder(forest.parent, count)
    position = ops.path_sum(forest.parent, count) - count
    tree_start = np.cumsum([0, *end[forest.node_start[chosen]]], dtype=np.int64)
    total = int(tree_start[-1])
    if total > np.iinfo(np.int32).max:
        raise ValueError(f"{total} tokens are too many for one batch; pack fewer trees at once")
    # One block for all columns: large enough for huge pages, or else page faults take most of the
    # time. NumPy asks for them, numba's own arrays do not.
    block = np.empty((len(_COLUMNS), total), np.int32)
    columns: dict[str, NDArray[Any]] = {
        name: row.view(dtype) for row, (name, dtype) in zip(block, _COLUMNS.items(), strict=True)
    }
    agent = np.empty(total, np.uint8)
    orphan = _fill(
        chosen,
        tree_start,
        forest.node_start,
        forest.parent,
        forest.token_start,
        start,
        end,
        position,
        scored.pos * scale,
        scored.neg * scale,
        scored.eps_low,
        scored.eps_high,
        forest.token_ids,
        forest.logprob,
        forest.agent,
        agent,
        _Columns(**columns),
    )
    if orphan >= 0:
        raise ValueError(
            f"task {forest.task_ids[forest.tree[orphan]]!r} starts with an agent token, which "
            "nothing predicts; give it a prompt"
        )
    return PackedBatch(**columns, agent=agent, trees=chosen, tree_start=tree_start)


def micro_batches(
    forest: Forest, scored: Scored, trees: Sequence[int], budget_tokens: int, *, scale: float = 1.0
) -> list[PackedBatch]:
    """Trees into batches of at most `budget_tokens` computed rows, the largest first, each into the
    batch that shares most with it of those with room, and of these the first.

    A larger tree is cut into parts that repeat what is above them (`cut`); a single path
    above the budget is a batch of its own. `scale` as in `pack`.
    """
    packed = pack(forest, sorted(trees), scored, scale=scale)
    parts = [part for index in range(len(trees)) for part in cut(packed, index, budget_tokens)]
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(parts)), key=lambda number: (-len(parts[number].trie), number)):
        trie = parts[number].trie
        shared = [max(_common(trie.trunk, parts[other].trie.trunk) for other in b) for b in bins]
        fits = [i for i, free in enumerate(room) if len(trie) - shared[i] <= free]
        if fits:
            best = max(fits, key=lambda i: (shared[i], -i))
            bins[best].append(number)
            room[best] -= len(trie) - shared[best]
        else:
            bins.append([number])
            room.append(budget_tokens - len(trie))
    return [concatenate([parts[number] for number in sorted(chosen)]) for chosen in bins]


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Number of tokens that both begin with."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def cut(batch: PackedBatch, index: int, budget: int) -> list[PackedBatch]:
    """Tree `index` of a batch, or parts of it of at most `budget` rows, that sum to the same.

    A part is a range of the rows of the tree's trie, from one leaf's end to another's, and the path
    above it, repeated without coefficients and without agent tokens. A cut at row `t` repeats
    `position[t]` rows; cuts are chosen so that all of them repeat as few as possible. A part is
    larger than the budget only where a single path is.
    """
    first, last = (int(at) for at in batch.tree_start[index : index + 2])
    if first == last:
        return []
    whole = section(batch, index, np.ones(last - first, np.bool_))
    trie = whole.trie
    if len(trie) <= budget:
        return [whole]
    after_leaf = np.flatnonzero(np.diff(trie.position) != 1) + 1
    bounds = [0, *after_leaf.tolist(), len(trie)]
    repeated = trie.position[bounds[:-1]].tolist()
    # For the rows before each bound: how many are repeated at least, where the last part starts.
    best = [(0, 0)]
    for stop in range(1, len(bounds)):
        options: list[tuple[int, int]] = []
        for start in range(stop - 1, -1, -1):
            size = repeated[start] + bounds[stop] - bounds[start]
            if options and size > budget:
                break  # earlier starts make larger parts
            options.append((best[start][0] + repeated[start], start))
        best.append(min(options))
    parts, stop = [], len(bounds) - 1
    while stop > 0:
        start = best[stop][1]
        inside = (trie.row >= bounds[start]) & (trie.row < bounds[stop])
        parts.append(section(whole, 0, inside))
        stop = start
    return parts[::-1]


def section(batch: PackedBatch, index: int, chosen: NDArray[np.bool_]) -> PackedBatch:
    """The `chosen` tokens of tree `index`, and those above them without coefficients."""
    first, last = (int(at) for at in batch.tree_start[index : index + 2])
    pred = batch.pred[first:last] - np.int32(first)
    kept = chosen.copy()
    _add_above(kept, pred)
    columns = {name: getattr(batch, name)[first:last][kept] for name in _TOKEN_FIELDS}
    place = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)  # of each token, or the next
    columns["end"] = place[columns["end"] - first]
    before = np.maximum(columns["pred"] - first, 0)
    columns["pred"] = np.where(columns["pred"] < 0, np.int32(-1), place[before])
    for name in ("pos_coef", "neg_coef", "agent"):
        columns[name] *= chosen[kept]
    sizes = np.array([0, len(columns["node"])])
    return PackedBatch(**columns, trees=batch.trees[index : index + 1], tree_start=sizes)


def concatenate(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Several batches end to end as one."""
    starts = np.cumsum([0, *map(len, batches)])
    columns = {
        name: np.concatenate([getattr(batch, name) for batch in batches]) for name in _TOKEN_FIELDS
    }
    offset = np.repeat(starts[:-1], [len(batch) for batch in batches]).astype(np.int32)
    columns["end"] += offset
    columns["pred"] = np.where(columns["pred"] < 0, np.int32(-1), columns["pred"] + offset)
    pairs = list(zip(batches, starts, strict=False))
    return PackedBatch(
        **columns,
        trees=np.concatenate([batch.trees for batch in batches]),
        tree_start=np.concatenate([[0], *(batch.tree_start[1:] + at for batch, at in pairs)]),
    )


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of `costs` for each rank: the largest first, each to the rank with least so far.

    The most loaded rank has at most 4/3 - 1/(3 ranks) times what the best split would give it
    (Graham 1969).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        so_far, rank = heapq.heappop(load)
        shares[rank].append(index)
        heapq.heappush(load, (so_far + costs[index], rank))
    return shares


def active(forest: Forest, scored: Scored) -> NDArray[np.bool_]:
    """Trees that have a gradient at all: any agent token with a coefficient; `[T]`."""
    agent = ops.segment_sum(forest.token_start, forest.agent)
    node = (agent > 0) & ((scored.pos != 0) | (scored.neg != 0))
    return np.logical_or.reduceat(node, forest.node_start[:-1])


# Each column is written by a loop of its own over a view: such loops vectorise, loops over several
# columns or over indices that could be negative do not (4 to 8 times slower, measured).


@njit(cache=True, nogil=True)
def _prefixes(
    token_ids: NDArray[np.int32], pred: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """The prefix that ends in each token, `[P]`; the last token of each prefix and the prefix
    before it, `[R + 1]`, the empty one first and in the order in which they are found.

    Prefixes are found by the list of those that prolong the one before, which is short: only where
    nodes or trees begin has it more than one member.
    """
    size = len(token_ids) + 1
    prefix = np.empty(len(token_ids), np.int32)
    last = np.empty(size, np.int32)
    above = np.full(size, -1, np.int64)
    first = np.zeros(size, np.int32)  # of a prefix's continuations; 0: none
    other = np.empty(size, np.int32)  # the next continuation of the same prefix
    count = 1
    for token in range(len(token_ids)):
        before = prefix[pred[token]] if pred[token] >= 0 else 0
        found = first[before]
        while found > 0 and last[found] != token_ids[token]:
            found = other[found]
        if found == 0:
            found = count
            last[found], above[found] = token_ids[token], before
            other[found], first[before] = first[before], found
            count += 1
        prefix[token] = found
    return prefix, last[:count], above[:count]


@njit(cache=True, nogil=True)
def _add_up(
    row: NDArray[np.int32],
    chosen: NDArray[np.int64],
    old: NDArray[np.float32],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    pos: NDArray[np.float32],
    neg: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The columns of `LossRows`. Those of a prefix are a short list."""
    index = np.empty(len(chosen), np.int64)
    pos_sum, neg_sum = np.zeros(len(chosen)), np.zeros(len(chosen))
    first = np.full(len(row), -1, np.int64)  # by prefix
    other = np.empty(len(chosen), np.int64)  # the next loss row of the same prefix
    count = 0
    for number in range(len(chosen)):
        token = chosen[number]
        found = first[row[token]]
        while found >= 0:
            at = index[found]
            if old[at] == old[token] and low[at] == low[token] and high[at] == high[token]:
                break
            found = other[found]
        if found < 0:
            found = count
            index[found] = token
            other[found] = first[row[token]]
            first[row[token]] = found
            count += 1
        pos_sum[found] += pos[token]
        neg_sum[found] += neg[token]
    return index[:count], pos_sum[:count], neg_sum[:count]


@njit(cache=True, nogil=True)
def _add_above(kept: NDArray[np.bool_], pred: NDArray[np.int32]) -> None:
    """Add to the kept tokens all that are before them on their paths."""
    for token in range(len(kept) - 1, -1, -1):
        if kept[token] and pred[token] >= 0:
            kept[pred[token]] = True


@njit(cache=True, nogil=True)
def _copy(out: NDArray[Any], value: NDArray[Any]) -> None:
    for i in range(len(out)):
        out[i] = value[i]


@njit(cache=True, nogil=True)
def _count_up(out: NDArray[np.int32], first: int) -> None:
    base = np.int32(first)
    for i in range(len(out)):
        out[i] = base + np.int32(i)


@njit(cache=True, nogil=True)
def _masked(out: NDArray[np.float32], value: float, mask: NDArray[np.uint8]) -> None:
    single = np.float32(value)
    for i in range(len(out)):
        out[i] = single * np.float32(mask[i])


@njit(cache=True, nogil=True)
def _fill(
    trees: NDArray[np.int64],
    tree_start: NDArray[np.int64],
    node_start: NDArray[np.int64],
    parent: NDArray[np.int64],
    token_start: NDArray[np.int64],
    start: NDArray[np.int64],
    end: NDArray[np.int64],
    position: NDArray[np.int64],
    pos: NDArray[np.float64],
    neg: NDArray[np.float64],
    eps_low: NDArray[np.float64],
    eps_high: float,
    ids: NDArray[np.int32],
    logprob: NDArray[np.float32],
    agent: NDArray[np.uint8],
    out_agent: NDArray[np.uint8],
    out: Any,
) -> int:
    """Write node after node to its place in `out`, a `_Columns`; a node whose agent token has no
    predecessor, or -1."""
    last = np.empty(len(parent), np.int64)  # packed index of the last token up to each node
    for index in range(len(trees)):
        base = tree_start[index]
        for node in range(node_start[trees[index]], node_start[trees[index] + 1]):
            source = slice(token_start[node], token_start[node + 1])
            count = token_start[node + 1] - token_start[node]
            first = base + start[node]
            before = last[parent[node]] if parent[node] >= 0 else -1
            if count == 0:
                last[node] = before
                continue
            if before < 0 and agent[source][0]:
                return node
            last[node] = first + count - 1
            here = slice(first, first + count)
            _copy(out.token_ids[here], ids[source])
            _copy(out.old_logprob[here], logprob[source])
            _copy(out_agent[here], agent[source])
            _count_up(out.position[here], position[node])
            _count_up(out.pred[here], first - 1)
            out.pred[first] = before
            out.end[here] = base + end[node]
            out.node[here] = node
            _masked(out.pos_coef[here], pos[node], agent[source])
            _masked(out.neg_coef[here], neg[node], agent[source])
            out.eps_low[here] = np.float32(eps_low[node])
            out.eps_high[here] = np.float32(eps_high)
    return -1
