"""The numba passes against their slow twin, and the relations they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_fast.tree import ops
from elpo_fast.tree.store import Forest, Tree

from . import twin

seeds = st.integers(0, 2**32 - 1)
shapes = st.fixed_dictionaries(
    {"trees": st.integers(1, 3), "leaves": st.integers(1, 9), "steps": st.integers(1, 5)}
)
close = {"rtol": 1e-9, "atol": 1e-12}


def chain_of_means(rewards: list[float], eps: float = 1e-6) -> np.ndarray:
    """Branch advantages of a root whose only level is these leaves."""
    parent = np.array([-1] + [0] * len(rewards))
    reward = np.array([np.nan, *rewards])
    return ops.branch_advantages(parent, ops.node_rewards(parent, reward), eps)[1:]


@settings(max_examples=40, deadline=None)
@given(seeds, shapes)
def test_values_equal_the_twin(seed, shape):
    forest = twin.random_forest(seed, **shape)
    slow = twin.scores(forest)
    parent, leaf = forest.parent, forest.leaf_node
    rewards = ops.node_rewards(parent, forest.reward)
    np.testing.assert_allclose(rewards, slow["node_reward"], **close)
    np.testing.assert_allclose(
        ops.branch_advantages(parent, rewards, 1e-6), slow["branch"], **close
    )
    of_leaf = ops.leaf_advantages(forest.leaf_start, forest.reward[leaf], 1e-6)
    below = ops.leaf_sum(parent, leaf, np.ones(len(leaf)))
    np.testing.assert_allclose(
        ops.leaf_sum(parent, leaf, of_leaf) / below, slow["trajectory"], **close
    )


@settings(max_examples=40, deadline=None)
@given(seeds, shapes)
def test_structure_equals_the_twin(seed, shape):
    forest = twin.random_forest(seed, **shape)
    nodes = range(len(forest.parent))
    below = twin.children(forest)
    order = [n for root in forest.node_start[:-1] for n in twin.descend(below, int(root))]
    ranks, end = ops.preorder(forest.parent, np.ones(len(nodes), np.int64))
    assert np.lexsort((ranks, forest.tree)).tolist() == order
    for a in nodes:
        under = {b for b in nodes if ranks[a] <= ranks[b] < end[a]}
        same_tree = {b for b in under if forest.tree[b] == forest.tree[a]}
        assert (
            same_tree
            == set(twin.descend(below, a))
            == {b for b in nodes if a in twin.path(forest, b)}
        )
    agent = ops.segment_sum(forest.token_start, forest.agent)
    length = ops.path_sum(forest.parent, agent)
    total = ops.subtree_sum(forest.parent, agent.astype(float))
    for node in nodes:
        own = [int(forest.agent[token]) for token in twin.node_tokens(forest, node)]
        assert agent[node] == sum(own)
        assert length[node] == sum(agent[up] for up in twin.path(forest, node))
        assert total[node] == sum(agent[down] for down in twin.descend(below, node))


@settings(max_examples=40, deadline=None)
@given(seeds, shapes)
def test_first_all_failed_steps_cover_each_failure_once(seed, shape):
    forest = twin.random_forest(seed, **shape)
    hopeless, first = ops.first_all_failed(forest.parent, forest.correct)
    below = twin.children(forest)
    for node in range(len(forest.parent)):
        failed = all(forest.correct[down] < 1 for down in twin.descend(below, node))
        assert hopeless[node] == (failed and forest.parent[node] >= 0)
    for leaf in forest.leaf_node.tolist():
        on_path = [node for node in twin.path(forest, leaf) if first[node]]
        assert len(on_path) == 1 - forest.correct[leaf]


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_marked_paths(seed):
    forest = twin.random_forest(seed)
    rng = np.random.default_rng(seed)
    bottom = rng.choice(forest.leaf_node, 3)
    top = np.array([rng.choice(twin.path(forest, int(leaf))) for leaf in bottom])
    expected = {
        node
        for a, b in zip(top.tolist(), bottom.tolist(), strict=True)
        for node in twin.path(forest, b)[twin.path(forest, b).index(a) :]
    }
    assert set(np.flatnonzero(ops.mark_paths(forest.parent, top, bottom))) == expected


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("value", [-1.1, 0.1, 1e-9, 0.0, 1e6 / 3])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_equal_rewards_give_exactly_zero(value, count, eps):
    assert (chain_of_means([value] * count, eps) == 0).all()
    start = np.array([0, count])
    assert (ops.leaf_advantages(start, np.full(count, value), eps) == 0).all()


def test_equal_means_of_different_subtrees_are_ties():
    """Ten times -1.1 summed is not -11.0, which must not become an advantage of +-1."""
    tree = Tree([])
    for count in (10, 3, 1):
        inner = tree.add_step(0, [], [], [], [], tool_call=True)
        for _ in range(count):
            leaf = tree.add_step(inner, [], [], [], [], tool_call=False)
            tree.finish(leaf, reward=-1.1, correct=False, end="answer")
    forest = Forest.from_trees([tree])
    rewards = ops.node_rewards(forest.parent, forest.reward)
    assert len(set(rewards.tolist())) > 1, "this example needs a rounding difference"
    assert (ops.branch_advantages(forest.parent, rewards, 0.0) == 0).all()


def test_means_that_cancel_are_ties():
    """0.1 + 0.2 - 0.3 is 5.6e-17: equal to zero on the scale of the rewards below."""
    tree = Tree([])
    for rewards in ((0.1, 0.2, -0.3), (0.3, -0.3)):
        inner = tree.add_step(0, [], [], [], [], tool_call=True)
        for reward in rewards:
            leaf = tree.add_step(inner, [], [], [], [], tool_call=False)
            tree.finish(leaf, reward=reward, correct=False, end="answer")
    forest = Forest.from_trees([tree])
    rewards = ops.node_rewards(forest.parent, forest.reward)
    branch = ops.branch_advantages(forest.parent, rewards, 0.0)
    assert rewards[1] != rewards[5]
    assert (branch[[1, 5]] == 0).all()
    assert (branch[2:5] != 0).all()


def test_small_differences_are_not_ties():
    assert chain_of_means([1.0, 1.0 + 1e-6], 0.0) == pytest.approx([-1, 1])
