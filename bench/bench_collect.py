"""Collecting rollout trees: planner, engine, sandboxed tool and tree building together.

The tiny tier's model after half of its cold start writes, so that calls and failures are real.
Correctness first: budgets are exact and every tree becomes part of a forest.

    pytest bench/bench_collect.py --benchmark-only
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from elpo_fast.algo import make_planner
from elpo_fast.config import load_config
from elpo_fast.train.parts import assembled
from elpo_fast.train.sft import cold_start
from elpo_fast.tree.store import Forest

TASKS = 16
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


@pytest.mark.parametrize("planner", ["bel", "star"])
def test_collect(benchmark: BenchmarkFixture, planner: str) -> None:
    config = load_config(TINY, [f"algo.planner={planner}", "sft.demonstrations=512"])
    seeds = iter(range(1_000_000))
    with asyncio.Runner() as runner:
        context = assembled(config)
        parts = runner.run(context.__aenter__())
        engine = parts.engine
        runner.run(cold_start(config, parts.collector, parts.policy, seed=0))
        tasks = [parts.source.train(1000 + index) for index in range(TASKS)]

        async def collect() -> Forest:
            # An empty cache, as in training.
            weights = parts.loaded.model.named_parameters()
            await engine.update_weights(weights, engine.weight_version + 1)
            trees = await parts.collector.collect(
                tasks, lambda: make_planner(config.algo), seed=next(seeds)
            )
            return Forest.from_trees(trees)

        before = engine.stats()
        forest = benchmark.pedantic(
            lambda: runner.run(collect()), rounds=5, warmup_rounds=1, iterations=1
        )
        assert len(forest.leaf_node) == TASKS * config.algo.n_total
        after = engine.stats()
        asked = after.prompt_tokens - before.prompt_tokens
        benchmark.extra_info |= {
            "agent_tokens_per_s": round(int(forest.agent.sum()) / benchmark.stats.stats.median),
            "prompt_tokens_from_cache": round(
                (after.cached_tokens - before.cached_tokens) / asked, 3
            ),
        }
        runner.run(context.__aexit__(None, None, None))
