"""Collecting rollout trees: planner, engine, sandboxed tool and tree building together.

The tiny tier's model after half of its cold start writes, so that calls and failures are real.
Correctness first: budgets are exact and every tree becomes part of a forest.

    pytest bench/bench_collect.py --benchmark-only
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from elpo_fast.algo import make_planner
from elpo_fast.config import load_config
from elpo_fast.model.load import load_model
from elpo_fast.rollout.chat import Chat
from elpo_fast.rollout.collector import Collector
from elpo_fast.rollout.local import LocalEngine
from elpo_fast.tasks import make_source
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.train.sft import cold_start
from elpo_fast.train.step import PolicyOptimizer, warmup_cosine
from elpo_fast.tree.store import Forest

TASKS = 16
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


@pytest.mark.parametrize("planner", ["bel", "star"])
def test_collect(benchmark: BenchmarkFixture, planner: str) -> None:
    config = load_config(TINY, [f"algo.planner={planner}", "sft.demonstrations=512"])
    toolbox = Toolbox(config.tools)
    source = make_source(config.task, 0, toolbox.run_function)
    loaded = load_model(config.model, seed=0, tokenizer_texts=source.vocabulary_texts())
    chat = Chat(loaded.tokenizer, config.rollout.call_format, toolbox.schemas)
    engine = LocalEngine(loaded.model, loaded.tokenizer, max_batch=128, dtype=torch.bfloat16)
    tokens = config.tools.output_tokens
    collector = Collector(engine, toolbox, chat, source, config.rollout, output_tokens=tokens)
    policy = PolicyOptimizer(
        loaded.model,
        lr=config.sft.lr,
        dtype=torch.bfloat16,
        schedule=warmup_cosine(10, config.sft.steps),
    )
    tasks = [source.train(1000 + index) for index in range(TASKS)]
    seeds = iter(range(1_000_000))

    async def collect() -> Forest:
        # An empty cache, as in training.
        await engine.update_weights(loaded.model.named_parameters(), engine.weight_version + 1)
        trees = await collector.collect(tasks, lambda: make_planner(config.algo), seed=next(seeds))
        return Forest.from_trees(trees)

    with asyncio.Runner() as runner:
        runner.run(cold_start(config, collector, policy, lambda _: None, seed=0))
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
        runner.run(engine.close())
        runner.run(toolbox.close())
