"""One update of a 135M-parameter model on rollout trees, against the same trajectories as rows.

8 trees of 8 trajectories, prompt 120 tokens, 5 steps of about 30 tokens, three trajectories from
the root and five from random steps, as localization grows them. `trees` computes each unique token
once; `rows` runs the very same optimizer on one chain per trajectory. The first test shows that
both compute the same loss and gradient. SmolLM2's shape with random weights: nothing is downloaded.

    pytest bench/bench_step.py --benchmark-only
"""

from __future__ import annotations

import resource
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LlamaConfig, LlamaForCausalLM

from elpo_fast.algo import score
from elpo_fast.config import AlgoConfig
from elpo_fast.model.attention import ATTENTION
from elpo_fast.train.step import PolicyOptimizer, micro_batches
from elpo_fast.tree.pack import PackedBatch
from elpo_fast.tree.store import Forest, Tree

TREES, TRAJECTORIES, FROM_ROOT, STEPS, PROMPT = 8, 8, 3, 5, 120
VOCABULARY = 49152
MICRO_BATCH = 2048
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def grow(rng: np.random.Generator) -> Tree:
    tree = Tree(rng.integers(0, VOCABULARY, PROMPT))
    for ordinal in range(TRAJECTORIES):
        inner = [node for node in range(1, len(tree)) if tree.correct[node] < 0]
        node = 0 if ordinal < FROM_ROOT else int(rng.choice(inner))
        while tree.depth[node] < STEPS:
            size = int(rng.integers(24, 37))
            agent = np.arange(size) < size - 8  # the tool's answer follows
            logprob = rng.normal(-np.log(VOCABULARY), 0.3, size) * agent
            ids = rng.integers(0, VOCABULARY, size)
            node = tree.add_step(node, ids, agent, logprob, np.zeros(size), tool_call=True)
        correct = bool(ordinal % 2)
        tree.finish(node, reward=float(correct), correct=correct, end="answer")
    return tree


def grown(count: int) -> list[Tree]:
    rng = np.random.default_rng(0)
    return [grow(rng) for _ in range(count)]


def as_trees(count: int) -> list[PackedBatch]:
    forest = Forest.from_trees(grown(count))
    scored = score(forest, AlgoConfig())
    return micro_batches(forest, scored, range(count), MICRO_BATCH, scale=1 / count)


def as_rows(count: int) -> list[PackedBatch]:
    """One chain per trajectory, each node with its own trajectory's share of the coefficient."""
    trees = grown(count)
    advantage = score(Forest.from_trees(trees), AlgoConfig()).advantage
    chains, kept, weight = [], [], []
    first = 0
    for tree in trees:
        for leaf in tree.leaves:
            path = tree.path(leaf)
            chain, node = Tree(tree.token_ids[0]), 0
            for at in path[1:]:
                arrays = (tree.token_ids[at], tree.agent[at], tree.logprob[at], tree.entropy[at])
                node = chain.add_step(node, *arrays, tool_call=True)
            chain.finish(node, reward=0.0, correct=False, end="answer")
            chains.append(chain)
            kept += [first + at for at in path]
            agent = sum(int(tree.agent[at].sum()) for at in path)
            weight += [1 / (TRAJECTORIES * agent)] * len(path)
        first += len(tree)
    forest = Forest.from_trees(chains)
    value = advantage[kept] * np.array(weight)
    scored = score(forest, AlgoConfig())
    scored = replace(scored, pos=np.maximum(value, 0), neg=np.minimum(value, 0))
    return micro_batches(forest, scored, range(len(forest)), MICRO_BATCH, scale=1 / count)


LAYOUTS = {"trees": as_trees, "rows": as_rows}


@cache
def optimizer(dtype: str) -> PolicyOptimizer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    config._attn_implementation = ATTENTION
    return PolicyOptimizer(LlamaForCausalLM(config), lr=1e-6, dtype=DTYPES[dtype])


def test_trees_and_rows_have_the_same_loss_and_gradient(benchmark: BenchmarkFixture) -> None:
    policy = optimizer("fp32")
    found = {}

    def both() -> None:
        for layout, batches in LAYOUTS.items():
            parts = [policy.policy_backward(batch) for batch in batches(2)]
            gradients = [parameter.grad for parameter in policy.model.parameters()]
            found[layout] = sum(part.loss for part in parts if part), gradients
            policy.model.zero_grad(set_to_none=True)

    benchmark.pedantic(both, rounds=1)
    assert found["trees"][0] == pytest.approx(found["rows"][0], rel=1e-5)
    for ours, theirs in zip(found["trees"][1], found["rows"][1], strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("dtype, layout", [("bf16", "trees"), ("bf16", "rows"), ("fp32", "trees")])
def test_update(benchmark: BenchmarkFixture, dtype: str, layout: str) -> None:
    policy, batches = optimizer(dtype), LAYOUTS[layout](TREES)
    benchmark.pedantic(policy.update, args=(batches,), rounds=3, warmup_rounds=1)
    computed = sum(len(batch) for batch in batches)
    unique = sum(len(batch) for batch in as_trees(TREES))
    benchmark.extra_info |= {
        "computed_tokens": computed,
        "computed_tokens_per_s": round(computed / benchmark.stats.stats.median),
        "unique_tokens_per_s": round(unique / benchmark.stats.stats.median),
        "peak_gb_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "threads": torch.get_num_threads(),
    }


def test_optimizer_alone(benchmark: BenchmarkFixture) -> None:
    """What an update costs besides forward and backward: clipping, AdamW, the compute copy."""
    policy = optimizer("bf16")
    for parameter in policy.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        policy._optimizer.step()
        policy.refresh()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    policy.model.zero_grad(set_to_none=True)
