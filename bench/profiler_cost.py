"""What regions cost: the same step without them, with them, and with every span recorded.

    python -m bench.profiler_cost configs/tiny.yaml [--rounds 20] [section.key=value ...]

In turns, in one process, as CPU seconds of all its threads, torch and Numba on one thread each,
so that neither neighbours nor threads that wait count. Printed are the median ratios to the step
without, their quarters, and what follows from the number of spans and the time that one takes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from elpo_fast.algo import make_planner, score
from elpo_fast.config import load_config
from elpo_fast.regions import CLOCK, Clock, Span
from elpo_fast.train.parts import Parts, assembled
from elpo_fast.train.step import micro_batches
from elpo_fast.tree.store import Forest

MODES = ("without", "with", "recorded")
_ENTER, _EXIT = Span.__enter__, Span.__exit__
SPANS = 20_000


def set_mode(mode: str) -> None:
    switch: Any = Span  # typed as what it is elsewhere
    switch.__enter__ = _ENTER if mode != "without" else lambda span: span
    switch.__exit__ = _EXIT if mode != "without" else lambda span, *_: None
    CLOCK.events = [] if mode == "recorded" else None


def span_seconds() -> float:
    """CPU seconds of one span, the least of a few thousand's means."""
    clock, least = Clock(), float("inf")
    for _ in range(SPANS // 200):
        began = time.process_time()
        for _ in range(200):
            with clock.span("decode", tokens=1, pairs=1):
                pass
        least = min(least, (time.process_time() - began) / 200)
    return least


async def step(parts: Parts, config: Any) -> None:
    tasks = [parts.source.train(index) for index in range(config.train.tasks_per_step)]
    trees = await parts.collector.collect(tasks, lambda: make_planner(config.algo), seed=0)
    forest = Forest.from_trees(trees)
    scored = score(forest, config.algo)
    # All is trained on, whatever the untrained model achieves.
    scored = replace(scored, pos=np.full_like(scored.pos, 1e-3))
    batches = micro_batches(
        forest, scored, range(len(trees)), config.train.micro_batch_tokens, scale=1 / len(trees)
    )
    parts.policy.update(batches)
    engine = parts.engine
    await engine.update_weights(parts.loaded.model.named_parameters(), engine.weight_version + 1)


async def measure(config: Any, rounds: int) -> tuple[dict[str, list[float]], int]:
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    async with assembled(config) as parts:
        await step(parts, config)
        CLOCK.take()
        for number in range(rounds):
            for mode in (*MODES[number % 3 :], *MODES[: number % 3]):
                set_mode(mode)
                began = time.process_time()
                await step(parts, config)
                seconds[mode].append(time.process_time() - began)
                if mode == "recorded":
                    spans = len(CLOCK.events or [])
    set_mode("with")
    return seconds, spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    config = load_config(options.config, ["train.lr=1e-9", *options.overrides])
    seconds, spans = asyncio.run(measure(config, options.rounds))
    without = statistics.median(seconds["without"])
    for mode in MODES[1:]:
        ratios = [a / b for a, b in zip(seconds[mode], seconds["without"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"{mode}: {median:.4f} of the step without ({low:.4f} - {high:.4f})")
    one = span_seconds()
    print(
        f"{spans} spans of {1e6 * one:.1f} us each in a step of {without:.2f} CPU seconds: "
        f"{spans * one / without:.2%}"
    )


if __name__ == "__main__":
    main()
