"""Hundreds of trees while tools time out, interpreters and engines are killed, calls are garbage.

    python bench/soak_rollouts.py [CONFIG] [section.key=value ...] [--trees 500] [--out FILE]

A policy after its cold start collects with BEL in rounds of 50 trees. Meanwhile calls are replaced
by endless loops and by unreadable ones, a random process of the sandbox is killed every two
seconds, and with `rollout.engine=sglang` one of the server's processes every minute. In the end
every tree must be complete with its exact budget, every trajectory must have an end and a verdict,
and neither processes nor descriptors nor memory may have grown. Exit code 1 and the reason where
they have.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from elpo_fast.algo import make_planner
from elpo_fast.config import Config, load_config
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.train.parts import Parts, assembled
from elpo_fast.train.sft import cold_start
from elpo_fast.train.update import release_memory
from elpo_fast.types import End, MalformedCall, ToolCall, ToolResult

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
ROUND = 50  # trees
ENDLESS, MALFORMED = 0.004, 0.02  # shares of the calls
KILL_TOOL_S, KILL_ENGINE_S = 2.0, 60.0
GROWTH_MB, GROWTH_FILES = 100, 8  # from half-way to the end; caches fill before


class Faulty:
    """A toolbox that is handed endless and unreadable calls among the policy's own."""

    def __init__(self, toolbox: Toolbox, rng: random.Random, faults: Counter[str]) -> None:
        self._toolbox, self._rng, self._faults = toolbox, rng, faults
        self.open, self.release = toolbox.open, toolbox.release

    async def execute(self, state: Any, call: ToolCall | MalformedCall) -> ToolResult:
        dice = self._rng.random()
        if dice < ENDLESS:
            self._faults["endless calls"] += 1
            call = ToolCall(self._toolbox.names[0], {"code": "while True: pass"})
        elif dice < ENDLESS + MALFORMED:
            self._faults["malformed calls"] += 1
            call = MalformedCall("the call is not valid JSON")
        return await self._toolbox.execute(state, call)


def split() -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Our descendants: those of the sandbox and those of a served engine."""
    tools, engine = [], []
    for process in psutil.Process().children(recursive=True):
        try:
            served = "sglang" in " ".join(process.cmdline()) or "sglang" in process.name()
        except psutil.Error:
            continue
        (engine if served else tools).append(process)
    return tools, engine


async def killer(rng: random.Random, faults: Counter[str]) -> None:
    """Kill a process of the sandbox every two seconds, the engine's server now and then."""
    engine_due = time.monotonic() + KILL_ENGINE_S
    while True:
        await asyncio.sleep(KILL_TOOL_S)
        tools, engine = split()
        victims = [("sandbox processes killed", tools)]
        if engine and time.monotonic() > engine_due:
            victims.append(("engine processes killed", engine))
            engine_due = time.monotonic() + KILL_ENGINE_S
        for name, processes in victims:
            if processes:
                try:
                    rng.choice(processes).kill()
                    faults[name] += 1
                except psutil.Error:
                    continue  # gone by itself


def sample() -> dict[str, float]:
    gc.collect()
    release_memory()  # as the training loop does
    own = psutil.Process()
    return {"rss_mb": own.memory_info().rss / 2**20, "files": own.num_fds()}


async def collect(config: Config, parts: Parts, first: int, count: int) -> Counter[str]:
    """One round; how its trajectories ended."""
    tasks = [parts.source.train(10_000 + index) for index in range(first, first + count)]
    trees = await parts.collector.collect(tasks, lambda: make_planner(config.algo), seed=first)
    ends: Counter[str] = Counter()
    for task, tree in zip(tasks, trees, strict=True):
        assert tree.task_id == task.id
        assert len(tree.leaves) == config.algo.n_total, "a budget is not exact"
        assert all(tree.reasons), "a trajectory has no verdict"
        ends.update(tree.ends)
    assert set(ends) <= {end.value for end in End}
    return ends


async def main(config: Config, trees: int) -> dict[str, Any]:
    rng, faults, ends = random.Random(0), Counter[str](), Counter[str]()
    samples, began = [], time.perf_counter()
    async with assembled(config) as parts:
        await cold_start(config, parts.collector, parts.policy, seed=0)
        weights = parts.loaded.model.named_parameters()
        await parts.engine.update_weights(weights, 1)
        parts.collector.tools = Faulty(parts.toolbox, rng, faults)
        before = parts.engine.stats()
        killing = asyncio.create_task(killer(rng, faults))
        for first in range(0, trees, ROUND):
            ends += await collect(config, parts, first, min(ROUND, trees - first))
            samples.append(sample())
            print(f"{first + ROUND} trees  {dict(faults)}  {samples[-1]}", flush=True)
        killing.cancel()
        stats, after = parts.collector.stats, parts.engine.stats()
    left = [process for group in split() for process in group]
    assert not left, f"processes are left: {left}"
    for what, allowed in (("rss_mb", GROWTH_MB), ("files", GROWTH_FILES)):
        grown = samples[-1][what] - samples[len(samples) // 2][what]
        assert grown <= allowed, f"{what} has grown by {grown:.0f}"
    assert sum(ends.values()) == trees * config.algo.n_total
    return {
        "trees": trees,
        "trajectories": sum(ends.values()),
        "seconds": time.perf_counter() - began,
        "engine": config.rollout.engine,
        "faults": dict(faults),
        "ends": dict(ends),
        "tool_calls": stats.tool_calls,
        "tool_errors": stats.tool_errors,
        "generated_tokens": after.generated_tokens - before.generated_tokens,
        "samples": samples,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default=str(TINY))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--trees", type=int, default=500)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    chosen = load_config(arguments.config, ["tools.timeout_s=1", *arguments.overrides])
    try:
        result = asyncio.run(main(chosen, arguments.trees))
    except AssertionError as failure:
        sys.exit(f"failed: {failure}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
