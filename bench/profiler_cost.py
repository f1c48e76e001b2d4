"""What regions cost where they are densest: in the engine, three spans a step.

    python -m bench.profiler_cost configs/tiny.yaml [--rounds 20] [section.key=value ...]

A model decodes prompts of its tasks. Of every two steps of the engine one has regions, or all its
spans recorded, and the other has none, which of them by chance. Each is timed in CPU seconds of the
engine's thread, with torch and Numba on one thread: neighbours change both. Printed are the median
of the pairs' ratios, with the bounds of its 95 % interval, and what follows from a span's own time.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import numpy as np
import torch

from elpo_fast.config import Config, load_config
from elpo_fast.regions import CLOCK, Clock
from elpo_fast.rollout import batching
from elpo_fast.train.parts import assembled
from elpo_fast.types import Sampling

ROWS, TOKENS = 8, 64  # of a prompt
REGION, STEP = batching.region, batching.Batcher.step


class Nothing:
    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def shares(self, *_: object, **__: object) -> None:
        pass


def switch(mode: str) -> None:
    engine: Any = batching
    engine.region = REGION if mode != "without" else lambda *_, **__: NOTHING
    CLOCK.events = [] if mode == "recorded" else None


NOTHING = Nothing()


def span_seconds() -> float:
    """CPU seconds of one span, the least of many means."""
    clock, least = Clock(), float("inf")
    for _ in range(100):
        began = time.thread_time()
        for _ in range(200):
            with clock.span("decode", tokens=1, pairs=1, rows=1, passes=1):
                pass
        least = min(least, (time.thread_time() - began) / 200)
    return least


async def decode(config: Config, rounds: int, mode: str) -> list[tuple[float, float]]:
    """CPU seconds of pairs of steps: in `mode`, and without regions."""
    rng = np.random.default_rng(0)
    timed: list[tuple[str, float]] = []
    order: list[str] = []

    def step(batcher: batching.Batcher) -> None:
        if not order:
            order.extend(rng.permutation([mode, "without"]).tolist())
        switch(chosen := order.pop())
        began = time.thread_time()
        STEP(batcher)
        timed.append((chosen, time.thread_time() - began))

    batcher: Any = batching.Batcher
    async with assembled(config) as parts:
        chat = parts.collector.chat
        prompts = [chat.prompt(parts.source.train(index).messages) for index in range(4)]
        batcher.step = step
        for number in range(rounds):
            sampling = Sampling(max_tokens=TOKENS, seed=number)
            await asyncio.gather(*(parts.engine.generate(p, ROWS, sampling) for p in prompts))
    batcher.step = STEP
    switch("with")
    both = [dict(pair) for pair in zip(timed[::2], timed[1::2], strict=False)]
    return [(pair[mode], pair["without"]) for pair in both]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    config = load_config(options.config, options.overrides)
    for mode in ("with", "recorded"):
        pairs = asyncio.run(decode(config, options.rounds, mode))
        ratios = sorted(one / other for one, other in pairs)
        half = 0.98 * len(ratios) ** 0.5  # of the median's interval, in ranks
        low, high = (ratios[round(len(ratios) / 2 + sign * half)] for sign in (-1, 1))
        print(
            f"{mode}: {statistics.median(ratios):.4f} ({low:.4f} - {high:.4f}) of a step without, "
            f"{len(ratios)} pairs"
        )
    one, step = span_seconds(), statistics.median(other for _, other in pairs)
    print(f"3 spans of {1e6 * one:.1f} us in a step of {1e3 * step:.2f} ms: {3 * one / step:.2%}")


if __name__ == "__main__":
    main()
