"""Token weights: how much one agent token of trajectory `i` counts in the objective (Eq. 1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elpo_fast.tree import ops
from elpo_fast.tree.store import Forest


def sequence_mean(forest: Forest) -> NDArray[np.float64]:
    """Eq. 1's `1 / (G |tau|)` for each leaf, `[L]`: mean over trajectories of the mean over tokens.

    `G` is the number of trajectories of the leaf's tree, `|tau|` the trajectory's agent tokens
    (feedback masking); one without any agent token weighs nothing, and still counts in `G`.
    """
    length, group = lengths(forest), np.diff(forest.leaf_start)
    return np.where(length > 0, 1.0 / (np.repeat(group, group) * np.maximum(length, 1)), 0.0)


def token_mean(forest: Forest) -> NDArray[np.float64]:
    """DAPO's `1 / sum_i |tau_i|` (arXiv 2503.14476), the sum over the trajectories of the
    leaf's tree: all agent tokens of a group count alike; `[L]`."""
    length = lengths(forest)
    total = np.add.reduceat(length, forest.leaf_start[:-1])
    return np.repeat(1.0 / np.maximum(total, 1), np.diff(forest.leaf_start))


def token_sum(forest: Forest, tokens: int) -> NDArray[np.float64]:
    """Dr. GRPO's `1 / (G C)` with a constant C, `tokens`, in the place of the length (arXiv
    2503.20783): long trajectories are not favoured; `[L]`."""
    group = np.diff(forest.leaf_start)
    return np.repeat(1.0 / (group * tokens), group)


def lengths(forest: Forest) -> NDArray[np.int64]:
    """Agent tokens of each trajectory, `[L]`."""
    agent = ops.segment_sum(forest.token_start, forest.agent)
    return ops.path_sum(forest.parent, agent)[forest.leaf_node]
