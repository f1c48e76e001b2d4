"""One update of a 135M-parameter model: packed trees against the same trajectories as rows.

Forests: `recorded`, trees that localization grew in a fifth step of `configs/quickstart.yaml`, and
`star`, independent trajectories after a long prompt. Layouts: `trees` computes each distinct prefix
once, `nodes` each token of a node, `rows` lays the trajectories end to end without sharing,
`padded` has one padded row per trajectory and transformers' own attention. All run the same
optimizer and have the same loss and gradient, which the first test shows; the second one
interleaves them, in the dtype that `model.dtype: auto` takes. `share` is the speed-up over the
ratio of computed tokens; the goal is 0.85. SmolLM2's shape with random weights.

    pytest bench/bench_step.py --benchmark-only -s
"""

from __future__ import annotations

import statistics
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from elpo_kernels import linear_policy_loss, widens_bfloat16
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LlamaConfig, LlamaForCausalLM

from bench.forests import Shape, as_rows, as_trees, grow, regrown, unshared
from elpo_fast.model.attention import ATTENTION
from elpo_fast.train.metrics import Part
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.tree import io
from elpo_fast.tree.pack import PackedBatch
from elpo_fast.tree.store import Tree

VOCABULARY = 49152
MICRO_BATCH = 2048
TREES, ROUNDS = 2, 3
STAR = Shape(trajectories=8, from_root=8, steps=3, step_tokens=(24, 36), prompt=600)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("trees", "nodes", "rows", "padded")


@cache
def forest(name: str) -> list[Tree]:
    if name == "star":
        rng = np.random.default_rng(0)
        return [grow(rng, STAR, VOCABULARY) for _ in range(TREES)]
    recorded = io.load(Path(__file__).parent / "data" / "quickstart_step5.npz")
    return [regrown(recorded, index) for index in range(TREES)]


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


def padded_backward(policy: PolicyOptimizer, batch: PackedBatch) -> Part:
    """`policy_backward` of a batch of chains, one padded row each."""
    sizes = np.diff(batch.tree_start)
    ids = np.zeros((len(sizes), sizes.max()), np.int64)
    seen = np.arange(sizes.max()) < sizes[:, None]
    ids[seen] = batch.token_ids
    chosen = np.flatnonzero((batch.pos_coef != 0) | (batch.neg_coef != 0))
    model = policy.compute
    embeddings = policy.model.get_input_embeddings()(torch.from_numpy(ids))
    hidden = model.base_model(
        inputs_embeds=embeddings.to(model.dtype),
        attention_mask=torch.from_numpy(seen),
        use_cache=False,
    ).last_hidden_state
    before = torch.from_numpy(np.flatnonzero(seen)[batch.pred[chosen]])
    out = linear_policy_loss(
        hidden.flatten(0, 1)[before],
        model.get_output_embeddings().weight,
        torch.from_numpy(batch.token_ids[chosen].astype(np.int64)),
        *(
            torch.from_numpy(getattr(batch, name)[chosen])
            for name in ("old_logprob", "pos_coef", "neg_coef", "eps_low", "eps_high")
        ),
    )
    out.loss.backward()
    return Part(int(ids.size), len(chosen), out.loss.detach()[None])


def batches(layout: str, trees: list[Tree]) -> list[PackedBatch]:
    if layout == "nodes":
        return [unshared(batch) for tree in trees for batch in as_trees([tree], MICRO_BATCH)]
    return (as_trees if layout == "trees" else as_rows)(trees, MICRO_BATCH)


def step(policy: PolicyOptimizer, layout: str, parts: list[PackedBatch]) -> None:
    if layout == "padded":
        policy._update(parts, lambda batch: padded_backward(policy, batch))
    else:
        policy.update(parts)


def test_all_layouts_have_the_same_loss_and_gradient(benchmark: BenchmarkFixture) -> None:
    policy = optimizer("fp32")
    found = {}

    def every() -> None:
        for layout in LAYOUTS:
            add = policy.policy_backward
            if layout == "padded":
                add = lambda batch: padded_backward(policy, batch)  # noqa: E731
            parts = [add(batch) for batch in batches(layout, forest("recorded")[:1])]
            gradients = [parameter.grad for parameter in policy.model.parameters()]
            found[layout] = sum(part.loss for part in parts if part), gradients
            policy.model.zero_grad(set_to_none=True)

    benchmark.pedantic(every, rounds=1)
    loss, gradients = found["trees"]
    for layout in LAYOUTS[1:]:
        assert loss == pytest.approx(found[layout][0], rel=1e-4, abs=1e-7)
        for ours, theirs in zip(gradients, found[layout][1], strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.timeout(1800)  # updates of a whole model take minutes on a slow machine
@pytest.mark.parametrize("name", ["recorded", "star"])
def test_speed_up(benchmark: BenchmarkFixture, name: str) -> None:
    dtype = "fp32" if widens_bfloat16() else "bf16"
    policy = optimizer(dtype)
    parts = {layout: batches(layout, forest(name)) for layout in LAYOUTS}
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}

    def interleaved() -> None:
        for number in range(ROUNDS + 1):  # one to warm up
            for layout in LAYOUTS:
                began = time.perf_counter()
                step(policy, layout, parts[layout])
                if number:
                    seconds[layout].append(time.perf_counter() - began)

    benchmark.pedantic(interleaved, rounds=1)
    median = {layout: statistics.median(times) for layout, times in seconds.items()}
    tokens = {layout: sum(len(batch.trie) for batch in parts[layout]) for layout in LAYOUTS}
    info = {
        "dtype": dtype,
        "tokens": tokens,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    for layout in LAYOUTS[1:]:
        speed_up = median[layout] / median["trees"]
        info[f"speed_up_over_{layout}"] = speed_up
        info[f"share_over_{layout}"] = speed_up / (tokens[layout] / tokens["trees"])
    benchmark.extra_info |= info
    print(f"\n{name}:", {k: v for k, v in info.items() if k != "seconds"})
