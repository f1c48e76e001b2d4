"""Truncated importance sampling on trees against the sum over trajectories written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elpo_fast.algo import score
from elpo_fast.algo.weights import sequence_mean
from elpo_fast.config import AlgoConfig, Config, TrainConfig
from elpo_fast.train.metrics import StepStats
from elpo_fast.train.offpolicy import mismatch, truncated
from elpo_fast.train.update import update_policy
from elpo_fast.tree.pack import PackedBatch, micro_batches
from elpo_fast.tree.store import Forest, Tree

ALGORITHMS = {
    "elpo": AlgoConfig(),
    "grpo": AlgoConfig.model_validate({"planner": "star", "advantage": "group"}),
}
CAP = 1.5


@pytest.fixture
def forest() -> Forest:
    rng = np.random.default_rng(5)
    trees = []
    for number in range(4):
        tree = Tree(rng.integers(0, 50, 3), task_id=str(number))
        for ordinal in range(5):
            inner = [node for node in range(len(tree)) if tree.correct[node] < 0]
            node = int(rng.choice(inner)) if ordinal else 0
            for _ in range(3):
                size = int(rng.integers(1, 6))
                tokens, agent = rng.integers(0, 50, size), rng.random(size) < 0.7
                logprobs = -rng.exponential(1.0, size)
                node = tree.add_step(node, tokens, agent, logprobs, np.zeros(size), tool_call=True)
            correct = ordinal % 2 == 0
            tree.finish(node, reward=float(correct), correct=correct, end="answer", reason="")
        trees.append(tree)
    return Forest.from_trees(trees)


class Shifted:
    """A policy whose log-probs differ from the engine's by a number that each token id fixes."""

    def gap(self, token_ids: np.ndarray) -> np.ndarray:
        return (token_ids % 7 - 3).astype(np.float32) / 5

    def logprobs(self, batches: list[PackedBatch]) -> list[np.ndarray]:
        return [np.where(b.agent, b.old_logprob + self.gap(b.token_ids), 0.0) for b in batches]


class Stepped(Shifted):
    """Its updates are kept, not made."""

    def __init__(self) -> None:
        self.updates: list[list[PackedBatch]] = []

    def update(self, batches: list[PackedBatch]) -> StepStats:
        self.updates.append(batches)
        return StepStats(0.0, 0.0, 0.0, tokens=1, trained_tokens=1)


def corrected(forest: Forest, algo: AlgoConfig, level: str) -> list[tuple[PackedBatch, Any]]:
    """Every batch that a step trains on, of whole trees and of parts of them, beside the same one
    before the correction."""
    found: list[tuple[PackedBatch, Any]] = []
    for budget in (60, 9):
        train = TrainConfig(
            importance_sampling=level,  # type: ignore[arg-type]
            importance_cap=CAP,
            old_logprob="recompute",
            micro_batch_tokens=budget,
            updates_per_step=2,
            skip_uniform=False,
        )
        config = Config(algo=algo, train=train)
        policy, drawn = Stepped(), np.random.default_rng(0).permutation(len(forest))
        update_policy(policy, forest, config, np.random.default_rng(0))  # type: ignore[arg-type]
        for made, share in zip(policy.updates, np.array_split(drawn, 2), strict=True):
            before = micro_batches(forest, score(forest, algo), share, budget, scale=1 / len(share))
            found += zip(made, before, strict=True)
    return found


@pytest.mark.parametrize("algo", ALGORITHMS.values(), ids=ALGORITHMS)
def test_token_weights_multiply_each_tokens_coefficients(forest: Forest, algo: AlgoConfig) -> None:
    held = {"capped": 0, "below": 0}
    for batch, before in corrected(forest, algo, "token"):
        weight = np.minimum(np.exp(Shifted().gap(batch.token_ids)), CAP)
        held["capped"] += int((weight == CAP).sum())
        held["below"] += int((weight < 1).sum())
        assert np.allclose(batch.pos_coef, before.pos_coef * weight, rtol=1e-6)
        assert np.allclose(batch.neg_coef, before.neg_coef * weight, rtol=1e-6)
        assert np.array_equal(batch.old_logprob, Shifted().logprobs([before])[0])
    assert min(held.values()) > 0


@pytest.mark.parametrize("algo", ALGORITHMS.values(), ids=ALGORITHMS)
def test_sequence_weights_belong_to_trajectories(forest: Forest, algo: AlgoConfig) -> None:
    """`pos = sum_i w_i W_i max(A_i, 0)` over the trajectories through a node, by brute force."""
    scored, weight = score(forest, algo), sequence_mean(forest)
    advantage = np.zeros(len(forest.leaf_node))
    product = np.zeros(len(forest.leaf_node))
    paths = []
    for leaf, node in enumerate(forest.leaf_node):
        path = [node]
        while forest.parent[path[-1]] >= 0:
            path.append(forest.parent[path[-1]])
        paths.append(path)
        for at in path:
            tokens = slice(forest.token_start[at], forest.token_start[at + 1])
            gap = Shifted().gap(forest.token_ids[tokens])
            product[leaf] += gap[forest.agent[tokens] == 1].sum()
        advantage[leaf] = scored.trajectory[node]
    factor = np.minimum(np.exp(product), CAP)
    assert (factor == CAP).any() and (factor < 1).any()
    pos, neg = np.zeros(len(forest.parent)), np.zeros(len(forest.parent))
    for leaf, path in enumerate(paths):
        for at in path:
            own = advantage[leaf] if algo.advantage == "group" else scored.advantage[at]
            pos[at] += weight[leaf] * factor[leaf] * max(own, 0.0)
            neg[at] += weight[leaf] * factor[leaf] * min(own, 0.0)
    for batch, _ in corrected(forest, algo, "sequence"):
        mine = batch.agent / 2  # an update has two trees
        assert np.allclose(batch.pos_coef, pos[batch.node] * mine, rtol=1e-5, atol=1e-8)
        assert np.allclose(batch.neg_coef, neg[batch.node] * mine, rtol=1e-5, atol=1e-8)


def test_without_correction_only_the_old_log_probs_are_new(forest: Forest) -> None:
    for batch, before in corrected(forest, AlgoConfig(), "none"):
        expected = replace(before, old_logprob=Shifted().logprobs([before])[0])
        for name in PackedBatch.__dataclass_fields__:
            assert np.array_equal(getattr(batch, name), getattr(expected, name)), name


def test_mismatch_of_a_hand_example() -> None:
    figures = mismatch(np.log(np.array([1.0, 2.0, 0.5])))
    assert figures["mismatch_mean"] == pytest.approx(2 * np.log(2) / 3)
    assert figures["mismatch_max"] == pytest.approx(np.log(2))
    assert figures["mismatch_ess"] == pytest.approx(3.5**2 / (3 * 5.25))
    assert mismatch(np.array([500.0, 500.0]))["mismatch_ess"] == pytest.approx(1.0)
    assert mismatch(np.zeros(0)) == {}


def test_truncation_does_not_overflow() -> None:
    with np.errstate(all="raise"):
        assert truncated(np.array([1e4, 0.0, -1e2]), 2.0) == pytest.approx([2.0, 1.0, np.exp(-1e2)])
