"""In which order a tree was sampled, and what a search for its critical step learnt on the way.

Trees keep their leaves in sampling order and where each search ended, not its probes. A probe is
where consecutive trajectories leave what was there before. Which of them belong to a search is what
bisection (Algorithm 1) would have asked for next. Where equal steps were merged, a trajectory
leaves the tree later than it was asked for; such a one is no search's.
"""

from __future__ import annotations

from dataclasses import dataclass

from elpo_fast.tree.store import Forest


@dataclass(frozen=True, slots=True)
class Round:
    """Trajectories sampled from one node, one after the other. Nodes are those of the forest."""

    node: int  # where they leave the tree as it was; the root: full trajectories
    first: int  # ordinal of the first one's leaf
    count: int
    correct: int
    search: int | None  # whose probe it is, from 0, in the tree's order
    suspects: tuple[int, ...]  # the search's tool calls that may still be the critical one


def rounds(forest: Forest, tree: int) -> list[Round]:
    """What was sampled in tree `tree`, in order."""
    found: list[Round] = []
    searches = _searches(forest, tree)
    search = 0
    low = 0
    high = len(searches[0][1]) - 1 if searches else -1
    for node, first, leaves in _groups(forest, tree):
        correct = int((forest.correct[leaves] == 1).sum())
        while search < len(searches) and low >= high:  # decided, or without a call to decide about
            search, low = search + 1, 0
            high = len(searches[search][1]) - 1 if search < len(searches) else -1
        whose: int | None = None
        suspects: tuple[int, ...] = ()
        if search < len(searches):
            reference, calls = searches[search]
            # The same middle as in `algo.bel`, whose calls are counted from 1.
            middle = (low + high + 2) // 2 - 1
            if reference < first and node == calls[middle]:
                low, high = (middle + 1, high) if correct else (low, middle)
                whose, suspects = search, tuple(calls[low : high + 1])
        found.append(Round(node, first, len(leaves), correct, whose, suspects))
    return found


def _searches(forest: Forest, tree: int) -> list[tuple[int, list[int]]]:
    """Of each search the ordinal of its reference and the nodes of this one's tool calls."""
    start = forest.leaves(tree).start
    found = []
    for node, leaf in zip(forest.critical_node, forest.critical_leaf, strict=True):
        if forest.tree[node] == tree:
            path = forest.path(int(forest.leaf_node[leaf]))
            found.append((int(leaf) - start, [at for at in path if forest.tool_call[at]]))
    return found


def _groups(forest: Forest, tree: int) -> list[tuple[int, int, list[int]]]:
    """Consecutive trajectories that leave the tree at one node: it, the first one's ordinal, the
    nodes of their leaves."""
    seen = {forest.nodes(tree).start}
    groups: list[tuple[int, int, list[int]]] = []
    for ordinal, leaf in enumerate(forest.leaves(tree)):
        path = forest.path(int(forest.leaf_node[leaf]))
        node = max(at for at in path if at in seen)
        seen.update(path)
        if not groups or groups[-1][0] != node:
            groups.append((node, ordinal, []))
        groups[-1][2].append(path[-1])
    return groups
