"""Inside other people's trainers: TRL's GRPOTrainer, verl's policy-loss contract, Liger's calls."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elpo_kernels import LinearPolicyLoss, linear_logprob, reference, verl
from elpo_kernels.adapters.aggregate import token_weights
from elpo_kernels.trl import FusedPolicyLoss
from kernel_cases import error
from torch import Tensor

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(61))]


def tiny_trainer(base: type, folder: Path, **settings: Any) -> Any:
    """A one-layer model over a vocabulary of words, rewarded for long answers."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0,
            max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
        )
    )  # fmt: skip
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 8, "max_steps": 3, "learning_rate": 1e-2, "temperature": 0.8,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True, "seed": 0, "max_grad_norm": 1e9,
        "epsilon": 0.1, "epsilon_high": 0.15, "optim": "sgd",
    }  # fmt: skip
    return base(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
        args=trl.GRPOConfig(**{**defaults, **settings}),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5"] * 8}),
    )


SETTINGS = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
    {"loss_type": "dr_grpo"},
    {"loss_type": "dapo", "gradient_accumulation_steps": 2, "num_iterations": 2},
    {"loss_type": "dapo", "num_iterations": 3, "delta": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_trl_trains_the_same_model(settings: dict[str, Any], tmp_path: Path) -> None:
    """Same losses, metrics and weights after three steps as with TRL's own loss."""
    trl = pytest.importorskip("trl")
    histories, weights = [], []

    class Fused(FusedPolicyLoss, trl.GRPOTrainer):
        pass

    for base in (trl.GRPOTrainer, Fused):
        trainer = tiny_trainer(base, tmp_path, **settings)
        trainer.train()
        histories.append([log for log in trainer.state.log_history if "loss" in log])
        weights.append([p.detach() for p in trainer.model.parameters()])
    assert len(histories[0]) == len(histories[1]) == 3
    for own, fused in zip(*histories, strict=True):
        for name in ("loss", "grad_norm", "entropy", "clip_ratio/region_mean"):
            assert fused[name] == pytest.approx(own[name], rel=1e-4, abs=1e-5), name
        assert set(own) == set(fused)
    assert all(error(b, a) < 1e-4 for a, b in zip(*weights, strict=True))


def test_trl_same_loss_on_same_batch(tmp_path: Path) -> None:
    """Off-policy by a margin, so that both bounds are active, to 1e-5, gradients too."""
    trl = pytest.importorskip("trl")

    class Fused(FusedPolicyLoss, trl.GRPOTrainer):
        pass

    trainer = tiny_trainer(Fused, tmp_path, loss_type="grpo")
    trainer.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(8) < torch.tensor([8, 5, 1, 7])[:, None]).long()
    batch = {
        "prompt_ids": torch.randint(2, 63, (4, 3), generator=generator),
        "prompt_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.randint(2, 63, (4, 8), generator=generator),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.7, 0.3, -1.2]),
        "old_per_token_logps": -6 + 3 * torch.randn(4, 8, generator=generator),
        "tool_mask": (torch.rand(4, 8, generator=generator) < 0.8).long(),
    }
    results = []
    for loss_of in (trl.GRPOTrainer._compute_loss, Fused._compute_loss):
        trainer.model.zero_grad()
        loss = loss_of(trainer, trainer.model, batch)
        loss.backward()
        metrics = trainer._metrics["train"]
        results.append([loss.detach(), *(p.grad.clone() for p in trainer.model.parameters())])
    for own, fused in zip(*results, strict=True):
        assert error(fused, own) <= 1e-5
    for name, (own, fused) in metrics.items():
        assert fused == pytest.approx(own, abs=1e-5), name
    assert metrics["clip_ratio/low_mean"][0] > 0 < metrics["clip_ratio/high_mean"][0]


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_level": "sequence"},
        {"loss_type": "sapo"},
        {"top_entropy_quantile": 0.5},
    ],
)
def test_trl_settings_of_another_loss_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")

    class Fused(FusedPolicyLoss, trl.GRPOTrainer):
        pass

    with pytest.raises(ValueError, match=f"does not support {next(iter(settings))}"):
        tiny_trainer(Fused, tmp_path, **settings)


class VerlConfig(SimpleNamespace):
    """Attributes and `get`, as verl's configurations have them."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def verl_truth(batch: dict[str, Tensor], mode: str, config: VerlConfig) -> Tensor:
    """The contract, written down from verl's documentation: dual-clipped loss, then `mode`."""
    mask = batch["response_mask"].double()
    advantages, low = batch["advantages"], config.clip_ratio_low or config.clip_ratio
    log_ratio = (batch["log_prob"] - batch["old_log_prob"]).clamp(-20, 20)
    ratio = torch.where(mask > 0, log_ratio, 0).exp()
    clipped = ratio.clamp(1 - low, 1 + (config.clip_ratio_high or config.clip_ratio))
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    bounded = torch.minimum(losses, -advantages * config.get("clip_ratio_c", 3.0))
    losses = torch.where(advantages < 0, bounded, losses) * batch["rollout_is_weights"]
    info = config.global_batch_info
    sums, lengths = (losses * mask).sum(1), mask.sum(1)
    if mode == "token-mean":
        return sums.sum() / info.get("batch_num_tokens", mask.sum()) * info.get("dp_size", 1)
    if mode == "seq-mean-token-mean":
        sums = sums / (lengths + 1e-8)
    total = sums.sum() / info.get("global_batch_size", (lengths > 0).sum()) * info.get("dp_size", 1)
    if mode == "seq-mean-token-sum-norm":
        total = total / info.get("loss_scale_factor", mask.shape[1])
    return total


@pytest.mark.parametrize("mode", verl.AGGREGATIONS)
@pytest.mark.parametrize(
    "info",
    [{}, {"dp_size": 2, "batch_num_tokens": 99, "global_batch_size": 7, "loss_scale_factor": 5}],
    ids=["local", "global"],
)
def test_verl_contract(mode: str, info: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([6, 2, 0, 5])
    batch = {
        "old_log_prob": -2 + 0.1 * normal(4, 6),
        "log_prob": -2 + 0.8 * normal(4, 6),
        "advantages": normal(4, 6),
        "response_mask": (torch.arange(6) < lengths[:, None]).long(),
        "rollout_is_weights": normal(4, 6).abs(),
    }
    config = VerlConfig(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, clip_ratio_c=1.5,
        global_batch_info=info,
    )  # fmt: skip
    losses, gradients = [], []
    for fused in (False, True):
        given = {**batch, "log_prob": batch["log_prob"].clone().requires_grad_()}
        if fused:
            loss, metrics = verl.policy_loss(**given, loss_agg_mode=mode, config=config)
        else:
            loss = verl_truth(given, mode, config)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(given["log_prob"].grad)
    assert error(losses[1], losses[0]) <= 1e-5
    assert error(gradients[1], gradients[0]) <= 1e-5
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["actor/pg_clipfrac"] > 0 < metrics["actor/pg_clipfrac_lower"]


def test_verl_wrong_mode_and_missing_config_raise() -> None:
    zeros = [torch.zeros(1, 2)] * 4
    with pytest.raises(ValueError, match="actor configuration is needed"):
        verl.policy_loss(*zeros)
    config = VerlConfig(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={}
    )
    with pytest.raises(ValueError, match="'mean' is unknown"):
        verl.policy_loss(*zeros, loss_agg_mode="mean", config=config)


def padded_batch(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = (torch.arange(6) < torch.tensor([6, 2, 0, 5])[:, None]).to(torch.int64)
    return {
        "_input": normal(4, 6, 16).requires_grad_(),
        "lin_weight": normal(50, 16).requires_grad_(),
        "selected_token_ids": torch.randint(50, (4, 6), generator=generator),
        "attention_mask": mask,
        "advantages": torch.tensor([0.7, -0.3, 1.0, -1.1], dtype=dtype),
        "bias": normal(50).requires_grad_(),
        "old_per_token_logps": 2 * normal(4, 6) - 10,
    }


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_module_equals_the_formula(loss_type: str) -> None:
    batch, again = padded_batch(), padded_batch()
    module = LinearPolicyLoss(loss_type=loss_type, max_completion_length=9, temperature=0.9)
    loss, (clipped,) = module(**batch)
    loss.backward()
    logprob, _ = reference.linear_logprob(
        again["_input"].flatten(0, 1), again["lin_weight"], again["selected_token_ids"].flatten(),
        bias=again["bias"], temperature=0.9,
    )  # fmt: skip
    weights = token_weights(again["attention_mask"], loss_type, max_completion_length=9)
    signed = (weights * again["advantages"][:, None]).flatten()
    old = again["old_per_token_logps"].flatten()
    true = reference.policy_loss(logprob, old, signed.clamp_min(0), signed.clamp_max(0), 0.2, 0.2)
    true.backward()
    assert error(loss.detach(), true.detach()) <= 1e-7
    for name in ("_input", "lin_weight", "bias"):
        assert error(batch[name].grad, again[name].grad) <= 1e-7, name
    assert 0 < clipped < 1
    assert module.stats is not None and module.stats.tokens == 13


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("delta", [None, 1.3])
def test_module_stands_in_for_liger(loss_type: str, delta: float | None) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    batch, again = padded_batch(torch.float32), padded_batch(torch.float32)
    options = {"loss_type": loss_type, "max_completion_length": 9, "delta": delta}
    mine, (share,) = LinearPolicyLoss(**options)(**batch)
    theirs, (their_share,) = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, compiled=False, **options
    )(**again)
    mine.backward()
    theirs.backward()
    assert error(mine.detach(), theirs.detach()) <= 1e-5
    assert float(share) == pytest.approx(float(their_share))
    for name in ("_input", "lin_weight", "bias"):
        assert error(batch[name].grad, again[name].grad) <= 1e-5, name


def test_module_takes_bounds_and_advantages_per_token() -> None:
    batch = padded_batch()
    module = LinearPolicyLoss(loss_type="bnpo")
    loss, _ = module(**batch)
    per_token = {**batch, "advantages": batch["advantages"][:, None].expand(4, 6)}
    same, _ = module(**per_token, eps_high=torch.full((4, 6), 0.2, dtype=torch.float64))
    wider, _ = module(**per_token, eps_high=torch.full((4, 6), 9.0))
    assert same == loss != wider


def test_module_refuses_what_it_does_not_compute() -> None:
    with pytest.raises(ValueError, match="no KL term"):
        LinearPolicyLoss()(**padded_batch(), ref_per_token_logps=torch.zeros(4, 6))
    with pytest.raises(ValueError, match="'cispo' is unknown"):
        LinearPolicyLoss(loss_type="cispo")
    with pytest.raises(ValueError, match="max_completion_length"):
        LinearPolicyLoss(loss_type="dr_grpo")(**padded_batch())


def test_primitive_agrees_with_module_logprobs() -> None:
    """A log-prob is never positive, whatever the head."""
    batch = padded_batch(torch.float32)
    weight = batch["lin_weight"].detach() * 100
    values = linear_logprob(
        batch["_input"].detach().flatten(0, 1), weight, batch["selected_token_ids"].flatten()
    )
    assert values.max() <= 0 and math.isfinite(float(values.sum()))
