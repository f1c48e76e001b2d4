"""Algorithms: four small pure choices by configuration - planner, advantage, weights, clip bounds.

No input or output and no torch here; `score` turns collected trees into what the trainer packs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elpo_fast.algo.advantages import group, hierarchical
from elpo_fast.algo.bel import BelPlanner
from elpo_fast.algo.clipping import lower_bounds
from elpo_fast.algo.planners import Planner
from elpo_fast.algo.star import StarPlanner
from elpo_fast.algo.weights import sequence_mean
from elpo_fast.config import AlgoConfig
from elpo_fast.tree.pack import Scored
from elpo_fast.tree.store import Forest

__all__ = ["make_planner", "score"]


def make_planner(config: AlgoConfig) -> Planner:
    """A fresh planner for one task's tree."""
    if config.planner == "star":
        return StarPlanner(config.n_total)
    bel = config.bel
    return BelPlanner(config.n_total, bel.b_max, bel.x_min, bel.x_max, bel.beta)


def score(
    forest: Forest, config: AlgoConfig, importance: NDArray[np.float64] | None = None
) -> Scored:
    """Advantage, loss coefficients and clip bounds of every node of a forest.

    `importance [L]` multiplies the weight of each trajectory.
    """
    weight = sequence_mean(forest)
    if importance is not None:
        weight = weight * importance
    if config.advantage == "group":
        values = group(forest, weight, eps=config.advantage_eps)
    else:
        values = hierarchical(
            forest, weight, lambda_tree=config.lambda_tree, eps=config.advantage_eps
        )
    return Scored(
        **vars(values),
        eps_low=lower_bounds(forest, config.clip),
        eps_high=config.clip.eps_high,
    )
