"""Selective checkpointing: what is kept for the backward pass, and what is computed again."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from elpo_fast.config import LoraConfig
from elpo_fast.model.attention import ATTENTION
from elpo_fast.model.checkpointed import checkpoint_blocks
from elpo_fast.model.forward import packed_hidden
from elpo_fast.model.lora import add_adapters, initialise

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, DIM, TOKENS = 256, 512, 3, 4, 2, 64, 300
RANK = 4


class Watch(TorchDispatchMode):
    """Counts calls of operators, and bytes of their own results that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.there: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.name().partition(".")[0]] += 1
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            if storage._cdata not in given | self.there.keys():
                self.there[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.there.pop, storage._cdata)
        return out


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [each.untyped_storage() for each in tree_leaves(tree) if isinstance(each, Tensor)]


def watched(model: Any) -> tuple[Counter[str], Counter[str], float, dict[str, Tensor]]:
    """Calls of forward and of backward, numbers kept between the two of a token and layer, and
    gradients."""
    ids = torch.arange(TOKENS) % 61
    with Watch() as watch:
        hidden = packed_hidden(model, ids, torch.arange(TOKENS), torch.full((TOKENS,), TOKENS))
        kept = sum(watch.there.values()) / 4 / TOKENS / LAYERS
        forward = watch.calls.copy()
        hidden.square().sum().backward()
    backward = watch.calls - forward
    return (
        forward,
        backward,
        kept,
        {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None},
    )


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
    )
    built = LlamaForCausalLM(config)
    built.set_attn_implementation(ATTENTION)
    return built


def test_products_and_attention_are_kept_and_elements_computed_again(model: Any) -> None:
    other = copy.deepcopy(model)
    checkpoint_blocks(other)
    plain, selective = watched(model), watched(other)
    for name in ("aten::mm", "elpo_fast::flash_path_attention"):
        assert plain[0][name] and selective[1][name] == plain[1][name]
    assert selective[1]["aten::silu"] == LAYERS and not plain[1]["aten::silu"]
    assert selective[1]["aten::rsqrt"] == 2 * LAYERS and not plain[1]["aten::rsqrt"]
    for name, gradient in plain[3].items():
        assert torch.equal(selective[3][name], gradient), name


def test_what_is_kept_is_input_products_and_attention(model: Any) -> None:
    other = copy.deepcopy(model)
    checkpoint_blocks(other)
    attention = 2 * HEADS * DIM + 2 * KV_HEADS * DIM  # queries and result; keys, values
    count = HIDDEN + attention + 2 * HIDDEN + 2 * MLP
    plain, selective = watched(model)[2], watched(other)[2]
    # Beside it: log-sum-exps, rotations, and the norm after the last block.
    assert count < selective < count + 4 * HIDDEN
    assert selective < 0.75 * plain


def test_an_adapters_second_factor_is_computed_again(model: Any) -> None:
    add_adapters(model, LoraConfig(rank=RANK))
    initialise(model, seed=0)
    other = copy.deepcopy(model)
    checkpoint_blocks(other)
    plain, selective = watched(model), watched(other)
    layers = 7 * LAYERS
    assert plain[0]["aten::mm"] == 3 * layers
    again = selective[1]["aten::mm"] - plain[1]["aten::mm"]
    assert layers - LAYERS <= again <= layers  # the last one of a block is not needed
    for name, gradient in plain[3].items():
        assert torch.equal(selective[3][name], gradient), name
