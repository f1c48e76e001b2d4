"""Numba passes over the flat node arrays of a forest, one pass a quantity.

Every pass relies on what `Forest` guarantees: a parent's index is smaller than its children's and
roots have parent -1. So a backward loop visits children before parents and a forward loop parents
before children; nothing recurses and nothing is sorted. Each pass takes one type of arrays, and so
is compiled once.

Rewards that differ by less than `TIE`, relative to the largest reward below, are equal: sums of the
same numbers in another order must not turn into advantages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TIE = 1e-12


def _pass(function: Any) -> Any:
    return njit(cache=True, nogil=True)(function)


@_pass
def subtree_sum(parent: Ints, value: Floats) -> Floats:
    """Sum of `value` over each node's subtree, itself included; `[N]`."""
    total = value.copy()
    for node in range(len(parent) - 1, -1, -1):
        if parent[node] >= 0:
            total[parent[node]] += total[node]
    return total


@_pass
def path_sum(parent: Ints, value: Ints) -> Ints:
    """Sum of `value` from the root to each node, both included; `[N]`."""
    total = value.copy()
    for node in range(len(parent)):
        if parent[node] >= 0:
            total[node] += total[parent[node]]
    return total


@_pass
def preorder(parent: Ints, size: Ints) -> tuple[Ints, Ints]:
    """Depth-first layout of each tree where node `n` takes `size[n]` places.

    Returns `start` and `end`, both `[N]` and counted from 0 in every tree: a node's own places
    begin at `start`, its subtree fills `start : end`. With `size` all ones `start` is the preorder
    rank, and `a` is an ancestor of `b` or `b` itself exactly if `start[a] <= start[b] < end[a]`.
    """
    nodes = len(parent)
    end = size.copy()
    for node in range(nodes - 1, -1, -1):
        if parent[node] >= 0:
            end[parent[node]] += end[node]
    start = np.zeros(nodes, np.int64)
    cursor = np.empty(nodes, np.int64)  # where the next child of a node begins
    for node in range(nodes):
        if parent[node] >= 0:
            start[node] = cursor[parent[node]]
            cursor[parent[node]] += end[node]
        cursor[node] = start[node] + size[node]
        end[node] += start[node]
    return start, end


@_pass
def segment_sum(start: Ints, value: NDArray[np.uint8]) -> Ints:
    """Sum of `value[start[n] : start[n + 1]]` for each `n`; with the agent mask: agent tokens."""
    total = np.zeros(len(start) - 1, np.int64)
    for node in range(len(total)):
        segment = value[start[node] : start[node + 1]]  # a view: its loop vectorises
        for i in range(len(segment)):
            total[node] += segment[i]
    return total


@_pass
def node_rewards(parent: Ints, reward: Floats) -> Floats:
    """Eq. 6: a leaf's reward, an inner node's mean of its direct children's node rewards; `[N]`."""
    nodes = len(parent)
    out = np.zeros(nodes)
    count = np.zeros(nodes, np.int64)
    for node in range(nodes - 1, -1, -1):
        out[node] = out[node] / count[node] if count[node] else reward[node]
        if parent[node] >= 0:
            out[parent[node]] += out[node]
            count[parent[node]] += 1
    return out


@_pass
def branch_advantages(parent: Ints, node_reward: Floats, eps: float) -> Floats:
    """Eq. 7: `(r(c) - mean) / (std + eps)` over the siblings, population std; `[N]`.

    An only child inherits its parent's value, siblings with equal rewards get 0, so do roots.
    """
    nodes = len(parent)
    count = np.zeros(nodes, np.int64)
    square = np.zeros(nodes)
    low = np.full(nodes, np.inf)
    high = np.full(nodes, -np.inf)
    size = np.abs(node_reward)  # the largest in the subtree, which rounding errors scale with
    for node in range(nodes - 1, -1, -1):
        up = parent[node]
        if up >= 0:
            count[up] += 1
            size[up] = max(size[up], size[node])
            # The mean over the siblings is their parent's node reward (Eq. 6).
            square[up] += (node_reward[node] - node_reward[up]) ** 2
            low[up] = min(low[up], node_reward[node])
            high[up] = max(high[up], node_reward[node])
    out = np.zeros(nodes)
    for node in range(nodes):
        up = parent[node]
        if up < 0:
            continue
        if count[up] == 1:
            out[node] = out[up]
        elif high[up] - low[up] > TIE * size[up]:
            std = np.sqrt(square[up] / count[up])
            out[node] = (node_reward[node] - node_reward[up]) / (std + eps)
    return out


@_pass
def leaf_advantages(leaf_start: Ints, reward: Floats, eps: float) -> Floats:
    """Eq. 8: `(R - mean) / (std + eps)` over the leaves of each tree, population std; `[L]`."""
    out = np.zeros(len(reward))
    for tree in range(len(leaf_start) - 1):
        group = reward[leaf_start[tree] : leaf_start[tree + 1]]
        if group.max() - group.min() > TIE * np.abs(group).max():
            scale = group.std() + eps
            out[leaf_start[tree] : leaf_start[tree + 1]] = (group - group.mean()) / scale
    return out


@_pass
def mark_paths(parent: Ints, top: Ints, bottom: Ints) -> NDArray[np.bool_]:
    """Nodes on the paths from each `bottom[i]` up to its ancestor `top[i]`, both ends in; `[N]`."""
    marked = np.zeros(len(parent), np.bool_)
    for path in range(len(top)):
        node = bottom[path]
        marked[node] = True
        while node != top[path]:
            node = parent[node]
            marked[node] = True
    return marked


def leaf_sum(parent: Ints, leaf_node: Ints, value: Floats) -> Floats:
    """Sum of the leaves' `value [L]` over the leaves at or below each node; `[N]`."""
    at_node = np.zeros(len(parent))
    at_node[leaf_node] = value  # no node is two leaves
    return subtree_sum(parent, at_node)


def first_all_failed(parent: Ints, correct: NDArray[np.int8]) -> tuple[NDArray[np.bool_], ...]:
    """Where nothing succeeds any more.

    Returns `hopeless [N]`, steps without any success at or below them, and `first [N]`, those of
    them that come first on their path. A root is not a step and never in either.
    """
    step = parent >= 0
    hopeless = step & (subtree_sum(parent, np.maximum(correct, 0).astype(np.float64)) == 0)
    return hopeless, hopeless & ~hopeless[parent]
