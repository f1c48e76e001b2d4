"""Random models of Qwen2.5's shapes, forests to train them on, and attention's inputs."""

from __future__ import annotations

import gc

import numpy as np
import torch
from elpo_kernels import TreePlan
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.forests import Shape, as_trees, grow
from bench.gpu.cases import make_forest
from bench.gpu.part import Part
from elpo_fast.model.attention import attention_name

Heads = tuple[int, int, int]
HEADS: dict[str, Heads] = {"0.5b": (14, 2, 64), "1.5b": (12, 2, 128), "7b": (28, 4, 128)}
SIZES = {"0.5b": (896, 4864, 24), "1.5b": (1536, 8960, 28)}  # hidden, intermediate, layers
VOCABULARY = 151_936
TREES = Shape(trajectories=16, from_root=3, steps=12, step_tokens=(100, 180), prompt=600)
TINY = Shape(trajectories=4, from_root=2, steps=2, step_tokens=(4, 8), prompt=9)


def shape(part: Part) -> Shape:
    return TINY if part.tiny else TREES


def make_model(
    part: Part, name: str, dtype: torch.dtype, layers: int | None = None
) -> Qwen2ForCausalLM:
    """Random, on the part's device."""
    hidden, intermediate, depth = SIZES[name]
    heads, kv_heads, _ = HEADS[name]
    vocabulary = VOCABULARY
    if part.tiny:
        hidden, intermediate, depth, heads, kv_heads, vocabulary = 32, 48, 2, 2, 1, 512
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    config._attn_implementation = attention_name("auto")
    gc.collect()  # a model before this one
    if not part.tiny:
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(part.device):
            return Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def operands(part: Part, tokens: int, heads: Heads) -> list[Tensor]:
    """Query, key, value `[N, heads, D]` and a gradient."""
    generator = torch.Generator(part.device).manual_seed(0)
    query, shared, dim = heads
    like = {"generator": generator, "device": part.device, "dtype": part.dtype}
    return [
        torch.randn(tokens, count, dim, **like).requires_grad_(number < 3)
        for number, count in enumerate((query, shared, shared, query))
    ]


def random_mask(part: Part, trees: int, tokens: int, branching: float) -> TreePlan:
    plan = make_forest(trees, tokens, branching=branching)
    assert plan.position is not None
    return TreePlan(plan.end.to(part.device), plan.position.to(part.device))


def packed_mask(part: Part, tokens: int) -> tuple[TreePlan, int]:
    """Trees of `TREES`' shape up to `tokens` tokens, and their allowed pairs."""
    rng, trees = np.random.default_rng(0), []
    while sum(len(step) for tree in trees for step in tree.token_ids) < tokens:
        trees.append(grow(rng, shape(part), VOCABULARY))
    (batch,) = as_trees(trees, 10 * tokens)
    end = torch.from_numpy(np.minimum(batch.end, tokens)[:tokens]).to(part.device)
    position = torch.from_numpy(batch.position[:tokens]).to(part.device)
    return TreePlan(end, position), int(batch.position[:tokens].astype(np.int64).sum()) + tokens
