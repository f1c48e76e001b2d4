"""A policy that says what it is told to say, and two steps of a run with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elpo_fast import cli
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.train.summary import read_metrics
from elpo_fast.tree import io
from elpo_fast.tree.store import Forest
from elpo_fast.types import Completion, Sampling


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], None]:
    """Makes the local engine draw its messages from these; one with a call ends there."""

    def speak(sayings: Sequence[str]) -> None:
        async def generate(
            self: LocalEngine, prefix_ids: Any, n: int, sampling: Sampling
        ) -> list[Completion]:
            rng = np.random.default_rng(sampling.seed)
            completions = []
            for text in rng.choice(list(sayings), n):
                ids = self._tokenizer(str(text), add_special_tokens=False).input_ids
                called = text.endswith("</tool_call>")
                ids = np.array(ids if called else [*ids, self._tokenizer.eos_token_id], np.int32)
                some = np.full(len(ids), -1, np.float32)
                finish = "stop_string" if called else "stop_token"
                completions.append(
                    Completion(ids, some, -some, finish, weight_version=self.weight_version)
                )
            return completions

        monkeypatch.setattr(LocalEngine, "generate", generate)

    return speak


@pytest.fixture
def two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[dict[str, Any]], list[Forest]]]:
    """Trains two steps on trees in `tmp_path`, whose modules can be imported; their metrics and
    trees."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def train(name: str, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Forest]]:
        tiny = {
            "run.name": name,
            "run.threads": 1,
            "model.name": "scratch",
            "model.dtype": "float32",
            "model.scratch": "{hidden_size: 32, layers: 1, heads: 2, kv_heads: 1, context: 4096}",
            "rollout.max_tokens": 4000,
            "algo.n_total": 6,
            "train.steps": 2,
            "train.tasks_per_step": 2,
            "train.lr": 1e-3,
            "eval.tasks": 1,
        }
        config = tmp_path / "run.yaml"
        config.write_text("run: {name: run}\n")
        pairs = [f"{key}={value}" for key, value in {**tiny, **settings}.items()]
        assert cli.main(["train", str(config), *pairs]) == 0
        steps = [each for each in read_metrics(Path("runs", name)) if each["phase"] == "rl"]
        assert [step["trajectories"] for step in steps] == [12, 12]
        assert all(step["faults"] == 0 < step["updates"] for step in steps)
        return steps, [io.load(path) for path in sorted(Path("runs", name, "trees").glob("*.npz"))]

    return train
