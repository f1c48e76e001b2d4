"""What is sampled in a finished tree to judge it: nothing of the tree itself changes."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_fast.algo.bel import BelPlanner
from elpo_fast.algo.further import (
    FlowPlanner,
    agreement_flow,
    branches,
    going_on,
    ranking_flow,
    recovery_flow,
)
from elpo_fast.algo.planners import Planner, trajectory_of
from elpo_fast.algo.random import RandomPlanner

from .world import World, play

seeds = st.integers(0, 2**32 - 1)


def bel(n_total: int = 20) -> BelPlanner:
    return BelPlanner(n_total, 2, 1, 3, 5.0)


def alone(seed: int, planner: Planner) -> World:
    world = World(seed, max_calls=7)
    play(planner, world, np.random.default_rng(seed))
    return world


@settings(max_examples=40, deadline=None)
@given(seeds, st.booleans())
def test_children_of_branching_prefixes_are_sampled_from(seed, random):
    def make() -> Planner:
        return RandomPlanner(20, 3, 1) if random else bel()

    inner = make()
    planner, world = FlowPlanner(inner, ranking_flow(inner, 4)), World(seed, max_calls=7)
    play(planner, world, np.random.default_rng(seed))
    first = alone(seed, make())
    assert world.asked[:20] == first.asked, "the tree is as it would be"
    assert list(planner.critical) == list(inner.critical)
    tree, wanted = first.tree, []
    for node in range(1, len(tree)):
        siblings = tree.parent.count(tree.parent[node])
        if siblings > 1 and node not in tree.leaves and tree.tool_call[node]:
            wanted += [node] * 4
    assert world.asked[20:] == wanted


def test_branches_are_read_off_the_trajectories() -> None:
    world = alone(5, RandomPlanner(20, 3, 1))
    tree = world.tree
    trajectories = [trajectory_of(tree, leaf) for leaf in range(20)]
    expected = {}
    for node in range(1, len(tree)):
        expected.setdefault(tree.parent[node], []).append(node)
    found = {tree.parent[children[0]]: list(children) for children in branches(trajectories)}
    assert found == {node: below for node, below in expected.items() if len(below) > 1}
    able = {n for n in range(1, len(tree)) if tree.tool_call[n] and n not in tree.leaves}
    assert going_on(trajectories) == able


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_steps_are_replaced_before_and_after_the_localized_one(seed):
    noted = []
    inner = bel()
    flow = recovery_flow(inner, 3, lambda kind, yes: noted.append((kind, yes)))
    world = World(seed, max_calls=7)
    play(FlowPlanner(inner, flow), world, np.random.default_rng(seed))
    tree, at = world.tree, 20
    for critical in inner.critical:
        if not critical.localized:
            continue
        steps = tree.path(tree.leaves[critical.leaf])[1:]
        first = steps.index(critical.node)
        for number, kind in enumerate(("", "first irrecoverable", "second", "third")):
            place = steps.index(critical.node) + number - 1
            if kind and place >= len(steps):
                continue
            said, yes = noted.pop(0)
            before = world.asked[at : at + 3]
            assert len(set(before)) == 1 and before[0] in (0, *steps[:-1])
            assert yes == any(tree.correct[tree.leaves[leaf]] == 1 for leaf in range(at, at + 3))
            at += 3
            if kind:
                assert (said, before[0]) == (kind, (0, *steps)[place])
            else:
                assert said == "a random step"
            if kind in ("second", "third"):
                assert not yes, "nothing recovers from beyond the planted step"
        assert first >= 0
    assert not noted and at == len(world.asked)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_noiseless_searches_agree(seed):
    noted = []
    inner = bel()
    flow = agreement_flow(inner, 3, lambda calls, found: noted.append((calls, found)))
    world = World(seed, max_calls=7)
    play(FlowPlanner(inner, flow), world, np.random.default_rng(seed))
    localized = [critical for critical in inner.critical if critical.localized]
    assert len(noted) == len(localized)
    for critical, (calls, found) in zip(localized, noted, strict=True):
        path = world.tree.path(world.tree.leaves[critical.leaf])
        called = [node for node in path if world.tree.tool_call[node]]
        assert calls == len(called)
        assert found == [called.index(world.planted[critical.leaf]) + 1] * 4
    most = sum(3 * 3 * math.ceil(math.log2(calls)) for calls, _ in noted)
    assert len(world.asked) <= 20 + most
