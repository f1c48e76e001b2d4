"""The optimizer around the gradient: refusal of NaN, schedules, the compute copy, resuming."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from elpo_fast.model.attention import ATTENTION
from elpo_fast.train.step import (
    NonFiniteError,
    PolicyOptimizer,
    warmup_constant,
    warmup_cosine,
)
from elpo_fast.tree.pack import PackedBatch, Scored, micro_batches, pack
from elpo_fast.tree.store import Forest, Tree

VOCABULARY = 61
LENGTHS = [(3, 4), (2, 9, 5), (6,), (1, 30)]  # agent tokens of each trajectory of each tree
PROMPT = 5


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
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
    return Qwen3ForCausalLM(config)


@pytest.fixture(scope="module")
def forest() -> Forest:
    rng = np.random.default_rng(0)
    trees = []
    for lengths in LENGTHS:
        tree = Tree(rng.integers(0, VOCABULARY, PROMPT))
        for size in lengths:
            ids = rng.integers(0, VOCABULARY, size)
            logprobs = np.full(size, -np.log(VOCABULARY))
            leaf = tree.add_step(0, ids, np.ones(size), logprobs, np.zeros(size), tool_call=False)
            tree.finish(leaf, reward=0.0, correct=False, end="answer")
        trees.append(tree)
    return Forest.from_trees(trees)


def scores(forest: Forest, pos: float = 1.0, neg: float = 0.0) -> Scored:
    nodes = np.ones(len(forest.parent))
    return Scored(
        *(nodes for _ in range(4)),
        pos=pos * nodes,
        neg=neg * nodes,
        eps_low=0.2 * nodes,
        eps_high=0.3,
    )


@pytest.fixture
def batches(forest: Forest) -> list[PackedBatch]:
    return [pack(forest, [0, 1], scores(forest)), pack(forest, [3, 2], scores(forest))]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def logprob_sum(model: PreTrainedModel, batches: list[PackedBatch]) -> float:
    reader = PolicyOptimizer(model, lr=1.0)
    return float(sum(logprob.sum() for logprob in reader.logprobs(batches)))


def test_update_raises_the_probability_of_good_tokens_and_reports_itself(
    model: PreTrainedModel, batches: list[PackedBatch]
) -> None:
    optimizer = PolicyOptimizer(model, lr=1e-2, grad_clip=0.5, schedule=lambda update: 0.25)
    before = logprob_sum(model, batches)
    batches = [replace(batch, old_logprob=optimizer.logprobs([batch])[0]) for batch in batches]
    stats = optimizer.update(batches)
    assert logprob_sum(model, batches) > before
    agent = sum(sum(lengths) for lengths in LENGTHS)
    assert stats.trained_tokens == agent
    assert stats.tokens == agent + PROMPT * len(LENGTHS)
    assert stats.loss == pytest.approx(-agent, rel=1e-5)  # every ratio is 1
    assert (stats.ratio_mean, stats.ratio_max) == pytest.approx((1.0, 1.0), abs=1e-5)
    assert stats.clipped_low == stats.clipped_high == 0
    assert stats.approx_kl == pytest.approx(0.0, abs=1e-6)
    assert stats.grad_norm > 0.5
    assert stats.lr == 0.25 * 1e-2
    assert optimizer.updates == 1


def test_second_update_sees_ratios_and_clips(
    model: PreTrainedModel, batches: list[PackedBatch]
) -> None:
    optimizer = PolicyOptimizer(model, lr=2e-2)
    batches = [replace(batch, old_logprob=optimizer.logprobs([batch])[0]) for batch in batches]
    for _ in range(3):
        stats = optimizer.update(batches)
    assert stats.ratio_max > 1.3
    assert 0 < stats.clipped_high <= 1
    assert stats.approx_kl > 0
    assert stats.ratio_mean > 1


def test_gradient_is_clipped_to_the_given_norm(
    model: PreTrainedModel, batches: list[PackedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = PolicyOptimizer(model, lr=1e-3, grad_clip=0.1)
    seen = []
    step = optimizer._optimizer.step

    def record() -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        seen.append(torch.nn.utils.get_total_norm(gradients).item())
        step()

    monkeypatch.setattr(optimizer._optimizer, "step", record)
    assert optimizer.update(batches).grad_norm > 0.1
    assert seen == [pytest.approx(0.1, rel=1e-4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "field, bad", [("pos_coef", math.nan), ("pos_coef", math.inf), ("old_logprob", math.nan)]
)
def test_a_value_that_is_not_finite_names_its_tree_and_changes_nothing(
    model: PreTrainedModel, batches: list[PackedBatch], field: str, bad: float, dtype: torch.dtype
) -> None:
    optimizer = PolicyOptimizer(model, lr=1e-2, dtype=dtype)
    optimizer.update(batches)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    values = getattr(batches[1], field).copy()
    values[int(batches[1].tree_start[1]) + PROMPT] = bad  # in tree 2, the second of this batch
    with pytest.raises(NonFiniteError, match=r"not finite on trees \[2\]") as caught:
        optimizer.update([batches[0], replace(batches[1], **{field: values})])
    assert caught.value.trees == (2,)
    assert same(before, weights(model))
    assert same(before, weights(optimizer.compute)) or dtype == torch.bfloat16
    assert optimizer.updates == 1
    assert len(state) == 4 * len(list(model.parameters())) and same(state, optimizer.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.update(batches).loss != 0  # and goes on


def test_parameters_that_are_not_finite_accuse_every_tree(
    model: PreTrainedModel, batches: list[PackedBatch]
) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        PolicyOptimizer(model, lr=1e-2).update(batches)
    assert caught.value.trees == (0, 1, 3, 2)


def test_gradient_that_is_not_finite_is_refused_where_the_loss_is(
    model: PreTrainedModel, batches: list[PackedBatch]
) -> None:
    # Finite loss of about 1e38, gradients beyond float32.
    huge = np.full(len(batches[0]), 1e37, np.float32) * batches[0].agent
    before = weights(model)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight *= 1e4
        before = weights(model)
    with pytest.raises(NonFiniteError, match="the gradient is not finite"):
        PolicyOptimizer(model, lr=1e-2).update([replace(batches[0], pos_coef=huge)])
    assert same(before, weights(model))


def test_update_without_coefficients_changes_nothing(
    model: PreTrainedModel, forest: Forest, batches: list[PackedBatch]
) -> None:
    optimizer = PolicyOptimizer(model, lr=1e-2, weight_decay=0.5)
    optimizer.update(batches)
    before = weights(model)
    silent = pack(forest, range(len(forest)), scores(forest, pos=0.0))
    stats = optimizer.update([silent])
    assert (stats.tokens, stats.trained_tokens, stats.loss) == (0, 0, 0.0)
    assert same(before, weights(model))
    assert optimizer.updates == 1


def test_silent_micro_batch_does_not_change_an_update(
    model: PreTrainedModel, forest: Forest, batches: list[PackedBatch]
) -> None:
    other = copy.deepcopy(model)
    PolicyOptimizer(model, lr=1e-2).update(batches)
    silent = pack(forest, [0], scores(forest, pos=0.0))
    PolicyOptimizer(other, lr=1e-2).update([silent, *batches])
    assert same(weights(model), weights(other))


def test_nll_update_is_weighted_cross_entropy(model: PreTrainedModel, forest: Forest) -> None:
    batch = pack(forest, [2], scores(forest, pos=0.5))
    ids = torch.from_numpy(batch.token_ids).long()
    logits = model(input_ids=ids[None]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    expected = 0.5 * losses[PROMPT - 1 :].sum()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    optimizer = PolicyOptimizer(model, lr=1e-2, temperature=0.5)  # which demonstrations have not
    part = optimizer.nll_backward(batch)
    assert part is not None
    assert part.loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    model.zero_grad(set_to_none=True)
    losses = [optimizer.nll_update([batch]).loss for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_bfloat16_copy_follows_float32_masters(
    model: PreTrainedModel, batches: list[PackedBatch], checkpointing: Any
) -> None:
    exact = copy.deepcopy(model)
    reference = PolicyOptimizer(exact, lr=1e-2)
    optimizer = PolicyOptimizer(
        model, lr=1e-2, dtype=torch.bfloat16, gradient_checkpointing=checkpointing
    )
    for batch in batches:
        optimizer.policy_backward(batch)
        reference.policy_backward(batch)
    assert all(parameter.grad is None for parameter in optimizer.compute.parameters())
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and ours.grad.dtype == torch.float32
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.03
    optimizer.update(batches)
    for master, copied in zip(model.parameters(), optimizer.compute.parameters(), strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(copied, master.to(torch.bfloat16))
    inverse_frequency = optimizer.compute.model.rotary_emb.inv_freq
    assert torch.equal(inverse_frequency, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_gradient_checkpointing_gives_the_same_gradient(
    model: PreTrainedModel, batches: list[PackedBatch], checkpointing: Any
) -> None:
    other = copy.deepcopy(model)
    PolicyOptimizer(model, lr=1.0).policy_backward(batches[0])
    policy = PolicyOptimizer(other, lr=1.0, gradient_checkpointing=checkpointing)
    policy.policy_backward(batches[0])
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_gradient_repeats_to_the_last_bit_on_two_threads() -> None:
    """Many siblings, whose gradients add up at their predecessor, in whatever thread they are."""
    rng = np.random.default_rng(0)
    tree = Tree(rng.integers(0, VOCABULARY, PROMPT))
    for _ in range(40):
        ids = rng.integers(0, VOCABULARY, 20)
        leaf = tree.add_step(0, ids, np.ones(20), np.zeros(20), np.zeros(20), tool_call=False)
        tree.finish(leaf, reward=0.0, correct=False, end="answer")
    forest = Forest.from_trees([tree])
    batch = pack(forest, [0], scores(forest))
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    config._attn_implementation = ATTENTION
    policy = PolicyOptimizer(Qwen3ForCausalLM(config), lr=1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(30):
            policy.model.zero_grad()
            policy.nll_backward(batch)
            found.append([p.grad.clone() for p in policy.model.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(again, found[0], strict=True))


def test_small_steps_are_not_lost_in_bfloat16(
    model: PreTrainedModel, batches: list[PackedBatch]
) -> None:
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    optimizer = PolicyOptimizer(model, lr=1e-6, weight_decay=0.0, dtype=torch.bfloat16)
    for _ in range(3):
        optimizer.update(batches)
    moved = model.model.layers[0].mlp.up_proj.weight.detach() - before
    assert moved.abs().max() > 2e-6  # bfloat16 weights of 0.02 stand 1e-4 apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_optimizer_continues_exactly(
    model: PreTrainedModel, batches: list[PackedBatch], dtype: torch.dtype
) -> None:
    settings = {"lr": 1e-2, "dtype": dtype, "schedule": warmup_constant(3)}
    first = PolicyOptimizer(model, **settings)
    first.update(batches)
    resumed_model = copy.deepcopy(model)
    resumed = PolicyOptimizer(resumed_model, **settings)
    saved = first.state_dict()
    state = resumed.make_moments(saved)
    for name, tensor in state.items():
        tensor.copy_(saved[name])
    resumed.load_state_dict(state, first.updates)
    assert first.update(batches) == resumed.update(batches)
    assert same(weights(model), weights(resumed_model))


def test_norms_and_biases_do_not_decay(model: PreTrainedModel, batches: list[PackedBatch]) -> None:
    optimizer = PolicyOptimizer(model, lr=1e-2, weight_decay=0.5)
    decay = {
        parameter: group["weight_decay"]
        for group in optimizer._optimizer.param_groups
        for parameter in group["params"]
    }
    assert {decay[parameter] for parameter in model.parameters() if parameter.ndim == 1} == {0.0}
    assert {decay[parameter] for parameter in model.parameters() if parameter.ndim == 2} == {0.5}


def test_schedules() -> None:
    constant, cosine = warmup_constant(3), warmup_cosine(2, 10)
    assert [constant(update) for update in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    values = [cosine(update) for update in range(12)]
    assert values[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert values[2:] == sorted(values[2:], reverse=True)
    assert values[6] == pytest.approx(0.5)
    assert values[10] == values[11] == pytest.approx(0.0)
    assert warmup_constant(0)(0) == warmup_cosine(0, 1)(0) == 1.0


@pytest.mark.parametrize(
    "budget, expected",
    [
        (1, [[3], [1], [2], [1], [0], [0], [1], [3]]),  # paths of their own
        (36, [[3], [0, 1], [2]]),
        (48, [[0, 3], [1, 2]]),
        (1000, [[0, 1, 2, 3]]),
    ],
)
def test_micro_batches_are_first_fit_decreasing(
    forest: Forest, budget: int, expected: list[list[int]]
) -> None:
    found = micro_batches(forest, scores(forest), [2, 0, 3, 1], budget, scale=0.5)
    assert [batch.trees.tolist() for batch in found] == expected
    assert {float(value) for batch in found for value in batch.pos_coef} == {0.0, 0.5}


def test_cost_counts_the_operations_of_a_forward(model: PreTrainedModel, forest: Forest) -> None:
    optimizer = PolicyOptimizer(model, lr=1.0)
    batch = pack(forest, range(len(forest)), scores(forest))
    trie, trained = batch.trie, int(((batch.pos_coef != 0) | (batch.neg_coef != 0)).sum())
    blocks = [p for n, p in model.model.named_parameters() if "layers" in n and p.ndim == 2]
    pairs = 0
    for row in range(len(trie)):  # what each prefix sees, itself included
        pairs += int((trie.end[: row + 1] > row).sum())
    products, attention, head = (
        2 * len(trie) * sum(p.numel() for p in blocks),
        2 * pairs * (4 * 4 * 8),  # layers, two products of 4 heads of 8
        2 * trained * model.lm_head.weight.numel(),
    )
    expected = len(trie) * (1 + (attention + head) / products)
    assert optimizer._cost(batch) == pytest.approx(expected, rel=0.02)  # norms are weights, too


def test_long_paths_weigh_more_than_bushes_of_as_many_tokens(model: PreTrainedModel) -> None:
    lengths = {"chain": [1500], "bush": [60] * 25}
    cost = {}
    for name, sizes in lengths.items():
        tree = Tree(np.zeros(1, int))
        for size in sizes:
            tree.finish(
                tree.add_step(0, *(np.ones(size, int) for _ in range(4)), tool_call=False),
                reward=0.0, correct=False, end="answer",
            )  # fmt: skip
        forest = Forest.from_trees([tree])
        cost[name] = PolicyOptimizer(model, lr=1.0)._cost(pack(forest, [0], scores(forest)))
    assert cost["chain"] > 3 * cost["bush"]


def test_micro_batches_of_no_trees(forest: Forest) -> None:
    assert micro_batches(forest, scores(forest), [], 100) == []
