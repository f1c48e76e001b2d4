"""Is the latency of tools hidden? The same collection with and without 200 ms more per tool call.

    python bench/tool_latency.py [CONFIG] [section.key=value ...] [--out FILE]

A policy after its cold start, `IN_FLIGHT` trajectories at a time, BEL's budget from the
configuration; both ways interleaved, medians and ratios of each pair. The sandbox works in both:
only the wait is added. Correctness first: every budget is exact in both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from elpo_fast.algo import make_planner
from elpo_fast.config import Config, load_config
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.train.parts import Parts, assembled
from elpo_fast.train.sft import cold_start
from elpo_fast.types import MalformedCall, ToolCall, ToolResult

LATENCY_S = 0.2
ROUNDS = 3
IN_FLIGHT = 64
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


class Delayed:
    """A toolbox whose every call takes longer, without doing more."""

    def __init__(self, toolbox: Toolbox, seconds: float) -> None:
        self._toolbox, self.seconds = toolbox, seconds
        self.open, self.release = toolbox.open, toolbox.release

    async def execute(self, state: Any, call: ToolCall | MalformedCall) -> ToolResult:
        result = await self._toolbox.execute(state, call)
        await asyncio.sleep(self.seconds)
        return replace(result, seconds=result.seconds + self.seconds)


async def collect(config: Config, parts: Parts, seconds: float, tasks: int) -> dict[str, float]:
    """One collection from an empty cache; its seconds and what it did."""
    parts.collector.tools = Delayed(parts.toolbox, seconds)
    weights = parts.loaded.model.named_parameters()
    await parts.engine.update_weights(weights, parts.engine.weight_version + 1)
    calls, began = parts.collector.stats.tool_calls, time.perf_counter()
    trees = await parts.collector.collect(
        [parts.source.train(10_000 + index) for index in range(tasks)],
        lambda: make_planner(config.algo),
        seed=0,
    )
    took = time.perf_counter() - began
    assert [len(tree.leaves) for tree in trees] == [config.algo.n_total] * tasks
    return {"seconds": took, "tool_calls": parts.collector.stats.tool_calls - calls}


async def main(config: Config, tasks: int) -> dict[str, Any]:
    async with assembled(config) as parts:
        await cold_start(config, parts.collector, parts.policy, seed=0)
        await collect(config, parts, 0.0, max(1, tasks // 4))
        rounds = [
            {
                name: await collect(config, parts, seconds, tasks)
                for name, seconds in (("instant", 0.0), ("delayed", LATENCY_S))
            }
            for _ in range(ROUNDS)
        ]
    ratios = [r["delayed"]["seconds"] / r["instant"]["seconds"] for r in rounds]
    return {
        "config": config.run.name,
        "latency_s": LATENCY_S,
        "tasks": tasks,
        "n_total": config.algo.n_total,
        "cores": len(os.sched_getaffinity(0)),
        "rounds": rounds,
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default=str(TINY))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--tasks", type=int, default=96)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    chosen = load_config(arguments.config, arguments.overrides)
    result = asyncio.run(main(chosen, arguments.tasks))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
