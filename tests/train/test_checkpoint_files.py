"""Checkpoints: everything comes back, a half-written one is never seen, damage is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from elpo_fast.config import ModelConfig
from elpo_fast.model.load import load_model
from elpo_fast.train import adamw, checkpoint
from elpo_fast.train.checkpoint import (
    MANIFEST,
    STATE,
    CheckpointError,
    Checkpoints,
    TrainState,
    checkpoint_of,
    latest,
    load_checkpoint,
)
from elpo_fast.train.parallel import Ranks
from elpo_fast.train.step import PolicyOptimizer

TEXTS = ["add 12 to the balance\n"] * 10
SMALL = {
    "name": "scratch",
    "device": "cpu",
    "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16},
}


def make_policy(seed: int = 0, **options: Any) -> PolicyOptimizer:
    config = ModelConfig.model_validate(SMALL)
    model = load_model(config, seed=seed, tokenizer_texts=TEXTS).model
    return PolicyOptimizer(model, lr=1e-3, **options)


def move(policy: PolicyOptimizer) -> None:
    """An update, as far as weights and moments are concerned."""
    for parameter in policy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adamw.step(policy._optimizer, 1e-3)
    policy._optimizer.zero_grad()
    policy.updates += 1
    policy.refresh()


@pytest.fixture(scope="module")
def policy() -> PolicyOptimizer:
    made = make_policy()
    move(made)
    return made


def state_of(step: int) -> TrainState:
    extra = {"best": 0.5, "phases": ["sft", "rl"]}
    return TrainState(step, weight_version=step + 1, data_position=8 * step, extra=extra)


def save(run: Path, policy: PolicyOptimizer, step: int, keep: int = 2) -> Path:
    with closing(Checkpoints(run, keep)) as checkpoints:
        checkpoints.save(state_of(step), policy)
    return checkpoint_of(run, step)


def contents(policy: PolicyOptimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_everything_comes_back(policy: PolicyOptimizer, tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    path = save(tmp_path, policy, step=7)
    drawn = (random.random(), np.random.rand(), torch.rand(3))
    assert latest(tmp_path) == path

    restored = make_policy(seed=9, dtype=torch.bfloat16)
    state = load_checkpoint(path, restored)
    again = (random.random(), np.random.rand(), torch.rand(3))
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])
    assert (state.step, state.weight_version, state.data_position) == (7, 8, 56)
    assert state.extra == {"best": 0.5, "phases": ["sft", "rl"]}
    assert restored.updates == 1
    assert_same(contents(restored), contents(policy))
    assert len(contents(policy)) == 4 * len(list(policy.model.parameters()))
    masters, copies = restored.model.parameters(), restored.compute.parameters()
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(masters, copies, strict=True))


def test_fresh_moments_come_back_as_fresh(policy: PolicyOptimizer, tmp_path: Path) -> None:
    fresh, restored = make_policy(), make_policy(seed=3)
    path = save(tmp_path, fresh, step=0)
    move(restored)
    load_checkpoint(path, restored)
    assert_same(contents(restored), contents(fresh))
    for one in (fresh, restored):
        move(one)
    assert_same(contents(restored), contents(fresh))


def test_training_goes_on_while_the_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, restored = make_policy(), make_policy()
    move(policy)
    go_on, real = threading.Event(), checkpoint.dcp.save

    def slow(*arguments: Any, **options: Any) -> Any:
        assert go_on.wait(20)
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", slow)
    before = contents(policy)
    with closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        random.seed(1)
        checkpoints.save(state_of(1), policy)
        expected = random.random()
        checkpoints.check()
        move(policy)
        assert latest(tmp_path) is None
        go_on.set()
        checkpoints.save(state_of(2), policy)  # waits for the first
        assert latest(tmp_path) == checkpoint_of(tmp_path, 1)
    load_checkpoint(checkpoint_of(tmp_path, 1), restored)
    assert random.random() == expected
    assert_same(contents(restored), before)
    load_checkpoint(checkpoint_of(tmp_path, 2), restored)
    assert_same(contents(restored), contents(policy))


def test_only_the_last_are_kept_in_order_of_steps(policy: PolicyOptimizer, tmp_path: Path) -> None:
    paths = [save(tmp_path, policy, step=step) for step in (9, 10, 100)]
    assert sorted((tmp_path / "checkpoints").iterdir()) == paths[1:]
    assert latest(tmp_path) == paths[2]


def test_saving_a_step_again_replaces_it(policy: PolicyOptimizer, tmp_path: Path) -> None:
    random.seed(1)
    save(tmp_path, policy, step=4)
    random.seed(2)
    path = save(tmp_path, policy, step=4)
    expected = random.random()
    assert list((tmp_path / "checkpoints").iterdir()) == [path]
    load_checkpoint(path, make_policy())
    assert random.random() == expected


def test_a_step_without_checkpoint_is_refused_with_those_there_are(
    policy: PolicyOptimizer, tmp_path: Path
) -> None:
    with pytest.raises(LookupError, match="has no checkpoint yet"):
        checkpoint_of(tmp_path)
    save(tmp_path, policy, step=3), save(tmp_path, policy, step=9)
    with pytest.raises(LookupError, match="no checkpoint of step 4; steps: 3, 9"):
        checkpoint_of(tmp_path, 4)


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes.txt").touch()
    assert latest(tmp_path) is None, "a folder without a manifest is not a checkpoint"


def save_alone(run: Path, policy: PolicyOptimizer) -> None:
    """In a fork: OpenMP's other threads stayed behind, and waiting for them would be for ever."""
    torch.set_num_threads(1)
    save(run, policy, step=2)


@pytest.mark.parametrize(
    "function, before",
    [
        ("torch.save", lambda *_: None),  # weights and moments are written, generators are not
        ("_fingerprint", lambda *_: None),  # the manifest is not
        ("_fingerprint", lambda file: os.truncate(file, 3)),
        ("_complete", lambda *_: None),  # renamed, old ones not deleted
    ],
    ids=["after-weights", "before-manifest", "truncated", "before-rotation"],
)
def test_killed_while_writing(
    policy: PolicyOptimizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    before: Callable[..., None],
) -> None:
    good = save(tmp_path, policy, step=1)

    def deadly(*arguments: object) -> None:
        before(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(f"elpo_fast.train.checkpoint.{function}", deadly)
        writer = multiprocessing.get_context("fork").Process(
            target=save_alone, args=(tmp_path, policy)
        )
        writer.start()
        writer.join()
    assert writer.exitcode == -signal.SIGKILL
    leftovers = [path for path in (tmp_path / "checkpoints").iterdir() if path != good]
    assert len(leftovers) == 1
    assert latest(tmp_path) == (leftovers[0] if function == "_complete" else good)
    load_checkpoint(good, policy)
    new = save(tmp_path, policy, step=2)
    assert sorted((tmp_path / "checkpoints").iterdir()) == [good, new]


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["files"]
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: flip_byte(path / STATE / "__0_0.distcp"), "distcp is not what was written"),
        (lambda path: flip_byte(path / "rng-0.pt"), "rng-0.pt is not what was written"),
        (lambda path: os.truncate(path / STATE / ".metadata", 10), "is not what was written"),
        (lambda path: (path / "rng-0.pt").unlink(), "FileNotFoundError"),
        (lambda path: (path / MANIFEST).unlink(), "FileNotFoundError"),
        (lambda path: (path / MANIFEST).write_text("{"), "JSONDecodeError"),
        (lambda path: (path / MANIFEST).write_text("[]"), "not a readable checkpoint"),
        (edit_manifest, "KeyError"),
    ],
    ids=["weights", "generators", "cut", "missing", "no-manifest", "json", "list", "no-files"],
)
def test_damage_is_one_clear_line_and_leaves_generators_alone(
    policy: PolicyOptimizer, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = save(tmp_path, policy, step=1)
    damage(path)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    restored = make_policy()
    before = contents(restored)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, restored)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(contents(restored), before)


def test_a_checkpoint_of_another_format_is_named_with_the_remedy(
    policy: PolicyOptimizer, tmp_path: Path
) -> None:
    path = save(tmp_path, policy, step=1)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["format"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"older format, .*model.name=.*step-00000001"):
        load_checkpoint(path, policy)


def test_unwritable_folder_is_one_clear_line(policy: PolicyOptimizer, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write checkpoint") as caught:
        save(tmp_path, policy, step=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "function, error",
    [
        ("force_to_disk", OSError(28, "No space left on device")),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing:\nfull")),
        ("dcp.filesystem.os.fsync", OSError(28, "No space left on device")),
    ],
    ids=["system", "torch", "distributed"],
)
def test_full_disk_leaves_the_last_checkpoint(
    policy: PolicyOptimizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: Exception,
) -> None:
    good = save(tmp_path, policy, step=1)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"elpo_fast.train.checkpoint.{function}", full)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state_of(2), policy)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*(full|space)") as caught:
        for _ in range(500):  # as the loop does between its steps
            checkpoints.check()
            time.sleep(0.02)
    checkpoints.close()
    assert "\n" not in str(caught.value)
    assert latest(tmp_path) == good


def test_the_thread_uses_the_gpu_of_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda gpu: used.append((gpu, threading.current_thread().name))
    )
    ranks = Ranks(rank=3, size=4, mesh=SimpleNamespace(device_type="cuda"))  # type: ignore[arg-type]
    with closing(Checkpoints(tmp_path, keep=1, ranks=ranks)) as checkpoints:
        checkpoints._thread.submit(int).result()
    assert used == [(3, "checkpoint_0")]
