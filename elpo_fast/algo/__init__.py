"""Algorithms: four small pure choices by configuration - planner, advantage, weights, clip bounds.

No input or output and no torch here; `score` turns collected trees into what the trainer packs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elpo_fast import own
from elpo_fast.algo import advantages
from elpo_fast.algo.advantages import Floats, levels, weighted
from elpo_fast.algo.bel import BelPlanner
from elpo_fast.algo.bel_bayes import BayesPlanner
from elpo_fast.algo.clipping import lower_bounds
from elpo_fast.algo.entropy import EntropyPlanner
from elpo_fast.algo.overlong import punished
from elpo_fast.algo.planners import Planner
from elpo_fast.algo.random import RandomPlanner
from elpo_fast.algo.segment import SegmentPlanner
from elpo_fast.algo.star import StarPlanner
from elpo_fast.algo.topk import TopKPlanner
from elpo_fast.algo.weights import sequence_mean, token_mean, token_sum
from elpo_fast.config import ADVANTAGES, PLANNERS, WEIGHTS, AlgoConfig, ConfigError
from elpo_fast.tree.pack import Scored
from elpo_fast.tree.store import Forest
from elpo_fast.types import RunError

__all__ = ["check", "make_planner", "score"]

_KINDS = {"planner": "planners", "advantage": "advantages", "weights": "weights"}
_OFFERED = {"planner": ("n_total",), "advantage": ("forest", "weight"), "weights": ("forest",)}
_PLANNERS: dict[str, Callable[..., Planner]] = {
    "random": RandomPlanner,
    "entropy": EntropyPlanner,
    "entropy_topk": TopKPlanner,
    "segment": SegmentPlanner,
}
"""Those whose settings are a section of their name."""
_BUILT_IN = (*PLANNERS, *ADVANTAGES, *WEIGHTS)


def check(config: AlgoConfig) -> None:
    """Raises `ConfigError` for a choice of one's own, or its options, that cannot be used."""
    for choice in _KINDS:
        name = getattr(config, choice)
        if name not in _BUILT_IN:
            _own(config, choice)
        elif getattr(config.options, choice):
            raise ConfigError(
                f"algo.options.{choice} is for one of your own; the settings of {name} stand under "
                "algo"
            )
    try:
        make_planner(config)
    except ValueError as error:
        raise ConfigError(f"algo.planner {config.planner}: {error}") from None


def make_planner(config: AlgoConfig) -> Planner:
    """A fresh planner for one task's tree."""
    match config.planner:
        case "star":
            return StarPlanner(config.n_total)
        case "bel":
            return BelPlanner(config.n_total, **config.bel.model_dump(exclude={"confidence"}))
        case "bel_bayes":
            return BayesPlanner(config.n_total, **config.bel.model_dump())
        case "random" | "entropy" | "entropy_topk" | "segment" as name:
            return _PLANNERS[name](config.n_total, **getattr(config, name).model_dump())
    planner = _own(config, "planner")(n_total=config.n_total)
    own.complete(planner, Planner, f"algo.planner: {config.planner}")
    return planner


def score(
    forest: Forest, config: AlgoConfig, importance: NDArray[np.float64] | None = None
) -> Scored:
    """Advantage, loss coefficients and clip bounds of every node of a forest.

    `importance [L]` multiplies the weight of each trajectory. Raises `RunError` for weights or
    advantages of one's own that are not one finite number for each of what is there.
    """
    if config.overlong.limit:
        forest = punished(forest, config.overlong.limit, config.overlong.buffer)
    match config.weights:
        case "sequence_mean":
            weight = sequence_mean(forest)
        case "token_mean":
            weight = token_mean(forest)
        case "token_sum":
            weight = token_sum(forest, config.token_sum_length)
        case _:
            weight = _numbers(config, "weights", forest=forest)
    if importance is not None:
        weight = weight * importance
    eps = config.advantage_eps
    node_reward, branch, trajectory, of_leaf = levels(forest, eps)
    match config.advantage:
        case "group":
            values = of_leaf
        case "hierarchical":  # Eq. 10: A = lambda A_branch + (1 - lambda) A_traj, node by node
            values = config.lambda_tree * branch + (1.0 - config.lambda_tree) * trajectory
        case "batch" | "tree_group":
            values = getattr(advantages, config.advantage)(forest, eps=eps)
        case "group_unnormalised" | "leave_one_out" | "child_value":
            values = getattr(advantages, config.advantage)(forest)
        case _:
            values = _numbers(config, "advantage", forest=forest, weight=weight)
    advantage, pos, neg = weighted(forest, weight, values)
    return Scored(
        node_reward,
        branch,
        trajectory,
        advantage,
        pos,
        neg,
        eps_low=lower_bounds(forest, config.clip),
        eps_high=config.clip.eps_high,
        of_leaf=values if len(values) == len(forest.leaf_node) else None,
        weight=weight,
    )


def _own(config: AlgoConfig, choice: str) -> Any:
    thing = own.find(_KINDS[choice], getattr(config, choice), f"algo.{choice}")
    options = getattr(config.options, choice)
    return own.bound(thing, _OFFERED[choice], options, f"algo.options.{choice}")


def _numbers(config: AlgoConfig, choice: str, *, forest: Forest, **offered: Any) -> Floats:
    """What a function of one's own gives: a number for every trajectory or, if it chooses
    advantages, for every node."""
    values = np.asarray(_own(config, choice)(forest=forest, **offered), np.float64)
    leaves, nodes = len(forest.leaf_node), len(forest.parent)
    if values.shape != (leaves,) and not (choice == "advantage" and values.shape == (nodes,)):
        or_nodes = f", or [{nodes}], one for each node" if choice == "advantage" else ""
        raise RunError(
            f"algo.{choice}: {getattr(config, choice)} gave numbers of shape {list(values.shape)}; "
            f"it has to be [{leaves}], one for each trajectory{or_nodes}"
        )
    if not np.isfinite(values).all():
        raise RunError(
            f"algo.{choice}: {getattr(config, choice)} gave {int((~np.isfinite(values)).sum())} "
            "numbers that are not finite; guard its divisions"
        )
    return values
