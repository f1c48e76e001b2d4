"""The slow, obvious twin of scoring and packing: one token, node and trajectory at a time.

Written from the method's text with dictionaries, lists and recursion, sharing nothing with the
fast code but the input. Also grows the random trees that the tests of several rooms compare on.
"""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from elpo_fast.tree.store import Forest, Tree

REWARDS = (-1.1, 0.0, 0.5, 1.0)


def random_tree(
    rng: np.random.Generator, *, leaves: int = 6, steps: int = 4, tokens: int = 4, task_id: str = ""
) -> Tree:
    """A tree that branches anywhere, with empty steps, silent trajectories, critical steps."""
    prompt = rng.integers(1, tokens + 2)
    tree = Tree(rng.integers(0, 100, prompt), task_id=task_id, info={"seed": int(prompt)})
    for _ in range(leaves):
        open_nodes = [node for node in range(len(tree)) if tree.correct[node] < 0]
        node = int(rng.choice(open_nodes))
        for _ in range(rng.integers(1, steps + 1)):
            size = int(rng.integers(0, tokens + 1))
            agent = rng.random(size) < 0.7
            node = tree.add_step(
                node,
                rng.integers(0, 100, size),
                agent,
                np.where(agent, -rng.random(size), 0.0),
                np.where(agent, rng.random(size), 0.0),
                tool_call=bool(rng.random() < 0.7),
                weight_version=int(rng.integers(3)),
            )
        reward = float(rng.choice(REWARDS))
        leaf = tree.finish(node, reward=reward, correct=reward >= 1, end="answer", reason="r")
        if reward < 1 and rng.random() < 0.5:
            step = int(rng.choice(tree.path(node)[1:]))
            tree.mark_critical(step, leaf, localized=bool(rng.random() < 0.7))
    return tree


def random_forest(seed: int, *, trees: int = 3, **shape: int) -> Forest:
    rng = np.random.default_rng(seed)
    return Forest.from_trees([random_tree(rng, task_id=f"t{i}", **shape) for i in range(trees)])


def star_tree(rng: np.random.Generator, *, leaves: int, steps: int, tokens: int) -> Tree:
    """Nothing shared but the prompt: the largest tree with so many leaves, steps and tokens."""
    ids = rng.integers(0, 50_000, tokens)
    agent = np.arange(tokens) < 0.6 * tokens
    logprob, entropy = -rng.random(tokens) * agent, rng.random(tokens) * agent
    tree = Tree(ids)
    for _ in range(leaves):
        node = 0
        for _ in range(steps):
            node = tree.add_step(node, ids, agent, logprob, entropy, tool_call=True)
        correct = bool(rng.random() < 0.4)
        leaf = tree.finish(node, reward=float(correct), correct=correct, end="answer")
        if not correct:
            tree.mark_critical(tree.path(node)[1 + leaf % steps], leaf, localized=True)
    return tree


def children(forest: Forest) -> dict[int, list[int]]:
    below: dict[int, list[int]] = {node: [] for node in range(len(forest.parent))}
    for node, parent in enumerate(forest.parent.tolist()):
        if parent >= 0:
            below[parent].append(node)
    return below


def descend(below: dict[int, list[int]], node: int) -> list[int]:
    """The node and everything below it, depth first."""
    return [node] + [deeper for child in below[node] for deeper in descend(below, child)]


def normalise(values: list[float], eps: float) -> list[float]:
    if math.isclose(min(values), max(values), rel_tol=1e-9, abs_tol=1e-9):
        return [0.0] * len(values)
    mean, std = fmean(values), pstdev(values)
    return [(value - mean) / (std + eps) for value in values]


def leaves_of(forest: Forest, tree: int) -> list[int]:
    """Leaf nodes of a tree in sampling order."""
    first, last = forest.leaf_start[tree : tree + 2].tolist()
    return forest.leaf_node[first:last].tolist()


def path(forest: Forest, node: int) -> list[int]:
    parent = int(forest.parent[node])
    return [node] if parent < 0 else [*path(forest, parent), node]


def node_tokens(forest: Forest, node: int) -> list[int]:
    """Token indices of a node."""
    return list(range(int(forest.token_start[node]), int(forest.token_start[node + 1])))


def path_tokens(forest: Forest, leaf: int) -> list[int]:
    return [token for node in path(forest, leaf) for token in node_tokens(forest, node)]


def scores(
    forest: Forest,
    *,
    advantage: str = "hierarchical",
    lambda_tree: float = 0.5,
    eps: float = 1e-6,
    eps_low: float = 0.2,
    eps_elc: float = 0.115,
    scope: str = "localized",
    require_localized: bool = True,
) -> dict[str, list[float]]:
    """All fields of `Scored` that are lists over nodes."""
    nodes = range(len(forest.parent))
    below = children(forest)
    out: dict[str, list[float]] = {
        name: [0.0] * len(nodes)
        for name in ("node_reward", "branch", "trajectory", "advantage", "pos", "neg")
    }
    out["eps_low"] = [eps_low] * len(nodes)

    def value(node: int) -> float:
        """Eq. 6."""
        parts = [value(child) for child in below[node]]
        out["node_reward"][node] = fmean(parts) if parts else float(forest.reward[node])
        return out["node_reward"][node]

    def branch(node: int) -> None:
        """Eq. 7."""
        under = below[node]
        siblings = normalise([out["node_reward"][child] for child in under], eps) if under else []
        for child, own in zip(under, siblings, strict=True):
            out["branch"][child] = own if len(under) > 1 else out["branch"][node]
            branch(child)

    for tree in range(len(forest)):
        root = int(forest.node_start[tree])
        value(root)
        branch(root)
        leaves = leaves_of(forest, tree)
        of_leaf = normalise([float(forest.reward[leaf]) for leaf in leaves], eps)  # Eq. 8
        through: dict[int, list[int]] = {}
        for i, leaf in enumerate(leaves):
            for node in path(forest, leaf):
                through.setdefault(node, []).append(i)
        length = [sum(int(forest.agent[t]) for t in path_tokens(forest, leaf)) for leaf in leaves]
        weight = [1 / (len(leaves) * n) if n else 0.0 for n in length]  # Eq. 1
        for node, which in through.items():
            out["trajectory"][node] = fmean(of_leaf[i] for i in which)  # Eq. 9
            if advantage == "group":
                a = out["trajectory"][node]
                out["pos"][node] = sum(weight[i] * max(of_leaf[i], 0) for i in which)
                out["neg"][node] = sum(weight[i] * min(of_leaf[i], 0) for i in which)
            else:  # Eq. 10
                a = lambda_tree * out["branch"][node] + (1 - lambda_tree) * out["trajectory"][node]
                out["pos"][node] = sum(weight[i] * max(a, 0) for i in which)
                out["neg"][node] = sum(weight[i] * min(a, 0) for i in which)
            out["advantage"][node] = a
            no_success = all(forest.correct[leaves[i]] == 0 for i in which)
            if scope == "tree" and node != root and no_success:
                out["eps_low"][node] = eps_low + eps_elc
    if scope == "localized":  # Eq. 11
        for node, leaf, localized in zip(
            forest.critical_node, forest.critical_leaf, forest.critical_localized, strict=True
        ):
            if localized or not require_localized:
                steps = path(forest, int(forest.leaf_node[leaf]))
                for step in steps[steps.index(int(node)) :]:
                    out["eps_low"][step] = eps_low + eps_elc
    return out


def pack(
    forest: Forest,
    trees: list[int],
    scored: dict[str, list[float]],
    *,
    eps_high: float = 0.315,
    scale: float = 1.0,
) -> dict[str, list[Any]]:
    """Lists named as the token arrays of `PackedBatch`, and `tree_start`."""
    names = ("token_ids", "position", "end", "pred", "pos_coef", "neg_coef")
    names += ("old_logprob", "eps_low", "eps_high", "agent", "node")
    out: dict[str, list[Any]] = {name: [] for name in names}
    out["tree_start"] = [0]
    below = children(forest)

    def visit(node: int, depth: int, before: int) -> None:
        first = len(out["node"])
        for token in node_tokens(forest, node):
            agent = int(forest.agent[token])
            out["token_ids"].append(int(forest.token_ids[token]))
            out["position"].append(depth)
            out["end"].append(None)  # known only after the subtree
            out["pred"].append(before)
            out["pos_coef"].append(scale * scored["pos"][node] * agent)
            out["neg_coef"].append(scale * scored["neg"][node] * agent)
            out["old_logprob"].append(float(forest.logprob[token]))
            out["eps_low"].append(scored["eps_low"][node])
            out["eps_high"].append(eps_high)
            out["agent"].append(agent)
            out["node"].append(node)
            depth, before = depth + 1, len(out["node"]) - 1
        for child in below[node]:
            visit(child, depth, before)
        own = len(node_tokens(forest, node))
        out["end"][first : first + own] = [len(out["node"])] * own

    for tree in trees:
        visit(int(forest.node_start[tree]), 0, -1)
        out["tree_start"].append(len(out["node"]))
    return out


def unroll(forest: Forest, tree: int, scored: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The plain formulation: one row a trajectory, every shared token repeated.

    Rows have `tokens` (indices into the forest), `node` of each, `weight = 1 / (G |tau|)`, and
    `advantage`, `eps_low` and `agent` of each token; `advantage` is the node's.
    """
    leaves = leaves_of(forest, tree)
    rows = []
    for leaf in leaves:
        node = [n for n in path(forest, leaf) for _ in node_tokens(forest, n)]
        tokens = path_tokens(forest, leaf)
        agent = [int(forest.agent[token]) for token in tokens]
        rows.append(
            {
                "leaf": leaf,
                "tokens": tokens,
                "node": node,
                "agent": agent,
                "weight": 1 / (len(leaves) * sum(agent)) if any(agent) else 0.0,
                "advantage": [scored["advantage"][n] for n in node],
                "eps_low": [scored["eps_low"][n] for n in node],
            }
        )
    return rows
