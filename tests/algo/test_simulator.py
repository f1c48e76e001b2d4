"""Searches among scripted policies: Algorithm 1 against its exact theory, Bayesian bisection."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_fast.algo.bel import BelPlanner, suffix_count
from elpo_fast.algo.bel_bayes import BayesPlanner, BayesSearch, posterior
from elpo_fast.algo.planners import Trajectory
from elpo_fast.algo.simulator import Policy, Script, Search, repeated, searches, theory

from .world import World, play

PAPER = {"n_total": 16, "b_max": 3, "x_min": 1, "x_max": 3, "beta": 5.0}
seeds = st.integers(0, 2**32 - 1)


def found(policies: int, monotone: bool, kind: type[BelPlanner], **more: float) -> list[Search]:
    every = []
    for seed in range(policies):
        policy = Policy(seed, monotone=monotone)
        every += searches(kind(**PAPER, **more), policy, 16)
        assert policy.trajectories == 16, "the budget, no more and no less"
    return every


@pytest.mark.parametrize("monotone", [True, False])
def test_localization_errs_as_often_and_by_as_much_as_theory_says(monotone: bool) -> None:
    right = too_far = spread = spread_far = 0.0
    every = found(400, monotone, BelPlanner)
    for search in every:
        entropies = search.script.trajectory.tool_entropy
        counts = [suffix_count(entropy, 1, 3, 5.0) for entropy in entropies]
        expected = theory(search.script, counts, search.left)
        assert (search.found, search.critical.localized) in expected
        truth = search.script.irrecoverable
        chance = sum(p for (step, _), p in expected.items() if step == truth)
        mean = sum(p * abs(step - truth) for (step, _), p in expected.items())
        square = sum(p * (step - truth) ** 2 for (step, _), p in expected.items())
        right, spread = right + (search.error == 0) - chance, spread + chance * (1 - chance)
        too_far, spread_far = too_far + abs(search.error) - mean, spread_far + square - mean**2
    assert len(every) > 400
    assert abs(right) < 4 * math.sqrt(spread)
    assert abs(too_far) < 4 * math.sqrt(spread_far)


def script(*recoverability: float) -> Script:
    calls = len(recoverability)
    nodes = tuple(range(1, calls + 2))
    return Script(Trajectory(0, nodes, nodes[:-1], False, 0.0, (0.0,) * calls, 0.0), recoverability)


@pytest.mark.parametrize("truth", [(0.9, 0.6, 0.3, 0.0, 0.0), (0.5, 0.0, 0.7, 0.0), (0.0,)])
def test_theory_is_what_repeated_searches_find(truth: tuple[float, ...]) -> None:
    planner = {"n_total": 1 + 6, "b_max": 1, "x_min": 2, "x_max": 2, "beta": 0.0}
    times = 4000
    steps = repeated(script(*truth), lambda: BelPlanner(**planner), times, seed=1)
    expected = theory(script(*truth), [2] * len(truth))
    assert sum(expected.values()) == pytest.approx(1.0)
    for step in range(1, len(truth) + 1):
        chance = sum(p for (at, _), p in expected.items() if at == step)
        reach = 4.5 * math.sqrt(chance * (1 - chance) / times)
        assert abs(steps.count(step) / times - chance) <= reach


def test_theory_ends_with_the_budget() -> None:
    assert theory(script(0.5, 0.5, 0.0, 0.0), [2] * 4, left=1) == {(3, False): 0.5, (1, False): 0.5}


def test_certain_probes_are_never_wrong() -> None:
    """A recoverable prefix always recovers: bisection finds the step wherever it is."""
    for first in range(1, 9):
        truth = [1.0] * (first - 1) + [0.0] * (9 - first)
        assert theory(script(*truth), [1] * 8) == {(first, True): 1.0}


def test_overspending_is_noticed() -> None:
    planner = BelPlanner(**{**PAPER, "n_total": 20})
    with pytest.raises(RuntimeError, match=r"exceed n_total=16"):
        list(searches(planner, Policy(3), 16))


def test_worlds_are_as_said() -> None:
    for monotone in (True, False):
        again = False
        for seed in range(60):
            policy = Policy(seed, monotone=monotone)
            list(searches(BelPlanner(**PAPER), policy, 16))
            for each in policy.scripts.values():
                chances = each.recoverability
                assert chances[-1] == chances[each.irrecoverable - 1] == 0
                assert all(chance > 0 for chance in chances[: each.irrecoverable - 1])
                if monotone:
                    assert list(chances) == sorted(chances, reverse=True)
                again |= any(chances[each.irrecoverable :])
        assert again != monotone, "later steps are recoverable again, or never"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(1, 7), st.booleans()), max_size=6),
)
def test_the_posterior_is_bayes_rule(calls: int, probes: list[tuple[int, bool]]) -> None:
    probes = [(anchor, success) for anchor, success in probes if anchor < calls]
    weight = np.zeros(calls)
    for step, q in product(range(1, calls + 1), np.linspace(0.05, 0.95, 10)):
        chance = 1.0
        for anchor, success in probes:
            recovers = q if anchor < step else 0.0
            chance *= recovers if success else 1 - recovers
        weight[step - 1] += chance
    expected = weight / weight.sum()
    together = [
        (at, sum(s for a, s in probes if a == at), sum(not s for a, s in probes if a == at))
        for at in {anchor for anchor, _ in probes}
    ]
    np.testing.assert_allclose(posterior(calls, together), expected, atol=1e-12)


def test_a_failure_is_doubted_and_a_success_is_not() -> None:
    odds = posterior(4, [(2, 0, 1)])
    assert odds[0] == odds[1] > odds[2] == odds[3] > 0
    odds = posterior(4, [(2, 1, 0)])
    assert odds[0] == odds[1] == 0 < odds[2] == odds[3]


def test_probes_are_where_something_is_to_be_learned() -> None:
    search = BayesSearch(script(*[0.0] * 8).trajectory, [1] * 8, 6, 0.9)
    first, count = search.next_probe()
    assert 3 < first < 6 and count == 1
    search.learn(1, 0)
    second, _ = search.next_probe()
    assert second > first, "a success settles all before it"
    search.learn(0, 1)
    assert first < search.step <= second and not search.settled


@settings(max_examples=80, deadline=None)
@given(seeds, st.integers(1, 30), st.sampled_from([0.3, 1.0]), st.floats(0.3, 1.0))
def test_bayesian_bisection_spends_the_budget_exactly(seed, n_total, probe_rate, confidence):
    planner = BayesPlanner(n_total, 2, 1, 3, 5.0, confidence)
    world = World(seed, max_calls=10, probe_rate=probe_rate)
    play(planner, world, np.random.default_rng(seed))
    assert planner.spent == len(world.tree.leaves) == n_total
    for critical in planner.critical:
        path = world.tree.path(world.tree.leaves[critical.leaf])
        assert critical.node in path
        calls = sum(world.tree.tool_call[node] for node in path)
        assert critical.probes <= 2 * math.ceil(math.log2(calls)), "what bisection takes at most"


@pytest.mark.parametrize("monotone", [True, False])
def test_bayesian_bisection_is_right_more_often_at_equal_rollouts(monotone: bool) -> None:
    def right(every: list[Search]) -> float:
        return float(np.mean([search.error == 0 for search in every]))

    bisection = found(300, monotone, BelPlanner)
    bayesian = found(300, monotone, BayesPlanner, confidence=0.9)
    assert len(bayesian) > 0.95 * len(bisection)
    assert right(bayesian) > right(bisection)


@pytest.mark.parametrize("confidence", [0.0, 1.5])
def test_impossible_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence="):
        BayesPlanner(**PAPER, confidence=confidence)
