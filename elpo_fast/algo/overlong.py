"""Soft overlong punishment (DAPO, arXiv 2503.14476, Eq. 13): rewards of long trajectories fall.

With `|y|` the agent's tokens of a trajectory, `limit` and `buffer` in tokens, its reward gets

    0                                   where |y| <= limit - buffer,
    ((limit - buffer) - |y|) / buffer   up to the limit,
    -1                                  beyond it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from elpo_fast.algo.weights import lengths
from elpo_fast.tree.store import Forest


def punished(forest: Forest, limit: int, buffer: int) -> Forest:
    """The forest with these rewards; verdicts stay as they are."""
    reward = forest.reward.copy()
    beyond = lengths(forest) - (limit - buffer)
    reward[forest.leaf_node] -= np.clip(beyond / buffer, 0.0, 1.0)
    return replace(forest, reward=reward)
