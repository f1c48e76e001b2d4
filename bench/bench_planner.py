"""Planners alone, without a model: 128 trees of 16 trajectories, driven by scripted policies.

Correctness first: every planner asks for its budget exactly, and is done when that was observed.

    OMP_NUM_THREADS=1 pytest bench/bench_planner.py --benchmark-only
"""

from __future__ import annotations

import os

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from elpo_fast.algo import make_planner
from elpo_fast.algo.simulator import Policy, searches
from elpo_fast.config import AlgoConfig

TREES = 4 if os.environ.get("ELPO_BENCH") == "small" else 128
SEARCHING = ("bel", "bel_bayes")


@pytest.mark.parametrize("name", SEARCHING)
def test_searches(benchmark: BenchmarkFixture, name: str) -> None:
    config = AlgoConfig(planner=name)
    seeds = iter(range(1 << 30))

    def grow() -> list[int]:
        """Of each tree, how many searches it held."""
        found = []
        for _ in range(TREES):
            planner, policy = make_planner(config), Policy(next(seeds))
            found.append(sum(1 for _ in searches(planner, policy, config.n_total)))
            assert planner.done and policy.trajectories == config.n_total
        return found

    found = benchmark.pedantic(grow, rounds=5, warmup_rounds=1)
    assert sum(found) >= TREES // 2
    benchmark.extra_info["searches"] = sum(found)
