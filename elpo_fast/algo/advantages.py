"""Advantages of tree nodes and the two coefficients with which they enter the loss.

Hierarchical (ELPO, Eq. 6-10): a node's value compared with its siblings', and its trajectories'
reward compared with all others, blended. It belongs to the node, so all trajectories through a
token agree on it. Group-normalised (GRPO): it belongs to the trajectory, so that a shared token
can have positive and negative ones at the same time; the node's value is their mean, for display.

`weight [L]` is the token weight of each trajectory (`elpo_fast.algo.weights`). The coefficients go
over the trajectories through a node: `pos = sum_i w_i max(A_i, 0)`, `neg = sum_i w_i min(A_i, 0)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elpo_fast.tree import ops
from elpo_fast.tree.store import Forest

Floats = NDArray[np.float64]
_Parts = tuple[Floats, Floats, Floats, Floats]


@dataclass(frozen=True, eq=False)
class Advantages:
    """Values of every node, `float64 [N]` each: `Scored` without the clip bounds."""

    node_reward: Floats
    branch: Floats
    trajectory: Floats
    advantage: Floats
    pos: Floats
    neg: Floats


def hierarchical(forest: Forest, weight: Floats, *, lambda_tree: float, eps: float) -> Advantages:
    """Eq. 10: `A = lambda A_branch + (1 - lambda) A_traj`, node by node."""
    parts = _parts(forest, eps)
    _, branch, trajectory, _ = parts
    values = lambda_tree * branch + (1.0 - lambda_tree) * trajectory
    return _weighted(forest, weight, values, parts)


def group(forest: Forest, weight: Floats, *, eps: float) -> Advantages:
    """GRPO: the normalised reward of each trajectory (Eq. 8) on all of its tokens."""
    parts = _parts(forest, eps)
    return _weighted(forest, weight, parts[3], parts)


def chosen(forest: Forest, weight: Floats, values: Floats, *, eps: float) -> Advantages:
    """Advantages that are given: `values` of all nodes `[N]`, or of all trajectories `[L]`."""
    return _weighted(forest, weight, values, _parts(forest, eps))


def _weighted(forest: Forest, weight: Floats, values: Floats, parts: _Parts) -> Advantages:
    parent, leaf = forest.parent, forest.leaf_node
    node_reward, branch, trajectory, _ = parts
    if len(values) == len(parent):
        mass = ops.leaf_sum(parent, leaf, weight)
        pos, neg = mass * np.maximum(values, 0.0), mass * np.minimum(values, 0.0)
        return Advantages(node_reward, branch, trajectory, values, pos, neg)
    pos = ops.leaf_sum(parent, leaf, weight * np.maximum(values, 0.0))
    neg = ops.leaf_sum(parent, leaf, weight * np.minimum(values, 0.0))
    return Advantages(node_reward, branch, trajectory, _mean(forest, values), pos, neg)


def _mean(forest: Forest, of_leaf: Floats) -> Floats:
    """Over the trajectories through each node, `[N]`."""
    parent, leaf = forest.parent, forest.leaf_node
    mean = ops.leaf_sum(parent, leaf, of_leaf) / ops.leaf_sum(parent, leaf, np.ones(len(leaf)))
    # What all trajectories share gets their mean, 0: exactly, so that it costs the trainer nothing.
    mean[np.abs(mean) < ops.TIE] = 0.0
    return mean


def _parts(forest: Forest, eps: float) -> _Parts:
    """Node rewards (Eq. 6), branch (Eq. 7) and trajectory level (Eq. 9), `[N]`; Eq. 8, `[L]`."""
    parent, leaf = forest.parent, forest.leaf_node
    node_reward = ops.node_rewards(parent, forest.reward)
    branch = ops.branch_advantages(parent, node_reward, eps)
    of_leaf = ops.leaf_advantages(forest.leaf_start, forest.reward[leaf], eps)
    return node_reward, branch, _mean(forest, of_leaf), of_leaf
