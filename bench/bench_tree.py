"""Bookkeeping of a whole batch on one core: concatenate, score and pack 128 large trees.

Two shapes of 16 trajectories x 20 steps x 200 tokens: `star` shares nothing but the prompt and is
the most that can come; `bel` is what binary error localization grows, shared prefixes once. The
first test checks both against the slow twin of the tests and says how much faster they are.

    OMP_NUM_THREADS=1 pytest bench/bench_tree.py --benchmark-only
"""

from __future__ import annotations

import importlib.util
import os
import time
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from elpo_fast.algo import make_planner, score
from elpo_fast.algo.planners import trajectory_of
from elpo_fast.config import AlgoConfig
from elpo_fast.tree.pack import pack
from elpo_fast.tree.store import Forest, Tree

CONFIG = AlgoConfig()
TREES, STEPS, TOKENS = (4, 6, 40) if os.environ.get("ELPO_BENCH") == "small" else (128, 20, 200)


def load_twin() -> ModuleType:
    path = Path(__file__).parents[1] / "tests" / "tree" / "twin.py"
    spec = importlib.util.spec_from_file_location("tree_twin", path)
    assert spec is not None and spec.loader is not None
    twin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(twin)
    return twin


def bel_tree(rng: np.random.Generator) -> Tree:
    """Grown by the planner; a failure has a planted step from which on nothing succeeds."""
    ids = rng.integers(0, 50_000, TOKENS)
    agent = np.arange(TOKENS) < 0.6 * TOKENS
    tree, planner = Tree(ids), make_planner(CONFIG)
    hopeless: set[int] = set()
    while not planner.done:
        for request in planner.requests():
            for _ in range(request.count):
                node, lost = request.node, request.node in hopeless
                correct = not lost and bool(rng.random() < (0.8 if node else 0.3))
                planted = int(rng.integers(tree.depth[node] + 1, STEPS + 1))
                for depth in range(tree.depth[node] + 1, STEPS + 1):
                    values = rng.random(TOKENS, np.float32) * agent
                    calls = depth < STEPS
                    node = tree.add_step(node, ids, agent, -values, values, tool_call=calls)
                    lost = lost or (not correct and depth >= planted)
                    if lost:
                        hopeless.add(node)
                leaf = tree.finish(node, reward=float(correct), correct=correct, end="answer")
                planner.observe(trajectory_of(tree, leaf))
    for critical in planner.critical:
        tree.mark_critical(critical.node, critical.leaf, critical.localized)
    return tree


@cache
def trees_of(shape: str) -> list[Tree]:
    rng = np.random.default_rng(0)
    if shape == "bel":
        return [bel_tree(rng) for _ in range(TREES)]
    twin = load_twin()
    size = {"leaves": CONFIG.n_total, "steps": STEPS, "tokens": TOKENS}
    return [twin.star_tree(rng, **size) for _ in range(TREES)]


@cache
def forest_of(shape: str) -> Forest:
    return Forest.from_trees(trees_of(shape))


@pytest.fixture(params=["star", "bel"])
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


def test_twin(benchmark, shape):
    """Four trees: equal to the twin in every array; its time stands in `extra_info`."""
    twin = load_twin()
    forest = Forest.from_trees(trees_of(shape)[:4])
    trees = range(len(forest))

    begin = time.perf_counter()
    slow = twin.scores(forest)
    expected = twin.pack(forest, list(trees), slow)
    seconds = time.perf_counter() - begin

    batch = benchmark(lambda: pack(forest, trees, score(forest, CONFIG)))
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(batch, name), values, rtol=1e-6, atol=1e-9)
    benchmark.extra_info["twin_s"] = round(seconds, 3)
    benchmark.extra_info["times_faster"] = round(seconds / benchmark.stats.stats.median, 1)


def test_from_trees(benchmark, shape):
    forest = benchmark(lambda: Forest.from_trees(trees_of(shape)))
    benchmark.extra_info["tokens"] = len(forest.token_ids)


def test_score(benchmark, shape):
    benchmark(score, forest_of(shape), CONFIG)


def test_pack(benchmark, shape):
    forest = forest_of(shape)
    scored = score(forest, CONFIG)
    batch = benchmark(pack, forest, range(TREES), scored)
    benchmark.extra_info["tokens"] = len(batch)


def test_score_and_pack(benchmark, shape):
    forest = forest_of(shape)
    benchmark(lambda: pack(forest, range(TREES), score(forest, CONFIG)))
