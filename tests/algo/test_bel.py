"""Binary error localization against a scripted policy and the plain loop of Algorithm 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_fast.algo.bel import BelPlanner, select_reference, suffix_count
from elpo_fast.algo.planners import Critical, Request, Trajectory

from .world import World, algorithm_1, play

seeds = st.integers(0, 2**32 - 1)
settings_of = st.fixed_dictionaries(
    {
        "n_total": st.integers(1, 40),
        "b_max": st.integers(1, 5),
        "x_min": st.integers(1, 3),
        "x_max": st.integers(3, 5),
        "beta": st.floats(0, 10),
    }
)
worlds = st.fixed_dictionaries(
    {"max_calls": st.integers(0, 12), "solve_rate": st.sampled_from([0.0, 0.3, 0.9, 1.0])}
)


def run(seed: int, shape: dict, config: dict) -> tuple[BelPlanner, World, list[list[Request]]]:
    planner, world = BelPlanner(**config), World(seed, **shape)
    rounds = play(planner, world, np.random.default_rng(seed))
    return planner, world, rounds


@settings(max_examples=150, deadline=None)
@given(seeds, worlds, settings_of)
def test_noiseless_probes_always_find_the_planted_step(seed, shape, config):
    planner, world, _ = run(seed, shape, config)
    for critical in planner.critical:
        if critical.localized:
            assert critical.node == world.planted[critical.leaf]
        else:
            path = world.tree.path(world.tree.leaves[critical.leaf])
            assert path.index(critical.node) <= path.index(world.planted[critical.leaf])


@settings(max_examples=150, deadline=None)
@given(seeds, worlds, settings_of, st.sampled_from([0.3, 1.0]))
def test_budget_is_spent_exactly(seed, shape, config, probe_rate):
    planner, world, rounds = run(seed, {**shape, "probe_rate": probe_rate}, config)
    assert planner.spent == len(world.tree.leaves) == config["n_total"]
    assert all(len(requests) == 1 for requests in rounds), "one request in flight"
    for (request,) in rounds:
        limit = config["x_max"] if request.node else config["b_max"]
        assert 1 <= request.count <= limit


@settings(max_examples=150, deadline=None)
@given(seeds, worlds, settings_of, st.sampled_from([0.3, 1.0]))
def test_a_search_takes_at_most_log2_rounds(seed, shape, config, probe_rate):
    planner, world, _ = run(seed, {**shape, "probe_rate": probe_rate}, config)
    for number, critical in enumerate(planner.critical):
        calls = sum(
            world.tree.tool_call[node] for node in world.tree.path(world.tree.leaves[critical.leaf])
        )
        assert critical.probes <= math.ceil(math.log2(calls))
        assert critical.localized or number == len(planner.critical) - 1, "only the budget stops it"


@settings(max_examples=150, deadline=None)
@given(seeds, worlds, settings_of, st.sampled_from([0.3, 1.0]))
def test_agrees_with_the_plain_loop(seed, shape, config, probe_rate):
    shape = {**shape, "probe_rate": probe_rate}
    planner, world, _ = run(seed, shape, config)
    plain = World(seed, **shape)
    expected = algorithm_1(plain, **config)
    found = [(c.node, c.leaf, c.localized, c.probes) for c in planner.critical]
    assert found == expected
    assert world.asked == plain.asked
    assert world.tree.parent == plain.tree.parent


def failure(leaf: int, calls: int, *, contrast: float = 0.0, correct: bool = False) -> Trajectory:
    """Calls at nodes 100 * leaf + 1, 2, ...; every `H_tool` is `contrast`, `H_root` is 0."""
    nodes = tuple(range(100 * leaf + 1, 100 * leaf + calls + 2))
    entropies = (contrast,) * calls
    return Trajectory(leaf, nodes, nodes[:calls], correct, 0.0, entropies, contrast)


def small(n_total: int, *, b_max: int = 1, x_min: int = 1, x_max: int = 1) -> BelPlanner:
    return BelPlanner(n_total, b_max, x_min, x_max, beta=5.0)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 7, 8, 9, 20])
def test_every_planted_step_is_found_in_log2_rounds(calls):
    rounds = math.ceil(math.log2(calls))
    for planted in range(1, calls + 1):
        planner = small(1 + rounds)
        assert planner.requests() == [Request(0, 1)]
        planner.observe(failure(0, calls))
        leaf = 1
        while not planner.critical:
            (anchor,) = planner.requests()
            planner.observe(failure(leaf, 0, correct=anchor.node < planted))
            leaf += 1
        (critical,) = planner.critical
        assert (critical.node, critical.leaf, critical.localized) == (planted, 0, True)
        assert critical.probes == leaf - 1 <= rounds


def observe(planner: BelPlanner, trajectory: Trajectory) -> None:
    planner.requests()
    planner.observe(trajectory)


def test_no_tool_call_gives_no_critical_step():
    planner = small(2)
    observe(planner, failure(0, 0))
    observe(planner, failure(1, 0))
    assert planner.done
    assert planner.critical == ()


def test_one_tool_call_needs_no_probe():
    planner = small(1)
    observe(planner, failure(0, 1))
    assert planner.critical == [Critical(node=1, leaf=0, localized=True, probes=0)]


def test_budget_that_ends_during_a_search_is_said():
    planner = small(2)
    observe(planner, failure(0, 8))
    assert planner.requests() == [Request(4, 1)]
    observe(planner, failure(1, 0, correct=True))
    assert planner.done
    assert planner.critical == [Critical(node=5, leaf=0, localized=False, probes=1)]


def test_last_probe_is_cut_to_the_budget():
    planner = small(3, x_min=3, x_max=3)
    observe(planner, failure(0, 2))
    assert planner.requests() == [Request(1, 2)]
    observe(planner, failure(1, 0))
    observe(planner, failure(2, 0))
    assert planner.done
    assert planner.critical == [Critical(node=1, leaf=0, localized=True, probes=1)]


def test_successes_are_replaced_until_the_buffer_is_full():
    planner = small(8, b_max=3)
    assert planner.requests() == [Request(0, 3)]
    for leaf, correct in enumerate((True, False, True)):
        assert planner.requests() == []
        planner.observe(failure(leaf, 4, correct=correct))
    assert planner.requests() == [Request(0, 2)]


def test_failed_suffixes_never_enter_the_buffer():
    planner = small(4, b_max=1)
    observe(planner, failure(0, 2))
    observe(planner, failure(1, 9, contrast=9.0))  # a suffix
    assert planner.critical[0].leaf == 0
    assert planner.requests() == [Request(0, 1)]
    observe(planner, failure(2, 0, correct=True))
    observe(planner, failure(3, 0, correct=True))
    assert len(planner.critical) == 1


def test_only_successes_localize_nothing():
    planner = small(5, b_max=3)
    for leaf in range(5):
        observe(planner, failure(leaf, 3, correct=True))
    assert planner.done
    assert planner.critical == ()


def test_reference_choice():
    nan = math.nan
    assert select_reference([failure(0, 1, contrast=0.1), failure(1, 1, contrast=0.2)]).leaf == 1
    assert select_reference([failure(0, 1, contrast=-0.1), failure(1, 1, contrast=-0.2)]).leaf == 0
    assert select_reference([failure(2, 1), failure(1, 1)]).leaf == 1, "ties: the earliest"
    assert select_reference([failure(0, 1, contrast=nan), failure(1, 1, contrast=-9)]).leaf == 1
    assert select_reference([failure(3, 1, contrast=nan), failure(2, 1, contrast=nan)]).leaf == 2


def test_suffix_count_is_rounded_to_nearest_and_bounded():
    assert suffix_count(0.0, 1, 3, 5.0) == 2
    assert suffix_count(math.nan, 1, 3, 5.0) == 2
    assert suffix_count(0.0, 1, 2, 5.0) == 2  # 1.5 rounds up
    assert suffix_count(0.0, 2, 3, 5.0) == 3  # so does 2.5
    assert suffix_count(1e6, 1, 3, 5.0) == 3
    assert suffix_count(-1e6, 1, 3, 5.0) == 1
    assert suffix_count(math.log(3) / 5 + 1e-6, 1, 3, 5.0) == 3  # sigmoid just above 3/4
    assert suffix_count(math.log(3) / 5 - 1e-6, 1, 3, 5.0) == 2
    assert suffix_count(9.0, 1, 3, 0.0) == 2  # beta 0: entropy does not matter


def test_more_than_asked_for_is_refused():
    planner = small(1)
    observe(planner, failure(0, 1))
    with pytest.raises(RuntimeError, match="leaf 1 was not asked for"):
        planner.observe(failure(1, 1))


@pytest.mark.parametrize(
    "bad", [{"n_total": 0}, {"b_max": 0}, {"x_min": 0}, {"x_min": 4}, {"x_max": 0}]
)
def test_impossible_settings_are_refused(bad):
    good = {"n_total": 16, "b_max": 3, "x_min": 1, "x_max": 3, "beta": 5.0}
    with pytest.raises(ValueError, match="must be at least 1"):
        BelPlanner(**{**good, **bad})
