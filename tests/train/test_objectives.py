"""Objectives beyond the clipped ratio of a token, on trees, against their published formulas with
one row for each trajectory: value and every parameter's gradient, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from elpo_fast.algo import score
from elpo_fast.config import AlgoConfig, ConfigError, TrainConfig, parse_config
from elpo_fast.model.attention import ATTENTION
from elpo_fast.train.loop import train
from elpo_fast.train.objective import linearised, with_entropy
from elpo_fast.train.step import PolicyOptimizer, schedule_of
from elpo_fast.train.summary import read_metrics
from elpo_fast.tree.pack import PackedBatch, Scored, micro_batches
from elpo_fast.tree.store import Forest, Tree

VOCABULARY = 23
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-6,
}


def make_model(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    built = LlamaForCausalLM(LlamaConfig(**SIZES)).double()
    built.set_attn_implementation(ATTENTION)
    for module in built.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon)
            )
    return built


def random_tree(rng: np.random.Generator, trajectories: int, tokens: int) -> Tree:
    tree = Tree(rng.integers(0, tokens, 4))
    for ordinal in range(trajectories):
        inner = [node for node in range(len(tree)) if tree.correct[node] < 0]
        node = int(rng.choice(inner)) if ordinal else 0
        for _ in range(int(rng.integers(1, 4))):
            size = int(rng.integers(1, 6))
            agent = rng.random(size) < 0.7
            agent[0] = True
            node = tree.add_step(
                node,
                rng.integers(0, tokens, size),
                agent,
                -np.log(VOCABULARY) + rng.normal(0, 0.8, size),
                np.zeros(size),
                tool_call=True,
            )
        reward = float(rng.normal())
        tree.finish(node, reward=reward, correct=reward > 0, end="answer")
    return tree


def forest() -> Forest:
    """Of few tokens the second: siblings begin alike, and parts are cut within a step."""
    rng = np.random.default_rng(5)
    return Forest.from_trees([random_tree(rng, 12, VOCABULARY), random_tree(rng, 9, 2)])


class Row:
    """One trajectory: what the policy gives its agent tokens, and what is known of them."""

    def __init__(self, model: PreTrainedModel, trees: Forest, scored: Scored, leaf: int) -> None:
        path = trees.path(int(trees.leaf_node[leaf]))
        spans = [np.arange(trees.token_start[n], trees.token_start[n + 1]) for n in path]
        tokens, nodes = np.concatenate(spans), np.repeat(path, [len(span) for span in spans])
        ids = torch.from_numpy(trees.token_ids[tokens]).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1)
        agent = np.flatnonzero(trees.agent[tokens])
        self.node = nodes[agent]
        self.logprob = logprobs[agent - 1].gather(-1, ids[agent, None])[:, 0]
        self.entropy = -(logprobs.exp() * logprobs).sum(-1)[agent - 1]
        self.old = torch.from_numpy(trees.logprob[tokens[agent]]).double()
        self.turns = [np.flatnonzero(self.node == node) for node in dict.fromkeys(self.node)]
        tree = int(trees.tree[path[0]])
        leaves = trees.leaf_node[list(trees.leaves(tree))]
        rewards = trees.reward[leaves]
        self.group = len(leaves)
        self.advantage = float((trees.reward[path[-1]] - rewards.mean()) / (rewards.std() + 1e-6))


Term = Callable[[Row], torch.Tensor]
"""A trajectory's share of the objective, to be averaged over its group."""


def plain(model: PreTrainedModel, trees: Forest, scored: Scored, term: Term) -> torch.Tensor:
    rows = [Row(model, trees, scored, leaf) for leaf in range(len(trees.leaf_node))]
    return -sum(term(row) / row.group for row in rows) / len(trees)


def clipped(ratio: torch.Tensor, advantage: float, low: float, high: float) -> torch.Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


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


def compared(algo: dict[str, Any], term: Term, budget: int, **settings: Any) -> None:
    """The update's loss and gradient on packed trees are the plain ones."""
    config = AlgoConfig.model_validate({"advantage": "group", **algo})
    trees, model = forest(), make_model()
    scored = score(trees, config)
    expected = plain(model, trees, scored, term)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    scale = 1 / len(trees)
    batches = [
        widened(batch, scored, scale)
        for batch in micro_batches(trees, scored, range(len(trees)), budget, scale=scale)
    ]
    optimizer = PolicyOptimizer(model, lr=1.0, dtype=torch.float64, **settings)
    shift = 0.0  # of the loss of a plain policy gradient, whose gradient alone counts
    if config.entropy_coef:
        batches = with_entropy(trees, scored, batches, config.entropy_coef * scale)
    if config.ratio != "token" or config.kl_coef:
        batches, found = linearised(
            optimizer,
            trees,
            scored,
            batches,
            ratio=config.ratio,
            scale=scale,
            kl_coef=config.kl_coef,
            reference=reference_of(batches) if config.kl_coef else (),
        )
        shift = found.shift
    parts = [part for batch in batches if (part := optimizer.policy_backward(batch))]
    loss = sum(part.loss for part in parts) + shift
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
        assert error < 1e-9, f"{name}: relative error {float(error):.1e}"


BUDGETS = pytest.mark.parametrize("budget", [25, 10_000], ids=["cut", "whole"])


@BUDGETS
def test_dual_clip(budget: int) -> None:
    """PPO with dual clip (arXiv 1912.09729): max(min(r A, clip(r) A), c A) where A < 0."""
    capped = 0

    def term(row: Row) -> torch.Tensor:
        nonlocal capped
        ratio = (row.logprob - row.old).exp()
        value = clipped(ratio, row.advantage, 0.2, 0.3)
        if row.advantage < 0:
            capped += int((ratio > 1.5).sum())
            value = torch.maximum(value, torch.full_like(value, 1.5 * row.advantage))
        return value.mean()

    clip = {"eps_low": 0.2, "eps_high": 0.3, "eps_elc": 0.0, "dual": 1.5}
    compared({"clip": clip}, term, budget, ratio_cap=1.5)
    assert capped > 10


def reference_of(batches: list[PackedBatch]) -> list[np.ndarray]:
    other = PolicyOptimizer(make_model(seed=1), lr=1.0, dtype=torch.float64)
    return other.logprobs(batches)


@BUDGETS
@pytest.mark.parametrize("dual", [None, 1.05], ids=["", "dual"])
def test_ratio_of_a_sequence(budget: int, dual: float | None) -> None:
    """GSPO (arXiv 2507.18071, Eq. 5 and 7)."""
    held = {"low": 0, "high": 0, "none": 0}

    def term(row: Row) -> torch.Tensor:
        ratio = (row.logprob - row.old).mean().exp()
        value = clipped(ratio, row.advantage, 0.05, 0.08)
        if dual and row.advantage < 0:
            value = torch.maximum(value, torch.full_like(value, dual * row.advantage))
        free = not ((ratio < 0.95 and row.advantage < 0) or (ratio > 1.08 and row.advantage > 0))
        held["none" if free else "low" if row.advantage < 0 else "high"] += 1
        return value

    clip = {"eps_low": 0.05, "eps_high": 0.08, "eps_elc": 0.0, "dual": dual}
    compared({"clip": clip, "ratio": "sequence"}, term, budget, ratio_cap=dual or math.inf)
    assert min(held.values()) >= 1, held


@BUDGETS
@pytest.mark.parametrize("algo", [{}, {"advantage": "hierarchical"}], ids=["group", "steps"])
def test_ratio_of_a_turn(budget: int, algo: dict[str, Any]) -> None:
    """As GSPO, each turn by itself, which weighs as much as its tokens do together."""
    advantages: dict[int, float] = {}
    if algo:
        config = AlgoConfig.model_validate(algo)
        advantages = dict(enumerate(score(forest(), config).advantage))

    def term(row: Row) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for turn in row.turns:
            ratio = (row.logprob[turn] - row.old[turn]).mean().exp()
            advantage = advantages.get(int(row.node[turn[0]]), row.advantage)
            total = total + clipped(ratio, advantage, 0.1, 0.2) * len(turn) / len(row.node)
        return total

    clip = {"eps_low": 0.1, "eps_high": 0.2, "eps_elc": 0.0}
    compared({"clip": clip, "ratio": "turn", **algo}, term, budget)


@BUDGETS
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_kl_to_a_reference(budget: int, ratio: str) -> None:
    """GRPO (arXiv 2402.03300, Eq. 3 and 4): beta (pi_ref / pi - log(pi_ref / pi) - 1) a token."""
    other = make_model(seed=1)
    trees = forest()
    scored = score(trees, AlgoConfig())
    theirs = iter([Row(other, trees, scored, n).logprob for n in range(len(trees.leaf_node))])

    def term(row: Row) -> torch.Tensor:
        away = next(theirs).detach() - row.logprob
        penalty = (away.exp() - away - 1).mean()
        if ratio == "sequence":
            gain = clipped((row.logprob - row.old).mean().exp(), row.advantage, 0.1, 0.2)
        else:
            gain = clipped((row.logprob - row.old).exp(), row.advantage, 0.1, 0.2).mean()
        return gain - 0.3 * penalty

    clip = {"eps_low": 0.1, "eps_high": 0.2, "eps_elc": 0.0}
    compared({"clip": clip, "ratio": ratio, "kl_coef": 0.3}, term, budget)


@BUDGETS
@pytest.mark.parametrize("weights", ["sequence_mean", "token_mean"])
def test_entropy_bonus(budget: int, weights: str) -> None:
    """The entropy of every agent token, averaged as the surrogate is."""
    trees = forest()
    total = {}  # agent tokens of each tree's trajectories
    for row in range(len(trees.leaf_node)):
        found = Row(make_model(), trees, score(trees, AlgoConfig()), row)
        total[found.group] = total.get(found.group, 0) + len(found.node)

    def term(row: Row) -> torch.Tensor:
        ratio = (row.logprob - row.old).exp()
        value = clipped(ratio, row.advantage, 0.2, 0.3) + 0.1 * row.entropy
        return (
            value.mean()
            if weights == "sequence_mean"
            else (value.sum() * row.group / total[row.group])
        )

    clip = {"eps_low": 0.2, "eps_high": 0.3, "eps_elc": 0.0}
    compared({"clip": clip, "entropy_coef": 0.1, "weights": weights}, term, budget)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules(kind: str) -> None:
    """Rise over 4 updates, then stay, or fall to 0 at the last of 5 steps of 4 updates."""
    config = TrainConfig(schedule=kind, warmup=4, steps=5, updates_per_step=4, tasks_per_step=4)
    factor = schedule_of(config)
    assert [factor(n) for n in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    after = [factor(n) for n in range(4, 21)]
    match kind:
        case "constant":
            assert after == [1.0] * 17
        case "linear":
            assert after == pytest.approx([1 - n / 16 for n in range(17)])
        case "cosine":
            assert after == pytest.approx([(1 + math.cos(math.pi * n / 16)) / 2 for n in range(17)])


def small_run(folder: Path, **algo: Any) -> list[dict[str, Any]]:
    """Metrics of two steps with two updates each; verdicts are those of answers' lengths."""
    small = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 64}
    config = parse_config(
        {
            "run": {"dir": str(folder), "threads": 1, "log": []},
            "model": {"name": "scratch", "dtype": "float32", "scratch": small},
            "task": {"options": {"steps": 4, "level": 1}, "system": "Go.", "seed": 0},
            "tools": {"workers": 1},
            "rollout": {"call_format": "code", "max_turn_tokens": 8, "max_tokens": 300},
            "algo": {"n_total": 4, "planner": "star", "advantage": "group"} | algo,
            "train": {"steps": 2, "tasks_per_step": 4, "updates_per_step": 2, "lr": 1e-2},
            "eval": {"tasks": 1},
        }
    )
    train(config, console=Console(quiet=True))
    return [r for r in read_metrics(config.run_dir) if r["phase"] == "rl"]


@pytest.fixture
def random_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    async def grade(self: Any, task: Any, messages: Any, end: Any) -> Any:
        return self.options.verdict(len(messages[-1]["content"]) % 2 == 0, end.value)

    monkeypatch.setattr("elpo_fast.tasks.ledger.Ledger.grade", grade)


@pytest.mark.usefixtures("random_rewards")
def test_runs_with_other_objectives(tmp_path: Path) -> None:
    clip = {"eps_low": 3e-4, "eps_high": 4e-4, "eps_elc": 0.0}
    plain = small_run(tmp_path / "plain", clip=clip)
    gspo = small_run(tmp_path / "gspo", clip=clip, ratio="sequence")
    every = {"kl_coef": 0.1, "entropy_coef": 0.01, "ratio": "turn"}
    kept = small_run(tmp_path / "kept", clip=clip, **every)
    assert plain[0]["mismatch_max"] < 1e-3, "the policy that sampled is the one that is trained"
    for records in (gspo, kept):
        assert records[0]["success"] == plain[0]["success"], "the same trees"
        assert records[0]["loss"] != plain[0]["loss"]
        assert records[0]["mismatch_max"] < 1e-3
        assert all(record["grad_norm"] > 0 for record in records)
    assert "reference_kl" not in gspo[0]
    assert 0 < kept[0]["reference_kl"] < kept[1]["reference_kl"]
    assert kept[0]["skipped_trees"] == 0
    assert (tmp_path / "kept" / "run" / "reference" / "config.json").is_file()


@pytest.mark.usefixtures("random_rewards")
def test_groups_without_signal_are_replaced(tmp_path: Path) -> None:
    plain = small_run(tmp_path / "plain")
    again = small_run(tmp_path / "again", dynamic_sampling=4)
    assert plain[0]["rollouts"] == plain[0]["trajectories"] == 16
    assert sum(record["skipped_trees"] for record in plain) > 0, "there is something to replace"
    for record in again:
        assert record["trajectories"] == 16 <= record["rollouts"] <= 64
        assert record["skipped_trees"] == 0 or record["rollouts"] == 64
    assert sum(record["rollouts"] for record in again) > 32


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"algo": {"ratio": "sequence"}}, "set advantage=group"),
        ({"algo": {"ratio": "sequence", "advantage": "group"}}, "set clip.eps_elc=0"),
        ({"algo": {"kl_coef": 0.1}, "parallel": {"shard": 2}}, "keeps a second model"),
        (
            {
                "algo": {"ratio": "turn"},
                "train": {"old_logprob": "recompute", "importance_sampling": "token"},
            },
            "set importance_sampling=sequence",
        ),
    ],
    ids=["steps", "elc", "parallel", "token"],
)
def test_what_does_not_go_together_is_said(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(data)
