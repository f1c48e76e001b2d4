"""Bookkeeping must stay negligible beside a training step: score and pack a whole large batch."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from elpo_fast.algo import score
from elpo_fast.config import AlgoConfig
from elpo_fast.tree.pack import pack
from elpo_fast.tree.store import Forest

from . import twin

SHAPE = {"leaves": 16, "steps": 20, "tokens": 200}


def forest_of(trees: int) -> Forest:
    rng = np.random.default_rng(0)
    return Forest.from_trees([twin.star_tree(rng, **SHAPE) for _ in range(trees)])


def score_and_pack(forest: Forest) -> None:
    pack(forest, range(len(forest)), score(forest, AlgoConfig()))


def best(work: Callable[[], object], rounds: int) -> float:
    """Shortest of several runs, in CPU seconds of this thread: other processes do not count."""
    seconds = []
    for _ in range(rounds):
        begin = time.thread_time()
        work()
        seconds.append(time.thread_time() - begin)
    return min(seconds)


def test_128_large_trees_in_150_ms():
    """128 trees x 16 leaves x 20 steps x 200 tokens, nothing shared: 8.2 million tokens."""
    forest = forest_of(128)
    score_and_pack(forest)
    assert best(lambda: score_and_pack(forest), 5) <= 0.150


def test_100_times_the_twin():
    forest = forest_of(4)

    def slow() -> None:
        twin.pack(forest, list(range(len(forest))), twin.scores(forest))

    score_and_pack(forest)
    fast = best(lambda: score_and_pack(forest), 5)
    assert best(slow, 1) >= 100 * fast
