"""Checkpoints: everything comes back, a half-written one is never seen, damage is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from elpo_fast.config import ModelConfig
from elpo_fast.model.load import LoadedModel, load_model
from elpo_fast.train import checkpoint
from elpo_fast.train.checkpoint import (
    MANIFEST,
    CheckpointError,
    TrainState,
    latest,
    load_checkpoint,
    save_checkpoint,
)
from elpo_fast.train.step import PolicyOptimizer

TEXTS = ["add 12 to the balance\n"] * 10
SMALL = {
    "name": "scratch",
    "device": "cpu",
    "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16},
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    config = ModelConfig.model_validate(SMALL)
    return load_model(config, seed=0, tokenizer_texts=TEXTS)


def optimizer_state(loaded: LoadedModel) -> dict:
    optimizer = PolicyOptimizer(loaded.model, lr=1e-3)
    for parameter in loaded.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer._optimizer.step()
    optimizer._optimizer.zero_grad()
    return optimizer.state_dict()


def save(run: Path, loaded: LoadedModel, step: int, keep: int = 2) -> Path:
    state = TrainState(
        step=step,
        weight_version=step + 1,
        data_position=8 * step,
        optimizer=optimizer_state(loaded),
        extra={"best": 0.5, "phases": ["sft", "rl"]},
    )
    return save_checkpoint(run, state, loaded.model, loaded.tokenizer, keep=keep)


def test_everything_comes_back(loaded: LoadedModel, tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    path = save(tmp_path, loaded, step=7)
    drawn = (random.random(), np.random.rand(), torch.rand(3))
    assert latest(tmp_path) == path

    state = load_checkpoint(path)
    again = (random.random(), np.random.rand(), torch.rand(3))
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])
    assert (state.step, state.weight_version, state.data_position) == (7, 8, 56)
    assert state.extra == {"best": 0.5, "phases": ["sft", "rl"]}

    restored = load_model(ModelConfig(name=str(path), device="cpu"), seed=9)
    expected = loaded.model.state_dict()
    assert all(torch.equal(expected[name], t) for name, t in restored.model.state_dict().items())
    assert restored.tokenizer.encode(TEXTS[0]) == loaded.tokenizer.encode(TEXTS[0])
    optimizer = PolicyOptimizer(restored.model, lr=1e-3)
    optimizer.load_state_dict(state.optimizer)
    moments = optimizer.state_dict()["optimizer"]["state"]
    assert len(moments) == len(list(loaded.model.parameters()))
    assert all(torch.all(moment["exp_avg"] > 0) for moment in moments.values())


def test_folder_is_in_hugging_face_layout(loaded: LoadedModel, tmp_path: Path) -> None:
    path = save(tmp_path, loaded, step=1)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = AutoTokenizer.from_pretrained(path)(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded.model(ids).logits)


def test_only_the_last_are_kept_in_order_of_steps(loaded: LoadedModel, tmp_path: Path) -> None:
    paths = [save(tmp_path, loaded, step=step) for step in (9, 10, 100)]
    assert sorted((tmp_path / "checkpoints").iterdir()) == paths[1:]
    assert latest(tmp_path) == paths[2]


def test_saving_a_step_again_replaces_it(loaded: LoadedModel, tmp_path: Path) -> None:
    random.seed(1)
    save(tmp_path, loaded, step=4)
    random.seed(2)
    path = save(tmp_path, loaded, step=4)
    expected = random.random()
    assert list((tmp_path / "checkpoints").iterdir()) == [path]
    load_checkpoint(path)
    assert random.random() == expected


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes.txt").touch()
    assert latest(tmp_path) is None, "a folder without a manifest is not a checkpoint"


def save_alone(run: Path, loaded: LoadedModel) -> None:
    """In a fork: OpenMP's other threads stayed behind, and waiting for them would be for ever."""
    torch.set_num_threads(1)
    save(run, loaded, step=2)


@pytest.mark.parametrize(
    "function, before",
    [
        ("_generator_states", lambda *_: None),  # weights are written, moments are not
        ("_fingerprint", lambda *_: None),  # the manifest is not
        ("_fingerprint", lambda file: os.truncate(file, 3)),
        ("_force_to_disk", lambda *_: None),  # all is written, nothing renamed
    ],
    ids=["after-weights", "before-manifest", "truncated", "before-rename"],
)
def test_killed_while_writing(
    loaded: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    before: Callable[..., None],
) -> None:
    good = save(tmp_path, loaded, step=1)

    def deadly(*arguments: object) -> None:
        before(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, function, deadly)
        writer = multiprocessing.get_context("fork").Process(
            target=save_alone, args=(tmp_path, loaded)
        )
        writer.start()
        writer.join()
    assert writer.exitcode == -signal.SIGKILL
    leftovers = [path for path in (tmp_path / "checkpoints").iterdir() if path != good]
    assert len(leftovers) == 1
    assert latest(tmp_path) == good
    load_checkpoint(good)
    new = save(tmp_path, loaded, step=2)
    assert sorted((tmp_path / "checkpoints").iterdir()) == [good, new]


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["step"]
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: flip_byte(path / "model.safetensors"), "model.safetensors is not what was"),
        (lambda path: flip_byte(path / "trainer.pt"), "trainer.pt is not what was written"),
        (lambda path: os.truncate(path / "model.safetensors", 10), "is not what was written"),
        (lambda path: (path / "trainer.pt").unlink(), "FileNotFoundError"),
        (lambda path: (path / MANIFEST).unlink(), "FileNotFoundError"),
        (lambda path: (path / MANIFEST).write_text("{"), "JSONDecodeError"),
        (lambda path: (path / MANIFEST).write_text("[]"), "not a readable checkpoint"),
        (edit_manifest, "KeyError"),
    ],
    ids=["weights", "moments", "cut", "no-moments", "no-manifest", "json", "list", "no-step"],
)
def test_damage_is_one_clear_line_and_leaves_generators_alone(
    loaded: LoadedModel, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = save(tmp_path, loaded, step=1)
    damage(path)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_unwritable_folder_is_one_clear_line(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write checkpoint") as caught:
        save(tmp_path, loaded, step=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "function, error",
    [
        ("_force_to_disk", OSError(28, "No space left on device")),
        ("_generator_states", RuntimeError("PytorchStreamWriter failed writing:\nfull")),
        ("quiet", SafetensorError("Error while serializing: I/O error")),
    ],
    ids=["system", "torch", "safetensors"],
)
def test_full_disk_leaves_the_last_checkpoint(
    loaded: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: Exception,
) -> None:
    good = save(tmp_path, loaded, step=1)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, function, full)
    with pytest.raises(CheckpointError, match="cannot write checkpoint") as caught:
        save(tmp_path, loaded, step=2)
    assert "\n" not in str(caught.value)
    assert latest(tmp_path) == good
