"""In which order a tree was sampled, and what a search for its critical step learnt on the way.

Trees keep their leaves in sampling order and where each search ended, not its probes. A probe is
where consecutive trajectories leave what was there before, if that is a tool call of a search's
reference; between two searches planners ask for full trajectories. Where equal steps were merged, a
trajectory leaves the tree later than it was asked for, and may be no search's.
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
    suspects: tuple[int, ...]  # the search's tool calls that may be the critical one, by its probes


def rounds(forest: Forest, tree: int) -> list[Round]:
    """What was sampled in tree `tree`, in order."""
    found: list[Round] = []
    searches, root = _searches(forest, tree), forest.nodes(tree).start
    search: int | None = None  # the one that is going on
    begun = low = high = 0
    for node, first, leaves in _groups(forest, tree):
        correct = int((forest.correct[leaves] == 1).sum())
        if node == root:
            search = None
        elif search is None:
            for number in range(begun, len(searches)):
                reference, calls = searches[number]
                if reference < first and node in calls:
                    search, begun = number, number + 1
                    low, high = 0, len(calls) - 1
                    break
        whose: int | None = None
        suspects: tuple[int, ...] = ()
        if search is not None and node in searches[search][1]:
            calls = searches[search][1]
            at = calls.index(node)
            if correct:  # proves that the error comes later, whatever failed there
                low = max(low, at + 1)
                high = high if high >= low else len(calls) - 1
            elif at >= low:
                high = min(high, at)
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
