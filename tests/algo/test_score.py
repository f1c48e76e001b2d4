"""Scoring by configuration against the twin, and planners by configuration."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_fast.algo import make_planner, score
from elpo_fast.algo.bel import BelPlanner
from elpo_fast.algo.planners import Request, trajectory_of
from elpo_fast.algo.star import StarPlanner
from elpo_fast.algo.weights import sequence_mean
from elpo_fast.config import AlgoConfig
from elpo_fast.tree.pack import Scored
from elpo_fast.tree.store import Forest, Tree

from ..tree import twin

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=80, deadline=None)
@given(
    seeds,
    st.sampled_from(["hierarchical", "group"]),
    st.sampled_from(["localized", "tree"]),
    st.booleans(),
    st.floats(0, 1),
    st.sampled_from([0.0, 1e-6, 0.1]),
)
def test_equals_the_twin(seed, advantage, scope, require_localized, lambda_tree, eps):
    forest = twin.random_forest(seed, leaves=8)
    clip = {"eps_low": 0.1, "eps_elc": 0.3, "eps_high": 0.4, "scope": scope}
    config = AlgoConfig(
        advantage=advantage,
        lambda_tree=lambda_tree,
        advantage_eps=eps,
        clip={**clip, "require_localized": require_localized},
    )
    fast = score(forest, config)
    slow = twin.scores(
        forest,
        advantage=advantage,
        lambda_tree=lambda_tree,
        eps=eps,
        eps_low=0.1,
        eps_elc=0.3,
        scope=scope,
        require_localized=require_localized,
    )
    assert fast.eps_high == 0.4
    for name, expected in slow.items():
        np.testing.assert_allclose(
            getattr(fast, name), expected, rtol=1e-9, atol=1e-12, err_msg=name
        )
    np.testing.assert_array_equal(fast.weight, sequence_mean(forest))
    assert (fast.of_leaf is None) == (advantage == "hierarchical")
    if fast.of_leaf is not None:  # on a node that only one trajectory passes it is the node's
        np.testing.assert_allclose(fast.of_leaf, fast.advantage[forest.leaf_node], atol=1e-12)
    beside = {"eps_high", "weight", "of_leaf"}
    assert {*slow} == {field.name for field in dataclasses.fields(Scored)} - beside


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(["hierarchical", "group"]))
def test_trees_do_not_influence_each_other(seed, advantage):
    rng = np.random.default_rng(seed)
    trees = [twin.random_tree(rng) for _ in range(3)]
    config = AlgoConfig(advantage=advantage)
    together = score(Forest.from_trees(trees), config)
    at = leaves = 0
    for tree in trees:
        alone = score(Forest.from_trees([tree]), config)
        for field in dataclasses.fields(Scored):
            if field.name != "eps_high" and getattr(alone, field.name) is not None:
                first, size = (
                    (leaves, len(tree.leaves))
                    if field.name in ("weight", "of_leaf")
                    else (at, len(tree))
                )
                whole = getattr(together, field.name)[first : first + size]
                np.testing.assert_array_equal(whole, getattr(alone, field.name))
        at, leaves = at + len(tree), leaves + len(tree.leaves)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_weights_of_the_tokens_of_each_tree_sum_to_one(seed):
    forest = twin.random_forest(seed)
    weight = sequence_mean(forest)
    for tree in range(len(forest)):
        leaves = forest.leaves(tree)
        silent = [
            not any(forest.agent[token] for token in twin.path_tokens(forest, leaf))
            for leaf in twin.leaves_of(forest, tree)
        ]
        mass = sum(
            weight[i] * sum(int(forest.agent[t]) for t in twin.path_tokens(forest, leaf))
            for i, leaf in zip(leaves, twin.leaves_of(forest, tree), strict=True)
        )
        assert mass == pytest.approx(1 - sum(silent) / len(leaves))
        assert [weight[i] == 0 for i in leaves] == silent


def test_group_advantage_on_a_shared_token_has_both_signs():
    """Two trajectories, one right and one wrong, share their first step: neither cancels."""
    tree = Tree([1])
    shared = tree.add_step(0, [2, 3], [1, 0], [-1, 0], [1, 0], tool_call=True)
    for reward in (1.0, 0.0):
        node = tree.add_step(shared, [4], [1], [-1], [1], tool_call=False)
        tree.finish(node, reward=reward, correct=reward == 1, end="answer")
    forest = Forest.from_trees([tree])
    scored = score(forest, AlgoConfig(advantage="group", advantage_eps=0.0))
    assert scored.pos == pytest.approx([0.25, 0.25, 0.25, 0])
    assert scored.neg == pytest.approx([-0.25, -0.25, 0, -0.25])
    assert scored.advantage == pytest.approx([0, 0, 1, -1])


def test_planners_by_configuration():
    assert isinstance(make_planner(AlgoConfig(planner="star")), StarPlanner)
    planner = make_planner(AlgoConfig(n_total=5, bel={"b_max": 2, "x_max": 4, "beta": 1.5}))
    assert isinstance(planner, BelPlanner)
    assert (planner.n_total, planner.b_max, planner.x_min) == (5, 2, 1)
    assert (planner.x_max, planner.beta) == (4, 1.5)


def test_star_asks_once_for_everything():
    planner, tree = StarPlanner(3), Tree([1])
    assert planner.requests() == [Request(0, 3)]
    assert planner.requests() == []
    for _ in range(3):
        assert not planner.done
        node = tree.add_step(0, [1], [1], [-1], [1], tool_call=False)
        leaf = tree.finish(node, reward=0, correct=False, end="answer")
        planner.observe(trajectory_of(tree, leaf))
    assert planner.done
    assert (planner.spent, planner.critical) == (3, ())
    with pytest.raises(RuntimeError, match="the budget is spent"):
        planner.observe(trajectory_of(tree, 0))
    with pytest.raises(ValueError, match="n_total=0"):
        StarPlanner(0)


def test_summary_of_a_trajectory_that_ends_at_its_turn_limit():
    """The last call has no step after it: no entropy, and it does not enter the mean."""
    tree = Tree([1])
    first = tree.add_step(0, [1, 2], [1, 0], [-1, 0], [0.25, 9], tool_call=True)
    silent = tree.add_step(first, [3], [0], [0], [9], tool_call=False)
    last = tree.add_step(silent, [4], [1], [-1], [0.5], tool_call=True)
    leaf = tree.finish(last, reward=0, correct=False, end="turn_limit")
    trajectory = trajectory_of(tree, leaf)
    assert trajectory.steps == (first, silent, last)
    assert trajectory.calls == (first, last)
    assert trajectory.root_entropy == 0.25
    assert all(math.isnan(entropy) for entropy in trajectory.tool_entropy)
    assert len(trajectory.tool_entropy) == 2
    assert math.isnan(trajectory.mean_tool_entropy)
    assert math.isnan(trajectory.contrast)
    assert not trajectory.correct
