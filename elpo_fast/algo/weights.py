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
    agent = ops.segment_sum(forest.token_start, forest.agent)
    length = ops.path_sum(forest.parent, agent)[forest.leaf_node]
    group = np.diff(forest.leaf_start)
    return np.where(length > 0, 1.0 / (np.repeat(group, group) * np.maximum(length, 1)), 0.0)
