"""Packed loss and every parameter gradient against Eq. 1 written out, one row a trajectory."""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from elpo_fast.algo import score
from elpo_fast.config import AlgoConfig, LoraConfig
from elpo_fast.model import checkpointed
from elpo_fast.model.attention import ATTENTION
from elpo_fast.model.lora import adapters, add_adapters, initialise
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.tree.pack import PackedBatch, Scored, micro_batches, pack
from elpo_fast.tree.store import Forest, Tree

VOCABULARY = 61
TEMPERATURE = 0.8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


def adapted(model: PreTrainedModel, targets: str | list[str]) -> PreTrainedModel:
    """The model frozen, with adapters that already do something."""
    add_adapters(model, LoraConfig(rank=3, alpha=7, targets=targets))
    initialise(model, seed=0)
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
    # Windows far shorter than the paths.
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "qwen3 with adapters": lambda: adapted(MODELS["qwen3"](), "all-linear"),
    "llama with adapters": lambda: adapted(MODELS["llama"](), ["q_proj", "down_proj", "lm_head"]),
}
ALGORITHMS = {
    "elpo": AlgoConfig.model_validate({"clip": {"scope": "tree"}}),
    "grpo": AlgoConfig.model_validate({"advantage": "group", "clip": {"eps_elc": 0.0}}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    built = MODELS[request.param]().double()
    built.set_attn_implementation(ATTENTION)
    for module in built.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(rms_norm, module)
        elif type(module).__name__ == "Gemma3RMSNorm":
            module.forward = MethodType(gemma_rms_norm, module)
    return built


def rms_norm(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """As transformers has it, but without rounding float64 to float32 inside."""
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden * scale)


def gemma_rms_norm(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
    return (1 + self.weight) * (hidden * scale)


def random_tree(
    rng: np.random.Generator,
    trajectories: int,
    *,
    prompt: int | list[int],
    branch: bool,
    tokens: int = VOCABULARY,
) -> Tree:
    """Steps of 0 to 9 tokens, the agent's or not, old log-probs around those of a fresh model: so
    far around that the loss is not a sum of terms that cancel, of which float32 leaves nothing.
    `prompt`: its length, or its tokens. With few different `tokens` siblings begin alike."""
    tree = Tree(rng.integers(0, tokens, prompt) if isinstance(prompt, int) else prompt)
    for ordinal in range(trajectories):
        inner = [node for node in range(len(tree)) if tree.correct[node] < 0]
        node = int(rng.choice(inner)) if branch and ordinal else 0
        for _ in range(int(rng.integers(1, 6))):
            size = int(rng.integers(0, 10))
            node = tree.add_step(
                node,
                rng.integers(0, tokens, size),
                rng.random(size) < 0.7,
                -np.log(VOCABULARY) + rng.normal(0, 1.0, size),
                np.zeros(size),
                tool_call=True,
            )
        reward = float(rng.integers(0, 2))
        tree.finish(node, reward=reward, correct=reward == 1, end="answer")
    return tree


def silent_tree(rng: np.random.Generator) -> Tree:
    """Two trajectories, the second without a single agent token; then nothing but empty steps."""
    tree = Tree(rng.integers(0, VOCABULARY, 3))
    first = tree.add_step(0, [1, 2], [1, 1], [-4.0, -4.5], [0, 0], tool_call=False)
    tree.finish(first, reward=1.0, correct=True, end="answer")
    second = tree.add_step(0, [5], [0], [0], [0], tool_call=True)
    second = tree.add_step(second, [], [], [], [], tool_call=True)
    tree.finish(second, reward=0.0, correct=False, end="length")
    return tree


def forest() -> Forest:
    rng = np.random.default_rng(7)
    return Forest.from_trees(
        [
            random_tree(rng, 8, prompt=5, branch=True),
            random_tree(rng, 4, prompt=1, branch=False),  # a star
            random_tree(rng, 1, prompt=9, branch=False),  # a single chain
            silent_tree(rng),
            random_tree(rng, 12, prompt=150, branch=True),  # longer than one attention tile
        ]
    )


def repeating_forest() -> Forest:
    """One or two tokens only, so that nodes and tasks repeat each other: a common system prompt,
    the same prompt twice, one that is the beginning of another, one of its own."""
    rng = np.random.default_rng(3)
    system = [0, 1, 1, 0, 1, 0]
    prompts = [[*system, 0, 1], [*system, 0, 1], [*system, 1, 1, 0], system, [1, 0, 0]]
    return Forest.from_trees(
        [
            random_tree(rng, 10, prompt=prompt, branch=bool(index % 2), tokens=1 + index % 2)
            for index, prompt in enumerate(prompts)
        ]
    )


FORESTS = {"distinct": forest, "repeating": repeating_forest}


def plain_loss(
    model: PreTrainedModel, forest: Forest, scored: Scored, config: AlgoConfig
) -> tuple[torch.Tensor, float, dict[str, int]]:
    """Eq. 1 with Eq. 12's bounds over padded rows, the same of the terms' absolute values, and how
    many tokens each bound holds."""
    held = {"low": 0, "high": 0}
    total = torch.zeros((), dtype=model.dtype)
    size = 0.0
    for tree in range(len(forest)):
        leaves = forest.leaf_node[list(forest.leaves(tree))]
        rewards = forest.reward[leaves]
        group_advantage = (rewards - rewards.mean()) / (rewards.std() + config.advantage_eps)
        paths = [forest.path(int(leaf)) for leaf in leaves]
        rows = [token_rows(forest, path) for path in paths]
        longest = max(len(tokens) for tokens, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        seen = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, (tokens, _) in enumerate(rows):
            ids[row, : len(tokens)] = torch.from_numpy(forest.token_ids[tokens])
            seen[row, : len(tokens)] = 1
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits / TEMPERATURE
        logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        for row, (tokens, nodes) in enumerate(rows):
            agent = np.flatnonzero(forest.agent[tokens])
            if not len(agent):
                continue
            node = nodes[agent]
            advantage = (
                np.full(len(node), group_advantage[row])
                if config.advantage == "group"
                else scored.advantage[node]
            )
            advantage = torch.from_numpy(advantage).to(model.dtype)
            old = torch.from_numpy(forest.logprob[tokens[agent]]).to(model.dtype)
            ratio = (logprobs[row, agent - 1] - old).exp()
            low = torch.from_numpy(1 - scored.eps_low[node]).to(model.dtype)
            clipped = ratio.clamp(low, torch.full_like(low, 1 + scored.eps_high))
            surrogate = torch.minimum(ratio * advantage, clipped * advantage)
            total = total - surrogate.mean() / len(rows) / len(forest)
            size += surrogate.abs().mean().item() / len(rows) / len(forest)
            held["low"] += int(((ratio < low) & (advantage < 0)).sum())
            held["high"] += int(((ratio > 1 + scored.eps_high) & (advantage > 0)).sum())
    return total, size, held


def prefixes(forest: Forest) -> set[tuple[int, ...]]:
    """All beginnings of all trajectories."""
    found = set()
    for leaf in forest.leaf_node:
        tokens, _ = token_rows(forest, forest.path(int(leaf)))
        ids = forest.token_ids[tokens].tolist()
        found |= {tuple(ids[: size + 1]) for size in range(len(ids))}
    return found


def token_rows(forest: Forest, path: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Token indices of the forest along a path, and the node of each."""
    spans = [np.arange(forest.token_start[node], forest.token_start[node + 1]) for node in path]
    return np.concatenate(spans), np.repeat(path, [len(span) for span in spans])


def widened(batch: PackedBatch, scored: Scored, scale: float) -> PackedBatch:
    """The same batch with float64 coefficients and bounds, which `pack` rounds to float32."""
    return replace(
        batch,
        pos_coef=scored.pos[batch.node] * batch.agent * scale,
        neg_coef=scored.neg[batch.node] * batch.agent * scale,
        eps_low=scored.eps_low[batch.node],
        eps_high=np.full(len(batch), scored.eps_high),
        old_logprob=batch.old_logprob.astype(np.float64),
    )


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    taken = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.zero_grad(set_to_none=True)
    return taken


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("kind", "budget", "checkpointing"),
    [
        ("distinct", 100, False),
        ("distinct", 230, False),
        ("distinct", 230, "selective"),
        ("distinct", 100_000, False),
        ("repeating", 60, False),
        ("repeating", 100_000, False),
    ],
    ids=["by-path", "cut", "cut-selective", "one-batch", "repeating-cut", "repeating"],
)
def test_packed_step_equals_one_row_per_trajectory(
    model: PreTrainedModel,
    algorithm: str,
    dtype: torch.dtype,
    tolerance: float,
    kind: str,
    budget: int,
    checkpointing: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpointed, "_DEAR", 8)  # keep the products of models as small as these
    trees, config = FORESTS[kind](), ALGORITHMS[algorithm]
    scored = score(trees, config)
    expected, size, held = plain_loss(model, trees, scored, config)
    assert min(held.values()) >= 20, f"the bounds hardly act: {held}"
    expected.backward()
    expected_gradients = gradients(model)

    model = model.to(dtype)
    optimizer = PolicyOptimizer(
        model,
        lr=1.0,
        temperature=TEMPERATURE,
        dtype=dtype,
        gradient_checkpointing=checkpointing,
    )
    scale = 1 / len(trees)
    batches = micro_batches(trees, scored, range(len(trees)), budget, scale=scale)
    computed = [tree for batch in batches for tree in batch.trees]
    assert (len(computed) > len(trees)) == (budget < 1000)
    rows = [len(batch.trie) for batch in batches]
    assert max(rows) <= budget or budget == 100
    if budget > 1000:
        (batch,) = batches
        assert rows == [len(prefixes(trees))]
        assert (rows[0] < 0.7 * len(batch)) == (kind == "repeating")
    if dtype == torch.float64:
        batches = [widened(batch, scored, scale) for batch in batches]
    parts = [part for batch in batches if (part := optimizer.policy_backward(batch))]

    loss = sum(part.loss for part in parts)
    assert loss == pytest.approx(expected.item(), rel=tolerance)
    assert loss == pytest.approx(expected.item(), abs=tolerance / 50 * size)
    actual = gradients(model)
    assert actual.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error <= tolerance, f"{name}: relative error {float(error):.1e}"


@pytest.mark.parametrize("kind", FORESTS)
def test_logprobs_equal_those_of_plain_rows(model: PreTrainedModel, kind: str) -> None:
    trees = FORESTS[kind]()
    batch = pack(trees, range(len(trees)), score(trees, ALGORITHMS["elpo"]))
    optimizer = PolicyOptimizer(model, lr=1.0, temperature=TEMPERATURE, dtype=torch.float64)
    (packed,) = optimizer.logprobs([batch])
    assert not packed[batch.agent == 0].any()
    first_token = {int(node): index for index, node in reversed(list(enumerate(batch.node)))}
    for leaf in trees.leaf_node:
        tokens, nodes = token_rows(trees, trees.path(int(leaf)))
        ids = torch.from_numpy(trees.token_ids[tokens]).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0] / TEMPERATURE
        plain = logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0].numpy()
        for at in np.flatnonzero(trees.agent[tokens]):
            within = tokens[at] - trees.token_start[nodes[at]]
            assert packed[first_token[int(nodes[at])] + within] == pytest.approx(plain[at - 1])
