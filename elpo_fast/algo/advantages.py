"""Advantages of tree nodes and the two coefficients with which they enter the loss.

Hierarchical (ELPO, Eq. 6-10): a node's value compared with its siblings', and its trajectories'
reward compared with all others, blended. It belongs to the node, so all trajectories through a
token agree on it. Group-normalised (GRPO): it belongs to the trajectory, so that a shared token
can have positive and negative ones at the same time; the node's value is their mean, for display.

`weight [L]` is the token weight of each trajectory (`elpo_fast.algo.weights`). The coefficients go
over the trajectories through a node: `pos = sum_i w_i max(A_i, 0)`, `neg = sum_i w_i min(A_i, 0)`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elpo_fast.tree import ops
from elpo_fast.tree.store import Forest

Floats = NDArray[np.float64]


def levels(forest: Forest, eps: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Node rewards (Eq. 6), branch (Eq. 7) and trajectory level (Eq. 9), `[N]`; Eq. 8, `[L]`."""
    node_reward = ops.node_rewards(forest.parent, forest.reward)
    branch = ops.branch_advantages(forest.parent, node_reward, eps)
    of_leaf = ops.leaf_advantages(forest.leaf_start, forest.reward[forest.leaf_node], eps)
    return node_reward, branch, _mean(forest, of_leaf), of_leaf


def weighted(forest: Forest, weight: Floats, values: Floats) -> tuple[Floats, Floats, Floats]:
    """Advantage and the coefficients `pos` and `neg` of every node, `[N]`, where `values` are those
    of all nodes `[N]` or of all trajectories `[L]`."""
    parent, leaf = forest.parent, forest.leaf_node
    if len(values) == len(parent):
        mass = ops.leaf_sum(parent, leaf, weight)
        return values, mass * np.maximum(values, 0.0), mass * np.minimum(values, 0.0)
    pos = ops.leaf_sum(parent, leaf, weight * np.maximum(values, 0.0))
    neg = ops.leaf_sum(parent, leaf, weight * np.minimum(values, 0.0))
    return _mean(forest, values), pos, neg


def _mean(forest: Forest, of_leaf: Floats) -> Floats:
    """Over the trajectories through each node, `[N]`."""
    parent, leaf = forest.parent, forest.leaf_node
    mean = ops.leaf_sum(parent, leaf, of_leaf) / ops.leaf_sum(parent, leaf, np.ones(len(leaf)))
    # What all trajectories share gets their mean, 0: exactly, so that it costs the trainer nothing.
    mean[np.abs(mean) < ops.TIE] = 0.0
    return mean


def group_unnormalised(forest: Forest) -> Floats:
    """Dr. GRPO (arXiv 2503.20783): `R - mean` over the trajectories of a tree, `[L]`."""
    reward, size = forest.reward[forest.leaf_node], np.diff(forest.leaf_start)
    mean = np.add.reduceat(reward, forest.leaf_start[:-1]) / size
    return _untied(reward - np.repeat(mean, size), reward)


def leave_one_out(forest: Forest) -> Floats:
    """RLOO (arXiv 2402.14740): `R` minus the mean of the others of its tree, `[L]`; 0 for
    the only one."""
    size = np.repeat(np.diff(forest.leaf_start), np.diff(forest.leaf_start))
    return group_unnormalised(forest) * np.where(size > 1, size / np.maximum(size - 1, 1), 0.0)


def batch(forest: Forest, *, eps: float) -> Floats:
    """REINFORCE++ (arXiv 2501.03262): `(R - mean) / (std + eps)` over all trajectories of the
    step, population std, `[L]`."""
    reward = forest.reward[forest.leaf_node]
    return ops.leaf_advantages(np.array([0, len(reward)]), reward, eps)


def tree_group(forest: Forest, *, eps: float) -> Floats:
    """Tree-GRPO (arXiv 2509.21240): a trajectory's reward normalised among those that share
    its first step, plus normalised among all of its task, `[L]`."""
    reward = forest.reward[forest.leaf_node]
    first = np.arange(len(forest.parent))  # of each node its path's first step
    for node in np.flatnonzero(forest.parent >= 0):
        up = forest.parent[node]
        if forest.parent[up] >= 0:
            first[node] = first[up]
    order = np.argsort(first[forest.leaf_node], kind="stable")
    sizes = np.unique(first[forest.leaf_node], return_counts=True)[1]
    within = np.empty(len(reward))
    within[order] = ops.leaf_advantages(np.cumsum([0, *sizes]), reward[order], eps)
    return within + ops.leaf_advantages(forest.leaf_start, reward, eps)


def child_value(forest: Forest) -> Floats:
    """VinePPO (arXiv 2410.01679) and SPO: a step's value minus that of the state before it,
    both the mean reward of the trajectories from there, `[N]`; roots have 0."""
    parent, leaf = forest.parent, forest.leaf_node
    reward = forest.reward[leaf]
    value = ops.leaf_sum(parent, leaf, reward) / ops.leaf_sum(parent, leaf, np.ones(len(leaf)))
    return _untied(np.where(parent < 0, 0.0, value - value[parent]), reward)


def _untied(values: Floats, reward: Floats) -> Floats:
    """What rounding left of a difference is none: it would cost the trainer a whole tree."""
    return np.where(np.abs(values) <= ops.TIE * np.abs(reward).max(initial=0.0), 0.0, values)
