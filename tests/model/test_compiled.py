"""Compiled blocks: what they compute, and that they are compiled once.

What is compiled when is settled before code is generated, which takes longest; so all but one of
the cases go without.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from elpo_fast.config import ConfigError, LoraConfig, parse_config
from elpo_fast.model import compiled, load
from elpo_fast.model.attention import ATTENTION
from elpo_fast.model.load import load_model
from elpo_fast.model.lora import adapters, add_adapters, initialise
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.tree.pack import PackedBatch, Scored, pack
from elpo_fast.tree.store import Forest, Tree

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def gemma3() -> PreTrainedModel:
    """Blocks of two kinds."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=9, layer_types=kinds))


def adapted() -> PreTrainedModel:
    model = qwen3()
    add_adapters(model, LoraConfig(rank=2))
    initialise(model, seed=0)
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.normal_(std=0.1)
    return model


CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "qwen3": (qwen3, {}, 2),  # with gradients and without
    "bf16": (qwen3, {"dtype": torch.bfloat16}, 2),
    "gemma3": (gemma3, {}, 4),
    # The first block's input has a gradient that others' have not, or the other way round.
    "checkpointed": (qwen3, {"gradient_checkpointing": True}, 3),
    "adapters, checkpointed": (adapted, {"gradient_checkpointing": True}, 3),
    "selective": (qwen3, {"gradient_checkpointing": "selective"}, 2),
    "adapters, selective": (adapted, {"gradient_checkpointing": "selective"}, 3),
}
"""Model, options of the optimizer, and how often its blocks are compiled."""


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    compiled._forward.cache_clear()
    counters.clear()
    yield
    compiled._forward.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def policies(make: Any, **options: Any) -> tuple[PolicyOptimizer, PolicyOptimizer]:
    """The same model, without compilation and with it."""
    torch.manual_seed(0)
    model = make()
    model.set_attn_implementation(ATTENTION)
    plain = PolicyOptimizer(copy.deepcopy(model), lr=0.01, **options)
    return plain, PolicyOptimizer(model, lr=0.01, compiled=True, **options)


def micro_batch(seed: int) -> PackedBatch:
    """Some trees: other numbers of trees, branches and tokens for every seed."""
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(1 + seed % 3):
        tree = Tree(rng.integers(0, VOCABULARY, 4 + seed))
        for _ in range(int(rng.integers(1, 5))):
            size = int(rng.integers(2, 30))
            ids, logprobs = rng.integers(0, VOCABULARY, size), rng.normal(-4.1, 0.1, size)
            node = int(rng.integers(0, len(tree))) if seed % 2 else 0
            node = 0 if tree.correct[node] >= 0 else node
            leaf = tree.add_step(node, ids, np.ones(size), logprobs, np.zeros(size), tool_call=True)
            tree.finish(leaf, reward=0.0, correct=False, end="answer")
        trees.append(tree)
    forest = Forest.from_trees(trees)
    value = rng.normal(size=len(forest.parent))
    parts = (value, value, value, value, np.maximum(value, 0), np.minimum(value, 0))
    scored = Scored(*parts, eps_low=0.2 + 0 * value, eps_high=0.3)
    return pack(forest, range(len(forest)), scored)


def compare(plain: PolicyOptimizer, ours: PolicyOptimizer, batch: PackedBatch) -> None:
    """Log-probs, loss and gradient of both, and an update by it."""
    near = 1e-5 if ours.compute is ours.model else 0.02
    np.testing.assert_allclose(*(p.logprobs([batch])[0] for p in (ours, plain)), atol=near * 5)
    loss, expected = (policy.policy_backward(batch).loss for policy in (ours, plain))
    assert loss == pytest.approx(expected, rel=near, abs=near)
    for mine, its in zip(ours._masters, plain._masters, strict=True):
        assert (mine.grad - its.grad).norm() <= near * its.grad.norm() + 1e-7
    for policy in (ours, plain):
        policy.model.zero_grad()
    ours.update([batch])
    for mine, its in zip(ours._masters, plain._masters, strict=True):
        its.data.copy_(mine.data)
    plain.refresh()


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_compiled_once_for_all_forests(case: str, no_code: None) -> None:
    make, options, graphs = CASES[case]
    plain, ours = policies(make, **options)
    compare(plain, ours, micro_batch(1))
    assert counters["stats"]["unique_graphs"] == graphs
    sizes = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(2, 9):
            batch = micro_batch(seed)
            sizes.add(len(batch))
            compare(plain, ours, batch)
        ours._idle()
        ours.score(np.arange(7))
    assert len(sizes) == 7
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def test_generated_code_computes_the_same() -> None:
    plain, ours = policies(qwen3)
    for seed in range(1, 5):
        compare(plain, ours, micro_batch(seed))
    assert counters["stats"]["unique_graphs"] == 2


def test_what_would_be_compiled_again_is_seen(no_code: None) -> None:
    _, ours = policies(qwen3)
    ours.logprobs([micro_batch(1)])
    ours.compute.model.layers[1].self_attn.scaling = 0.5
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="Detected recompile"),
    ):
        ours.logprobs([micro_batch(2)])


def test_without_trees_and_in_copies_the_model_is_what_it_was() -> None:
    _, ours = policies(qwen3)
    other = copy.deepcopy(ours.model)
    assert list(other.state_dict()) == list(qwen3().state_dict())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = ours.model(ids).logits
        for parameter in ours.model.parameters():
            parameter.zero_()
        assert torch.equal(other(ids).logits, expected)
    assert not counters["stats"]


def test_what_cannot_be_compiled_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    _, ours = policies(qwen3)
    with pytest.raises(ConfigError, match=r"Qwen3DecoderLayer cannot be .*no compiler.*=false"):
        ours.logprobs([micro_batch(1)])


def test_attention_that_cannot_be_compiled_is_refused() -> None:
    config = parse_config({"model": {"attention": "sdpa", "compile": True, "device": "cpu"}})
    with pytest.raises(ConfigError, match="one of auto, path, triton"):
        load_model(config.model, seed=0)


@pytest.mark.parametrize(
    ("device", "attention", "compilers", "expected"),
    [
        ("cuda", "auto", {"gcc"}, True),
        ("cuda", "auto", {"clang"}, True),
        ("cuda", "auto", set(), False),
        ("cuda", "flex", {"gcc"}, False),
        ("cpu", "auto", {"gcc"}, False),
    ],
)
def test_auto_compiles_on_gpus_with_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    attention: str,
    compilers: set[str],
    expected: bool,
) -> None:
    monkeypatch.setattr(load, "resolve_device", lambda _: torch.device(device))
    monkeypatch.setattr(compiled, "has_triton", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.delenv("CC", raising=False)
    config = parse_config({"model": {"attention": attention}}).model
    assert load.resolve_compile(config) is expected
    for said in (True, False):
        assert load.resolve_compile(config.model_copy(update={"compile": said})) is said
    monkeypatch.setenv("CC", "gcc")
    assert load.resolve_compile(config) is (expected and "gcc" in compilers)
