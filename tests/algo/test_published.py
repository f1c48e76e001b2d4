"""Published advantages, weights and planners against direct transcriptions of their definitions."""

from __future__ import annotations

from statistics import fmean, pstdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_fast.algo import make_planner, score
from elpo_fast.algo.entropy import EntropyPlanner
from elpo_fast.algo.overlong import punished
from elpo_fast.algo.planners import Trajectory
from elpo_fast.algo.random import RandomPlanner
from elpo_fast.algo.segment import SegmentPlanner
from elpo_fast.algo.topk import TopKPlanner
from elpo_fast.config import AlgoConfig
from elpo_fast.tree.store import Forest

from ..tree import twin
from .world import World, play

seeds = st.integers(0, 2**32 - 1)
EPS = 1e-6


def normalised(value: float, group: list[float]) -> float:
    if max(group) == min(group):
        return 0.0
    return (value - fmean(group)) / (pstdev(group) + EPS)


class Sampled:
    """A forest's trajectories one by one: reward, agent tokens, and whom each is compared with."""

    def __init__(self, forest: Forest) -> None:
        self.forest = forest
        self.paths = [forest.path(int(node)) for node in forest.leaf_node]
        self.reward = [float(forest.reward[path[-1]]) for path in self.paths]
        self.tree = [int(forest.tree[path[-1]]) for path in self.paths]
        self.length = [
            sum(int(forest.agent[slice(*forest.token_start[n : n + 2])].sum()) for n in path)
            for path in self.paths
        ]

    def task(self, i: int) -> list[int]:
        return [j for j, tree in enumerate(self.tree) if tree == self.tree[i]]

    def rewards(self, members: list[int]) -> list[float]:
        return [self.reward[j] for j in members]


def expected_advantage(name: str, s: Sampled, i: int) -> float:
    reward, task = s.reward[i], s.task(i)
    others = [j for j in task if j != i]
    same_start = [j for j in task if s.paths[j][1] == s.paths[i][1]]
    match name:
        case "group_unnormalised":
            return reward - fmean(s.rewards(task))
        case "leave_one_out":
            return reward - fmean(s.rewards(others)) if others else 0.0
        case "batch":
            return normalised(reward, s.reward)
        case "tree_group":
            within = normalised(reward, s.rewards(same_start))
            return within + normalised(reward, s.rewards(task))
    raise AssertionError(name)


def expected_weight(name: str, s: Sampled, i: int) -> float:
    task = s.task(i)
    match name:
        case "token_mean":
            return 1 / max(1, sum(s.length[j] for j in task))
        case "token_sum":
            return 1 / (len(task) * 50)
    return 1 / (len(task) * s.length[i]) if s.length[i] else 0.0


@settings(max_examples=60, deadline=None)
@given(
    seeds,
    st.sampled_from(["group_unnormalised", "leave_one_out", "batch", "tree_group"]),
    st.sampled_from(["sequence_mean", "token_mean", "token_sum"]),
)
def test_a_trajectory_has_its_advantage_on_all_its_tokens(seed, advantage, weights):
    forest = twin.random_forest(seed, leaves=7)
    config = AlgoConfig(
        advantage=advantage, weights=weights, token_sum_length=50, advantage_eps=EPS
    )
    s = Sampled(forest)
    pos, neg = np.zeros(len(forest.parent)), np.zeros(len(forest.parent))
    for i, path in enumerate(s.paths):
        value = expected_advantage(advantage, s, i)
        weight = expected_weight(weights, s, i)
        pos[path] += weight * max(value, 0.0)
        neg[path] += weight * min(value, 0.0)
    found = score(forest, config)
    np.testing.assert_allclose(found.pos, pos, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.neg, neg, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_the_value_of_a_step_is_what_it_adds(seed):
    forest = twin.random_forest(seed, leaves=7)
    s = Sampled(forest)
    through = [
        [s.reward[i] for i, path in enumerate(s.paths) if node in path]
        for node in range(len(forest.parent))
    ]
    found = score(forest, AlgoConfig(advantage="child_value"))
    for node, parent in enumerate(forest.parent):
        added = fmean(through[node]) - fmean(through[parent]) if parent >= 0 else 0.0
        assert found.advantage[node] == pytest.approx(added, abs=1e-12)
        mass = sum(
            expected_weight("sequence_mean", s, i) for i, path in enumerate(s.paths) if node in path
        )
        assert found.pos[node] == pytest.approx(mass * max(added, 0.0), abs=1e-12)
        assert found.neg[node] == pytest.approx(mass * min(added, 0.0), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(0, 20))
def test_rewards_of_long_trajectories_fall(seed, buffer, more):
    """DAPO, Eq. 13, and nothing else changes."""
    forest, limit = twin.random_forest(seed, leaves=7), buffer + more
    s = Sampled(forest)
    found = punished(forest, limit, buffer)
    for i, path in enumerate(s.paths):
        length = s.length[i]
        if length <= limit - buffer:
            expected = 0.0
        elif length <= limit:
            expected = ((limit - buffer) - length) / buffer
        else:
            expected = -1.0
        assert found.reward[path[-1]] == pytest.approx(s.reward[i] + expected)
    assert np.array_equal(found.correct, forest.correct)
    config = {"advantage": "group", "overlong": {"limit": limit, "buffer": buffer}}
    shaped = score(forest, AlgoConfig.model_validate(config))
    np.testing.assert_array_equal(shaped.pos, score(found, AlgoConfig(advantage="group")).pos)


def test_equal_rewards_have_no_advantage_at_all():
    """Not even what rounding leaves: it would cost a whole tree."""
    rng = np.random.default_rng(0)
    tree = twin.random_tree(rng, leaves=7)
    for leaf in tree.leaves:
        tree.reward[leaf] = 0.1
    forest = Forest.from_trees([tree])
    for name in ("group_unnormalised", "leave_one_out", "batch", "tree_group", "child_value"):
        found = score(forest, AlgoConfig(advantage=name))
        assert not found.pos.any() and not found.neg.any(), name


worlds = st.fixed_dictionaries(
    {"max_calls": st.integers(0, 6), "solve_rate": st.sampled_from([0.0, 0.3, 1.0])}
)


@settings(max_examples=60, deadline=None)
@given(seeds, worlds, st.integers(1, 6), st.integers(1, 3), st.integers(6, 20))
def test_random_expansions(seed, shape, trees, expansions, n_total):
    planner, world = RandomPlanner(n_total, trees, expansions), World(seed, **shape)
    rounds = play(planner, world, np.random.default_rng(seed))
    assert planner.spent == len(world.asked) == n_total
    assert world.asked[:trees] == [0] * trees, "full ones first"
    sizes = [len(requests) for requests in rounds]
    again = World(seed, **shape)
    play(RandomPlanner(n_total, trees, expansions), again, np.random.default_rng(seed + 1))
    assert again.asked == world.asked, "the order in which trajectories end decides nothing"
    for before, size in enumerate(sizes[1:-1], 1):
        known = trees + sum(r.node == 0 for requests in rounds[1:before] for r in requests)
        assert size == known * expansions
    for node in world.asked:
        if node:
            assert world.tree.tool_call[node] and world.tree.correct[node] < 0


@settings(max_examples=60, deadline=None)
@given(seeds, worlds, st.integers(1, 6), st.sampled_from([0.2, 0.5, 0.6]), st.integers(6, 20))
def test_uncertain_places_are_branched_after(seed, shape, initial, threshold, n_total):
    planner = EntropyPlanner(n_total, initial, alpha=0.5, beta=0.4, threshold=threshold)
    world = World(seed, **shape)
    play(planner, world, np.random.default_rng(seed))
    assert planner.spent == len(world.asked) == n_total
    assert world.asked[:initial] == [0] * initial
    branched = [node for node in world.asked if node]
    assert len(branched) == len(set(branched)), "a place is branched after once"
    for node in branched:
        assert world.tree.tool_call[node] and world.tree.correct[node] < 0


def trajectory(leaf: int, steps: tuple[int, ...], *entropies: float) -> Trajectory:
    return Trajectory(leaf, steps, steps[:-1], False, 1.0, entropies, float(np.mean(entropies)))


def test_the_most_uncertain_place_comes_first():
    planner = EntropyPlanner(5, 1, alpha=0.5, beta=0.2, threshold=0.5)
    assert [(r.node, r.count) for r in planner.requests()] == [(0, 1)]
    planner.observe(trajectory(0, (1, 2, 3, 4), 1.5, 0.9, 2.0))  # less certain, more, much less
    assert [(r.node, r.count) for r in planner.requests()] == [(3, 1), (1, 1)]
    planner.observe(trajectory(1, (1, 2, 3, 5), 1.5, 0.9, 2.0))
    planner.observe(trajectory(2, (1, 6), 1.2))
    assert [(r.node, r.count) for r in planner.requests()] == [(0, 2)], "nothing else is new"


def test_branching_after_branches_is_penalised():
    """AEPO (Eq. 6): (alpha + gamma dH) (1 - l P), l branched calls right before."""
    planner = EntropyPlanner(9, 1, alpha=0.5, beta=0.2, threshold=0.5, penalty=0.25)
    planner.requests()
    planner.observe(trajectory(0, (1, 2, 3, 4, 5, 6), 2.0, 2.0, 5.0, 0.5, 2.0))
    # 0.7, 0.7 * 0.75, 1.3 * 0.5, 0.4 * 0.25 (not branched), and 0.7 again
    assert [(r.node, r.count) for r in planner.requests()] == [(1, 1), (5, 1), (3, 1), (2, 1)]
    for leaf in range(1, 5):
        planner.observe(trajectory(leaf, (1, 2, 3, 4, 5, 6 + leaf), 2.0, 2.0, 5.0, 0.5, 2.0))
    assert [(r.node, r.count) for r in planner.requests()] == [(0, 4)]


@pytest.mark.parametrize(("entropy", "full"), [(1.0, 8), (3.0, 2), (-1.0, 14), (-40.0, 16)])
def test_the_first_trajectory_says_how_many_are_full(entropy, full):
    """AEPO (Eq. 4): k sigmoid(beta (H_root - H_tool)), H_root being 1 here."""
    planner = EntropyPlanner(16, 4, alpha=-9.0, beta=0.0, threshold=0.5, monitor=1.0)
    assert [(r.node, r.count) for r in planner.requests()] == [(0, 1)]
    planner.observe(trajectory(0, (1, 2), entropy))
    assert [(r.node, r.count) for r in planner.requests()] == [(0, full - 1)]


@settings(max_examples=60, deadline=None)
@given(seeds, worlds, st.integers(1, 6), st.integers(1, 3), st.integers(6, 20))
def test_the_most_uncertain_places_are_expanded(seed, shape, initial, expansions, n_total):
    """AT2PO: top K by entropy, less a penalty for each branch that is there."""
    planner, world = TopKPlanner(n_total, initial, expansions, 0.1), World(seed, **shape)
    rounds = []
    while not planner.done:
        requests = planner.requests()
        rounds.append([r.node for r in requests])
        tree, best = world.tree, {}
        for node in range(1, len(tree)):
            below = [c for c in range(1, len(tree)) if tree.parent[c] == node]
            found = [tree.entropy[c][tree.agent[c] != 0] for c in below]
            means = [float(e.mean()) for e in found if len(e)]
            if tree.tool_call[node] and means:
                best[node] = fmean(means) - 0.1 * (len(means) - 1)
        if len(rounds) > 1 and best:
            ranked = sorted(best, key=lambda node: (-round(best[node], 6), node))
            chosen = {round(best[node], 6) for node in ranked[: len(requests)]}
            assert {round(best[r.node], 6) for r in requests} == chosen
            assert len(requests) == min(expansions, len(best), n_total - len(world.asked))
        for request in requests:
            for _ in range(request.count):
                planner.observe(world.sample(request.node))
    assert planner.spent == len(world.asked) == n_total
    assert world.asked[:initial] == [0] * initial


@settings(max_examples=60, deadline=None)
@given(seeds, worlds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 20))
def test_cut_points_are_even_and_each_is_continued(seed, shape, cuts, continuations, n_total):
    planner, world = SegmentPlanner(n_total, cuts, continuations), World(seed, **shape)
    play(planner, world, np.random.default_rng(seed))
    assert planner.spent == len(world.asked) == n_total
    asked = list(world.asked)
    leaf = 0
    while asked:
        assert asked.pop(0) == 0, "a full one first"
        path = world.tree.path(world.tree.leaves[leaf])[1:]
        able = [node for node in path[:-1] if world.tree.tool_call[node]]
        number = min(cuts, len(able))
        expected = []
        for cut in range(1, number + 1):
            place = able[int(cut * (len(able) + 1) / (number + 1)) - 1]
            expected += [place] * continuations
        assert len(set(expected)) == number
        assert asked[: len(expected)] == expected[: len(asked)]
        leaf += 1 + len(asked[: len(expected)])
        asked = asked[len(expected) :]


@pytest.mark.parametrize(
    "settings_",
    [
        {"planner": "random", "random": {"trees": 9}},
        {"planner": "entropy", "n_total": 7},
        {"planner": "entropy_topk", "n_total": 3},
    ],
)
def test_a_budget_that_is_too_small_is_refused(settings_):
    with pytest.raises(ValueError, match="must be between 1 and n_total"):
        make_planner(AlgoConfig(**{"n_total": 8, **settings_}))
