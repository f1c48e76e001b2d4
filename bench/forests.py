"""Random rollout forests and the two ways to train them, for the benchmarks of the update.

`as_trees` computes each unique token once. `as_rows` has one chain per trajectory, with its own
share of the weights, end to end: packing without sharing. Loss and gradient are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elpo_fast.tree.pack import PackedBatch, Scored, Trie, concatenate, micro_batches, pack, section
from elpo_fast.tree.store import Forest, Tree


@dataclass(frozen=True, slots=True)
class Shape:
    """A task's trajectories: some from the root, the others from random steps of earlier ones."""

    trajectories: int
    from_root: int
    steps: int
    step_tokens: tuple[int, int]  # of these a quarter answers of the tool
    prompt: int


def grow(rng: np.random.Generator, shape: Shape, vocabulary: int) -> Tree:
    """One tree, with old log-probs around those of a model that knows nothing."""
    tree = Tree(rng.integers(0, vocabulary, shape.prompt))
    for ordinal in range(shape.trajectories):
        inner = [node for node in range(1, len(tree)) if tree.correct[node] < 0]
        node = 0 if ordinal < shape.from_root or not inner else int(rng.choice(inner))
        while tree.depth[node] < shape.steps:
            size = int(rng.integers(shape.step_tokens[0], shape.step_tokens[1] + 1))
            agent = np.arange(size) < size - size // 4
            logprob = rng.normal(-np.log(vocabulary), 0.3, size) * agent
            ids = rng.integers(0, vocabulary, size)
            node = tree.add_step(node, ids, agent, logprob, np.zeros(size), tool_call=True)
        correct = bool(ordinal % 2)
        tree.finish(node, reward=float(correct), correct=correct, end="answer")
    return tree


def as_trees(trees: Sequence[Tree], budget: int) -> list[PackedBatch]:
    """Every unique token once."""
    forest = Forest.from_trees(trees)
    shares = np.concatenate([_weights(tree).sum(0) for tree in trees])
    scored = _scored(_advantages(len(shares)) * shares)
    return micro_batches(forest, scored, range(len(trees)), budget, scale=1 / len(trees))


def as_rows(trees: Sequence[Tree], budget: int) -> list[PackedBatch]:
    """One chain per trajectory."""
    advantage = _advantages(sum(len(tree) for tree in trees))
    chains, values, first = [], [], 0
    for tree in trees:
        for leaf, weight in zip(tree.leaves, _weights(tree), strict=True):
            path = tree.path(leaf)
            chain, node = Tree(tree.token_ids[0]), 0
            for at in path[1:]:
                arrays = (tree.token_ids[at], tree.agent[at], tree.logprob[at], tree.entropy[at])
                node = chain.add_step(node, *arrays, tool_call=True)
            chain.finish(node, reward=0.0, correct=False, end="answer")
            chains.append(chain)
            values.append(advantage[first + np.array(path)] * weight[path])
        first += len(tree)
    forest = Forest.from_trees(chains)
    packed = pack(forest, range(len(chains)), _scored(np.concatenate(values)), scale=1 / len(trees))
    sizes = np.diff(packed.tree_start)
    bins: list[list[int]] = []
    for chain in np.argsort(-sizes, kind="stable").tolist():  # first-fit decreasing
        free = (b for b in bins if sizes[b].sum() + sizes[chain] <= budget)
        into = next(free, None)
        if into is None:
            bins.append([chain])
        else:
            into.append(chain)
    whole = [section(packed, index, np.ones(size, np.bool_)) for index, size in enumerate(sizes)]
    return [unshared(concatenate([whole[chain] for chain in chosen])) for chosen in bins]


def unshared(batch: PackedBatch) -> PackedBatch:
    """The batch, computed token by token: prefixes that repeat each other are not merged."""
    every = np.arange(len(batch), dtype=np.int32)
    batch.__dict__["trie"] = Trie(batch.token_ids, batch.position, batch.end, every)
    return batch


def _advantages(nodes: int) -> NDArray[np.float64]:
    return np.random.default_rng(1).normal(size=nodes)


def _weights(tree: Tree) -> NDArray[np.float64]:
    """Weight `[leaves, nodes]` of a token in the mean over its trajectory and all trajectories."""
    weights = np.zeros((len(tree.leaves), len(tree)))
    for row, leaf in zip(weights, tree.leaves, strict=True):
        path = tree.path(leaf)
        row[path] = 1 / (len(tree.leaves) * sum(int(tree.agent[at].sum()) for at in path))
    return weights


def _scored(value: NDArray[np.float64]) -> Scored:
    low = np.full(len(value), 0.2)
    parts = (value, value, value, value, np.maximum(value, 0), np.minimum(value, 0))
    return Scored(*parts, eps_low=low, eps_high=0.3)


def regrown(forest: Forest, index: int) -> Tree:
    """A tree of a recorded forest, as it was grown."""
    first, last = forest.node_start[index : index + 2]

    def tokens(node: int) -> slice:
        return slice(forest.token_start[node], forest.token_start[node + 1])

    tree = Tree(forest.token_ids[tokens(first)])
    leaves = set(forest.leaf_node.tolist())
    for node in range(first + 1, last):
        at = tokens(node)
        arrays = (forest.token_ids[at], forest.agent[at], forest.logprob[at], forest.entropy[at])
        tree.add_step(int(forest.parent[node] - first), *arrays, tool_call=node not in leaves)
        if node in leaves:
            tree.finish(node - int(first), reward=0.0, correct=False, end="answer")
    return tree
