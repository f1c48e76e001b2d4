"""A run that was stopped, anywhere, and resumed equals one that never stopped: bitwise."""

from __future__ import annotations

import io
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from elpo_fast.config import Config, ConfigError, parse_config
from elpo_fast.tasks.ledger import Ledger
from elpo_fast.train import checkpoint, loop
from elpo_fast.train.checkpoint import CheckpointError, Checkpoints, latest
from elpo_fast.train.summary import read_metrics, reproducible
from elpo_fast.tree import io as tree_io

ROOT = Path(__file__).parents[2]
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "overlap": {"overlap": True},
}


def make_config(folder: Path, *, dtype: str = "float32", overlap: bool = False) -> Config:
    apart = {"overlap": 1, "old_logprob": "recompute", "importance_sampling": "token"}
    return parse_config(
        {
            "run": {"dir": str(folder), "threads": 1},
            "model": {
                "name": "scratch",
                "dtype": dtype,
                "scratch": {
                    "hidden_size": 64,
                    "layers": 2,
                    "heads": 2,
                    "kv_heads": 1,
                    "intermediate_size": 128,
                },
            },
            "task": {"options": {"steps": 4, "level": 1}, "system": "Go.", "seed": 0},
            "rollout": {
                "call_format": "code",
                "max_turn_tokens": 16,
                "max_tokens": 300,
                "max_batch": 8,  # fewer than ask: what is computed together depends on the moment
            },
            "algo": {"n_total": 6},
            "sft": {"demonstrations": 4, "batch": 2, "lr": 1e-3},
            "train": {
                "steps": 5,
                "tasks_per_step": 4,
                "updates_per_step": 2,
                "lr": 1e-3,
                "checkpoint_every": 2,
                **(apart if overlap else {}),
            },
            "eval": {"tasks": 4, "every": 2},
        }
    )


@pytest.fixture(autouse=True)
def lucky(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never succeeds; verdicts by the answer's length give it gradients, and
    demonstrations are right all the same."""
    real = Ledger.grade

    async def grade(self: Any, task: Any, messages: Any, end: Any) -> Any:
        verdict = await real(self, task, messages, end)
        even = len(messages[-1]["content"]) % 2 == 0
        return verdict if verdict.correct else self.options.verdict(even, verdict.reason)

    monkeypatch.setattr(Ledger, "grade", grade)


def train(config: Config, *, resume: bool = False) -> Path:
    return loop.train(config, resume=resume, console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def whole(case: str, runs: dict[str, Path], folder: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of a case, made once."""
    if case not in runs:
        runs[case] = train(make_config(folder.mktemp("whole"), **CASES[case]))
    return runs[case]


def assert_equal(run: Path, expected: Path) -> None:
    ours, theirs = (reproducible(read_metrics(path)) for path in (run, expected))
    assert ours == theirs
    assert sum(record["updates"] for record in ours if record["phase"] == "rl") > 5
    for file in sorted((expected / "trees").iterdir()):
        mine, its = tree_io.load(run / "trees" / file.name), tree_io.load(file)
        assert mine.task_ids == its.task_ids
        assert (mine.token_ids == its.token_ids).all() and (mine.logprob == its.logprob).all()
    weights, same = (load_file(path / "model" / "model.safetensors") for path in (run, expected))
    assert all(torch.equal(weights[name], same[name]) for name in same)


@pytest.mark.parametrize("case", CASES)
def test_two_runs_are_equal(
    case: str,
    uninterrupted: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    again = train(make_config(tmp_path, **CASES[case]))
    assert_equal(again, whole(case, uninterrupted, tmp_path_factory))


@pytest.mark.parametrize(
    ("case", "owner", "name", "step"),
    [
        ("float32", loop._Run, "cold_start", None),
        ("float32", loop._Run, "collect", 1),  # the checkpoint of the start is the last
        ("float32", loop._Run, "update", 2),  # right after a checkpoint
        ("bfloat16", loop._Run, "update", 3),
        ("overlap", loop._Run, "update", 2),  # its trees are in the checkpoint
        ("overlap", loop._Run, "collect", 2),
        ("overlap", loop._Run, "update", 4),  # the last step has nobody to overlap with
        ("float32", loop, "export_model", None),
    ],
    ids=str,
)
def test_a_stopped_run_resumes_as_if_it_had_not(
    case: str,
    owner: Any,
    name: str,
    step: int | None,
    uninterrupted: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = whole(case, uninterrupted, tmp_path_factory)
    config = make_config(tmp_path, **CASES[case])
    real = getattr(owner, name)

    def crash(*arguments: Any, **options: Any) -> Any:
        if step is None or step in arguments:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, crash)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert_equal(train(config, resume=True), expected)


def test_a_resumed_run_draws_its_tasks_with_its_own_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (
        config.model_copy(update={"task": config.task.model_copy(update={"seed": None})})
        for config in (make_config(tmp_path / "whole"), make_config(tmp_path / "cut"))
    )
    expected = train(whole)
    secret = expected / "task_secret"
    assert len(secret.read_text()) == 64 and secret.stat().st_mode & 0o077 == 0

    def crash(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(secrets, "token_hex", secret.read_text)
        patched.setattr(loop._Run, "update", crash)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert_equal(train(cut, resume=True), expected)
    (cut.run_dir / "task_secret").unlink()
    with pytest.raises(ConfigError, match="its task_secret is gone"):
        train(cut, resume=True)


def test_a_checkpoint_that_cannot_be_written_stops_the_run_at_its_next_step(
    uninterrupted: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(tmp_path)
    real, bad = Checkpoints.check, "step-00000002"

    def full(paths: Iterable[Path]) -> None:
        if any(bad in str(path) for path in paths):
            raise OSError(28, "No space left on device")

    def check(self: Checkpoints) -> None:
        while self._writing is not None and not self._writing.done():
            time.sleep(0.01)
        real(self)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "force_to_disk", full)
        patched.setattr(Checkpoints, "check", check)  # however fast the next step comes
        with pytest.raises(CheckpointError, match=f"cannot write checkpoint .*{bad} .*No"):
            train(config)
    assert latest(config.run_dir) == config.run_dir / "checkpoints" / "step-00000000"
    assert [r["step"] for r in read_metrics(config.run_dir) if r["phase"] == "rl"] == [1, 2]
    run = train(config, resume=True)
    assert_equal(run, whole("float32", uninterrupted, tmp_path_factory))


def test_killed_in_every_phase() -> None:
    program = [sys.executable, "-m", "bench.kill_resume", "--kills=4", "--steps=16", "--overlap"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "src")])
    done = subprocess.run(
        program,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills: equal to the uninterrupted run" in done.stdout
