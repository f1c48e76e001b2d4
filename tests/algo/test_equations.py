"""One named test for each equation of the paper, by hand-checked numbers or the literal formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elpo_fast.algo import score
from elpo_fast.algo.bel import select_reference, suffix_count
from elpo_fast.algo.clipping import lower_bounds
from elpo_fast.algo.planners import Trajectory, trajectory_of
from elpo_fast.algo.weights import sequence_mean
from elpo_fast.config import AlgoConfig, ClipConfig
from elpo_fast.tree import ops
from elpo_fast.tree.pack import PackedBatch, Scored, pack
from elpo_fast.tree.store import Forest, Tree


def step(tree: Tree, parent: int, *, agent: int = 1, env: int = 0) -> int:
    """A step of so many agent and environment tokens, log-probs -1, -2, ..."""
    size = agent + env
    mask = np.arange(size) < agent
    logprob = -np.arange(1.0, size + 1) * mask
    return tree.add_step(parent, [9] * size, mask, logprob, mask * 0.5, tool_call=env > 0)


def grow(shape: dict, tree: Tree | None = None, parent: int = 0) -> Tree:
    """A tree from nested dictionaries: names to children, or to a leaf's reward."""
    tree = tree or Tree([1, 2])
    for below in shape.values():
        node = step(tree, parent, env=1)
        if isinstance(below, dict):
            grow(below, tree, node)
        else:
            tree.finish(node, reward=below, correct=below >= 1, end="answer")
    return tree


# Nodes 1 = a, 2 = a's leaves ..., 5 = b, 6 = b's only leaf, 7 = c.
SHAPE = {"a": {"x": 1.0, "y": 0.0, "z": 0.0}, "b": {"w": 1.0}, "c": 0.0}


def values(shape: dict, *, lambda_tree: float = 0.5) -> Scored:
    forest = Forest.from_trees([grow(shape)])
    return score(forest, AlgoConfig(lambda_tree=lambda_tree, advantage_eps=0.0))


def packed_loss(batch: PackedBatch, ratio: np.ndarray) -> np.ndarray:
    """What the trainer computes from a packed batch, by token."""
    clipped = np.clip(ratio, 1 - batch.eps_low, 1 + batch.eps_high)
    good = batch.pos_coef * np.minimum(ratio, clipped)
    return good + batch.neg_coef * np.maximum(ratio, clipped)


def test_eq01_objective_is_the_mean_over_trajectories_of_the_mean_over_their_tokens():
    """GRPO: a star of trajectories of different lengths, with environment tokens masked out."""
    tree, lengths, rewards = Tree([1, 2, 3]), (1, 4, 2), (1.0, 0.0, 0.5)
    for length, reward in zip(lengths, rewards, strict=True):
        node = step(tree, step(tree, 0, agent=length, env=3), agent=length)
        tree.finish(node, reward=reward, correct=reward == 1, end="answer")
    forest = Forest.from_trees([tree])
    config = AlgoConfig(planner="star", advantage="group", advantage_eps=1e-6)
    batch = pack(forest, [0], score(forest, config))
    ratio = np.exp(np.random.default_rng(0).normal(0, 1, len(batch)))

    advantage = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-6)
    expected = 0.0
    at = 3  # in a star the packed order is one trajectory after the other
    for length, a in zip(lengths, advantage, strict=True):
        masked = [*range(at, at + length), *range(at + length + 3, at + 2 * length + 3)]
        r = ratio[masked]
        expected += np.mean(np.minimum(r * a, np.clip(r, 0.8, 1.315) * a)) / len(lengths)
        at += 2 * length + 3
    assert packed_loss(batch, ratio).sum() == pytest.approx(expected, rel=1e-6)


def test_eq02_ratio_uses_the_log_prob_of_the_token_when_it_was_sampled():
    """`rho = exp(new - old)`: every packed agent token has its own old log-prob beside it."""
    forest = Forest.from_trees([grow(SHAPE), grow(SHAPE)])
    batch = pack(forest, [1, 0], score(forest, AlgoConfig()))
    new = np.random.default_rng(1).normal(-2, 1, len(batch))
    for token in range(len(batch)):
        node = batch.node[token]
        offset = token - np.flatnonzero(batch.node == node)[0]
        old = forest.logprob[forest.token_start[node] + offset]
        assert math.exp(new[token] - batch.old_logprob[token]) == math.exp(new[token] - old)
    assert (batch.old_logprob[batch.agent == 1] < 0).all()
    assert not (batch.pos_coef[batch.agent == 0].any() or batch.neg_coef[batch.agent == 0].any())


def test_eq03_token_entropies_enter_as_means_over_agent_tokens():
    """`H = -sum p log p`; of the first step, and of the steps right after tool responses."""
    rng = np.random.default_rng(0)

    def entropies(count: int) -> np.ndarray:
        logits = rng.normal(size=(count, 11))
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return -(p * np.log(p)).sum(-1)

    first, second, third = entropies(2), entropies(3), entropies(1)
    tree, node = Tree([1]), 0
    for own, calls in ((first, True), (second, True), (third, False)):
        size = len(own) + 2  # two environment tokens, whose entropy is not the policy's
        mask = [1] * len(own) + [0, 0]
        node = tree.add_step(node, [0] * size, mask, [-1] * size, [*own, 0, 0], tool_call=calls)
    tree.finish(node, reward=0, correct=False, end="answer")
    trajectory = trajectory_of(tree, 0)
    assert trajectory.root_entropy == pytest.approx(first.mean())
    assert trajectory.tool_entropy == pytest.approx((second.mean(), third.mean()))
    # All those tokens count the same, so this is not the mean of the two means.
    assert trajectory.mean_tool_entropy == pytest.approx(np.concatenate([second, third]).mean())


def test_eq04_reference_has_the_largest_entropy_contrast():
    buffer = [
        Trajectory(0, (1, 2), (1,), False, 0.9, (1.4,), 1.4),  # largest H_tool
        Trajectory(1, (3, 4), (3,), False, 0.2, (1.0,), 1.0),  # largest difference
        Trajectory(2, (5, 6), (5,), False, 0.1, (0.3,), 0.3),
    ]
    assert select_reference(buffer).leaf == 1


def test_eq05_more_suffixes_where_entropy_is_higher():
    def exact(contrast: float) -> float:
        return 1 + (3 - 1) / (1 + math.exp(-5 * contrast))

    for contrast in np.linspace(-2, 2, 81):
        assert abs(suffix_count(float(contrast), 1, 3, 5.0) - exact(contrast)) <= 0.5
    counts = [suffix_count(c, 1, 9, 5.0) for c in np.linspace(-2, 2, 81)]
    assert counts == sorted(counts)
    assert set(counts) == set(range(1, 10))


def test_eq06_node_reward_is_the_mean_of_direct_children_not_of_leaves():
    reward = values(SHAPE).node_reward
    assert reward[[1, 5, 7]] == pytest.approx([1 / 3, 1, 0])
    assert reward[0] == pytest.approx((1 / 3 + 1 + 0) / 3)  # the mean over leaves is 2 / 5


def test_eq07_branch_advantage_normalises_among_siblings():
    branch = values(SHAPE).branch
    siblings = np.array([1 / 3, 1, 0])
    assert branch[[1, 5, 7]] == pytest.approx((siblings - siblings.mean()) / siblings.std())
    assert branch[2:5] == pytest.approx(np.array([2, -1, -1]) / math.sqrt(2))  # population std
    assert branch[6] == branch[5], "an only child inherits"
    assert branch[0] == 0
    assert (values({"a": {"x": 0.3, "y": 0.3}, "b": 1.0}).branch[2:4] == 0).all(), "equal siblings"


def test_eq08_trajectory_advantage_normalises_over_all_leaves():
    rewards = np.array([1.0, 0, 0, 1, 0])
    expected = (rewards - 0.4) / math.sqrt(0.24)
    assert ops.leaf_advantages(np.array([0, 5]), rewards, 0.0) == pytest.approx(expected)
    scaled = (rewards - 0.4) / (math.sqrt(0.24) + 0.1)
    assert ops.leaf_advantages(np.array([0, 5]), rewards, 0.1) == pytest.approx(scaled)


def test_eq09_node_gets_the_mean_over_the_leaves_below():
    of_leaf = (np.array([1.0, 0, 0, 1, 0]) - 0.4) / math.sqrt(0.24)
    trajectory = values(SHAPE).trajectory
    assert trajectory[[2, 3, 4, 6, 7]] == pytest.approx(of_leaf)
    assert trajectory[1] == pytest.approx(of_leaf[:3].mean())
    assert trajectory[5] == trajectory[6]
    assert trajectory[0] == pytest.approx(0)


@pytest.mark.parametrize("lambda_tree", [0.0, 0.25, 0.5, 1.0])
def test_eq10_hierarchical_advantage_blends_both(lambda_tree):
    both = values(SHAPE, lambda_tree=lambda_tree)
    expected = lambda_tree * both.branch + (1 - lambda_tree) * both.trajectory
    np.testing.assert_allclose(both.advantage, expected, rtol=1e-15)
    assert not np.allclose(both.branch, both.trajectory)


def critical_forest(*, localized: bool = True) -> Forest:
    """root - 1 - 2 - 3 (leaf 0, reference, critical step 2); probes 2 - 4 and 1 - 5 (success)."""
    tree = Tree([1, 2])
    one = step(tree, 0, env=1)
    two = step(tree, one, env=1)
    for parent, reward in ((two, 0.0), (two, 0.0), (one, 1.0)):
        leaf = step(tree, parent, agent=2)
        tree.finish(leaf, reward=reward, correct=reward == 1, end="answer")
    tree.mark_critical(two, 0, localized)
    return Forest.from_trees([tree])


@pytest.mark.parametrize(
    ("localized", "choices", "relaxed"),
    [
        (True, {}, {2, 3}),
        (False, {}, set()),
        (False, {"require_localized": False}, {2, 3}),
        (True, {"scope": "tree"}, {2, 3, 4}),
        (False, {"scope": "tree"}, {2, 3, 4}),
        (True, {"eps_elc": 0.0}, set()),
    ],
)
def test_eq11_lower_bound_is_relaxed_from_the_critical_step_on(localized, choices, relaxed):
    bounds = lower_bounds(critical_forest(localized=localized), ClipConfig(**choices))
    expected = [0.315 if node in relaxed else 0.2 for node in range(6)]
    assert bounds == pytest.approx(expected)


def test_eq12_relaxed_bound_keeps_negative_updates_unclipped_for_longer():
    """`min(rho A, clip(rho, 1 - eps_low_t, 1 + eps_high) A)`: with A < 0 the gradient ends at
    1 - eps_low_t, which only the critical step and what follows it move; with A > 0 at 1 + eps_high
    everywhere."""
    forest = critical_forest()
    scored = score(forest, AlgoConfig())
    batch = pack(forest, [0], scored)
    agent = np.flatnonzero(batch.agent)

    def moving(ratio: float) -> set[int]:
        """Nodes whose loss still changes with the ratio."""
        around = [packed_loss(batch, np.full(len(batch), ratio + d)) for d in (-1e-3, 1e-3)]
        return set(batch.node[agent[np.abs(around[1] - around[0])[agent] > 1e-8]].tolist())

    negative = {2, 3, 4}
    assert {node for node in range(1, 6) if scored.advantage[node] < 0} == negative
    assert {node for node in range(1, 6) if scored.advantage[node] > 0} == {5}
    assert moving(1.0) == negative | {5}
    assert moving(0.75) == {2, 3, 5}, "between both bounds: relaxed nodes only"
    assert moving(0.65) == {5}
    assert moving(1.4) == negative, "the upper bound is one for all"

    low, a = scored.eps_low[batch.node], scored.advantage[batch.node]
    weight = ops.leaf_sum(forest.parent, forest.leaf_node, sequence_mean(forest))[batch.node]
    for ratio in (0.5, 0.7, 0.9, 1.2, 2.0):
        literal = np.minimum(ratio * a, np.clip(ratio, 1 - low, 1 + 0.315) * a)
        ours = packed_loss(batch, np.full(len(batch), ratio))
        np.testing.assert_allclose(ours, weight * literal * batch.agent, rtol=1e-5, atol=1e-8)
