"""Adapters: what is trained, what engines are given, what is written, what is refused."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from elpo_fast.config import ConfigError, LoraConfig, ModelConfig, parse_config
from elpo_fast.model.load import load_model
from elpo_fast.model.lora import Merged, adapters, add_adapters, initialise, named_weights
from elpo_fast.train.export import export_model

TEXTS = ["<|im_start|>user\nadd 12 to 345, then say <answer>357</answer><|im_end|>\n"] * 20
LORA = {"rank": 3, "alpha": 6}


SCRATCH = {
    "name": "scratch",
    "device": "cpu",
    "scratch": {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1},
}


def plain() -> PreTrainedModel:
    config = ModelConfig.model_validate(SCRATCH)
    return load_model(config, seed=1, tokenizer_texts=TEXTS).model


def load(dtype: str = "float32", seed: int = 1, **options: Any) -> PreTrainedModel:
    config = ModelConfig.model_validate(SCRATCH | {"dtype": dtype, "lora": LORA})
    return load_model(config, seed=seed, tokenizer_texts=TEXTS, **options).model


def stirred(model: PreTrainedModel) -> PreTrainedModel:
    """Adapters as training might leave them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def untied(targets: str | list[str]) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=40, attention_bias=True, tie_word_embeddings=False, **sizes, **heads)
    )
    add_adapters(model, LoraConfig(targets=targets, **LORA))
    initialise(model, seed=0)
    return model


def test_fresh_adapters_are_the_base_model_in_its_dtype() -> None:
    loaded, base = load("bfloat16"), dict(plain().named_parameters())
    given = dict(named_weights(loaded))
    assert given.keys() == base.keys()
    for name, master in base.items():
        weight = given[name].full_tensor() if isinstance(given[name], Merged) else given[name]
        assert torch.equal(weight.bfloat16(), master.bfloat16()), name
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == adapters(loaded).keys()
    assert len(trained) == 2 * 2 * 7  # two factors of seven layers in each of two blocks
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_adapters_follow_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    first, again, other = (adapters(load(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert ("lora_A" in name) != torch.equal(parameter, other[name])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp.down_proj", "lm_head"]], ids=str)
def test_merged_weights_compute_what_the_adapters_do(targets: str | list[str]) -> None:
    model = stirred(untied(targets))
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = Qwen3ForCausalLM(model.config)
    given = dict(named_weights(model))
    assert given.keys() == dict(merged.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            assert given[name].shape == parameter.shape
            weight = given[name]
            parameter.copy_(weight.full_tensor() if isinstance(weight, Merged) else weight)
    ids = torch.arange(1, 12)[None]
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_saved_adapters_load_in_peft(tmp_path: Path) -> None:
    model = stirred(load())
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    ids = torch.arange(1, 12)[None]
    theirs = PeftModel.from_pretrained(plain(), tmp_path)
    torch.testing.assert_close(theirs(input_ids=ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_model_computes_what_the_adapted_one_does(dtype: str, tmp_path: Path) -> None:
    config = ModelConfig.model_validate(SCRATCH | {"dtype": dtype, "lora": LORA})
    loaded = load_model(config, seed=1, tokenizer_texts=TEXTS)
    model = stirred(loaded.model)
    export_model(tmp_path / "model", model, loaded.tokenizer)
    assert not list((tmp_path / "model").glob("adapter*"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert exported.dtype == torch.float32
    ids = torch.arange(1, 12)[None]
    logits = exported(ids).logits
    rough = {"float32": 1e-5, "bfloat16": 0.02}[dtype]
    torch.testing.assert_close(logits, model(ids).logits.float(), rtol=rough, atol=rough)
    torch.testing.assert_close(logits, model.float()(ids).logits, rtol=1e-5, atol=1e-5)
    assert (logits - plain()(ids).logits).abs().max() > 0.1


def test_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no linear layer 'qproj'; known: .*, q_proj"):
        untied(["k_proj", "qproj"])
    with pytest.raises(ConfigError, match="head is its embedding"):
        add_adapters(plain(), LoraConfig(targets=["lm_head"]))


def test_without_peft_a_sentence_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "peft":
            raise ImportError
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'elpo-fast\[lora\]'"):
        load()


def test_a_peft_too_old_for_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0.0")
    with pytest.raises(ConfigError, match=r"model.lora: .*use a version >= 99"):
        load()


def test_configuration_may_say_that_there_are_none() -> None:
    assert parse_config({"model": {"lora": None}}).model.lora is None
    assert parse_config({"model": {"lora": {}}}).model.lora == LoraConfig()
    with pytest.raises(ConfigError, match=r"model.lora.rnk; did you mean model.lora.rank"):
        parse_config({"model": {"lora": {"rnk": 3}}})
