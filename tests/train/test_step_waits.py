"""What an update asks of a device, counted on PyTorch's "meta" device, which computes nothing.

Operators of `elpo_kernels` count as one launch each: their own tests look into them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from elpo_kernels import backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from elpo_fast.model.attention import ATTENTION
from elpo_fast.train import adamw
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.tree.pack import PackedBatch, Scored, pack
from elpo_fast.tree.store import Forest, Tree

VOCABULARY = 61


class Counted(TorchDispatchMode):
    """Counts what is launched there, copied there, and read from there; the latter gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.copies = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = [x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        to_host = kwargs.get("device") == torch.device("cpu")
        if any(there) and (to_host or torch.Tag.data_dependent_output in func.tags):
            self.waits += 1
            return torch.zeros(args[0].shape) if to_host else 0
        result = func(*args, **kwargs)
        if any(x.is_meta for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            moved = bool(there) and not any(there)
            self.copies += moved
            self.launches += not (moved or func.is_view)
        return result


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> PolicyOptimizer:
    monkeypatch.setattr(backend, "_interpreted", lambda: True)  # Triton counts as able to run
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # knows no such device
    monkeypatch.setattr(  # AdamW has no fused update there
        adamw, "make_adamw", lambda kind, groups, *, lr, **_: torch.optim.SGD(groups, lr=lr)
    )
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    config._attn_implementation = ATTENTION
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    return PolicyOptimizer(model, lr=1.0, dtype=torch.bfloat16)


def micro_batch(seed: int) -> PackedBatch:
    rng = np.random.default_rng(seed)
    tree = Tree(rng.integers(0, VOCABULARY, 5))
    for size in (3, 4 + seed, 9):
        ids = rng.integers(0, VOCABULARY, size)
        leaf = tree.add_step(0, ids, np.ones(size), np.zeros(size), np.zeros(size), tool_call=False)
        tree.finish(leaf, reward=0.0, correct=False, end="answer")
    forest = Forest.from_trees([tree])
    ones = np.ones(len(forest.parent))
    return pack(forest, [0], Scored(*[ones] * 5, neg=0 * ones, eps_low=0.2 * ones, eps_high=0.3))


@pytest.mark.parametrize("name", ["update", "nll_update", "logprobs"])
def test_micro_batches_go_there_in_one_copy_and_come_back_in_one_read(
    policy: PolicyOptimizer, name: str
) -> None:
    work: Callable[..., Any] = getattr(policy, name)
    with Counted() as counted:
        work([micro_batch(seed) for seed in range(3)])
    assert (counted.copies, counted.waits) == (3, 1)


def test_a_micro_batch_launches_little_beside_its_model(policy: PolicyOptimizer) -> None:
    def launches(layers: int) -> int:
        policy.compute.model.layers = policy.compute.model.layers[:layers]
        with Counted() as counted:
            policy.policy_backward(micro_batch(0))
        return counted.launches

    with_two, with_one = launches(2), launches(1)
    assert 2 * with_one - with_two <= 60  # without any
