"""What `elpo doctor` says of this machine, of the sandbox, of GPUs and of a model."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from elpo_kernels import widens_bfloat16

from elpo_fast.config import ConfigError, ModelConfig
from elpo_fast.model.load import LoadedModel, load_model
from elpo_fast.report import doctor
from elpo_fast.report.doctor_model import Memory, examined
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.tools.sandbox import Protection
from elpo_fast.train.step import PolicyOptimizer

SAFE = Protection("landlock", ("reads little", "limits"), ("bubblewrap: no [x]",), ("tells",))
TOKENS = 64


@pytest.fixture
def confined(monkeypatch) -> None:
    async def sandbox() -> Protection:
        return SAFE

    monkeypatch.setattr(doctor, "_sandbox", sandbox)
    monkeypatch.setattr(doctor, "_devices", list)


def tiny(**settings) -> LoadedModel:
    sizes = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 48}
    config = ModelConfig(name="scratch", scratch=sizes, **{"dtype": "float32", **settings})
    return load_model(config, seed=0, tokenizer_texts=["some words"])


@pytest.mark.parametrize(
    ("found", "broken", "lines"),
    [
        (SAFE, False, ["landlock", "+ reads little", "+ limits", "! tells", "- not bubblewrap"]),
        ("no safe way [here]", True, ["no safe way [here]"]),
    ],
    ids=["safe", "unsafe"],
)
def test_protection_and_what_keeps_from_the_better_one(
    monkeypatch, capsys, found, broken, lines
) -> None:
    async def sandbox() -> Protection | str:
        return found

    monkeypatch.setattr(doctor, "_sandbox", sandbox)
    monkeypatch.setattr(doctor, "_devices", list)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor.doctor() == broken
    printed = capsys.readouterr().out
    said = printed[printed.index("sandbox") :]
    assert all(line in said for line in lines)
    assert "apt-get install bubblewrap" in said


def test_neither_torch_nor_its_users_are_imported() -> None:
    """They take longer than everything else together."""
    heavy = "{'torch', 'transformers', 'numba', 'scipy', 'sympy', 'datasets', 'matplotlib'}"
    light = "{'pydantic', 'rich', 'numpy', 'yaml'}"
    code = (
        "import sys; from elpo_fast.cli import main, _parser\n"
        "_parser().format_help()\n"
        f"assert not ({heavy} | {light}) & set(sys.modules), 'for --help'\n"
        "from elpo_fast.report import doctor; doctor._devices = list\n"
        f"assert main(['doctor']) == 0 and not {heavy} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_dtype_is_the_one_that_kernels_would_choose() -> None:
    assert doctor._widens() == widens_bfloat16()
    assert torch.cuda.is_available() <= bool(doctor._devices())


def test_what_is_missing_comes_with_the_command_that_brings_it(
    confined, monkeypatch, capsys
) -> None:
    known = doctor._version
    gone = {"numba": None, "transformers": "4.0", "peft": None}
    monkeypatch.setattr(doctor, "_version", lambda name: gone.get(name, known(name)))
    assert doctor.doctor() == 1
    shown = " ".join(capsys.readouterr().out.split())
    needed = {each.partition(">")[0]: each for each in requires("elpo-fast") or ()}
    assert f"pip install '{needed['numba']}'" in shown
    assert f"transformers 4.0, and {needed['transformers']} is needed" in shown
    assert "pip install 'elpo-fast[lora]'" in shown and "[datasets]" not in shown


def test_on_a_gpu_sglang_is_the_engine(monkeypatch) -> None:
    def missing(_: None) -> str:
        raise ConfigError("install sglang")

    monkeypatch.setattr(doctor, "find_python", lambda _: "/its/python")
    there = doctor._rollouts(gpu=True)
    assert "rollout.engine=sglang" in there.text and "/its/python" in there.text
    assert there.brings is None
    monkeypatch.setattr(doctor, "find_python", missing)
    assert doctor._rollouts(gpu=True).brings == "install sglang"
    assert doctor._rollouts(gpu=False).text.startswith("local")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, {}], ids=["all weights", "LoRA"])
def test_memory_is_what_training_and_the_engine_take(dtype, lora) -> None:
    kind = getattr(torch, dtype)
    need = Memory.of(tiny().model, kind, TOKENS)
    loaded = tiny(dtype=dtype, lora=lora)
    policy = PolicyOptimizer(loaded.model, lr=0.0, dtype=kind)
    for parameter in policy._masters:
        parameter.grad = torch.zeros_like(parameter)
    policy._optimizer.step()
    moments = [m for state in policy._optimizer.state.values() for m in state.values() if m.dim()]
    weights = {id(p): p for model in (loaded.model, policy.compute) for p in model.parameters()}
    held = [*weights.values(), *(p.grad for p in policy._masters), *moments]
    assert need[0 if lora is None else 2] == sum(tensor.nbytes for tensor in held)
    if lora is None:
        engine = LocalEngine(loaded.model, loaded.tokenizer, cache_tokens=TOKENS, dtype=kind)
        assert need.cache == engine._decoder.keys.nbytes + engine._decoder.values.nbytes


def test_a_model_folder(tmp_path: Path) -> None:
    loaded = tiny()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    parts = {part.name: part for part in examined(str(tmp_path))}
    assert not any(part.broken for part in parts.values())
    assert parts["model"].text.startswith("Qwen3ForCausalLM")
    assert "set rollout.max_tokens to 1024 or less" in parts["context"].text
    assert parts["memory"].text.startswith("fits into")

    (tmp_path / "chat_template.jinja").unlink()
    (found,) = [part for part in examined(str(tmp_path)) if part.broken]
    assert found.name == "chat template" and found.brings == "model.chat_template=chatml"


@pytest.mark.parametrize("name", ["./no/such/folder", "scratch"])
def test_what_is_no_model(confined, capsys, name) -> None:
    assert doctor.doctor(name) == 1
    assert "model.name" in capsys.readouterr().out


def test_a_model_that_is_too_large(tmp_path: Path, monkeypatch) -> None:
    loaded = tiny()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    huge = Memory(training=1 << 60, in_8_bits=1 << 60, lora=1, weights=1, cache=1)
    monkeypatch.setattr(Memory, "of", staticmethod(lambda *_: huge))
    assert list(examined(str(tmp_path)))[-1].text == "fits with model.lora={}"
    monkeypatch.setattr(Memory, "of", staticmethod(lambda *_: huge._replace(lora=1 << 60)))
    last = list(examined(str(tmp_path)))[-1]
    assert last.broken and "parallel.shard" in str(last.brings)
