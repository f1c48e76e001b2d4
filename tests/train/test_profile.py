"""Where the time of a run's steps went."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from elpo_fast.config import Config, parse_config
from elpo_fast.regions import REGIONS, Clock
from elpo_fast.tasks.ledger import Ledger
from elpo_fast.train import loop
from elpo_fast.train.marks import CudaMarks
from elpo_fast.train.summary import read_metrics, reproducible


class FakeEvent:
    """A CUDA event; the device takes 250 ms between two of them."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.made += 1
        self.at = 250.0 * FakeEvent.made

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at - self.at


def test_a_gpu_says_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", ranges.pop)
    clock = Clock()
    clock.device = marks = CudaMarks()
    with clock.span("forward"), clock.span("loss"):
        assert ranges == ["forward", "loss"]
    with clock.span("decode"):  # the engine's
        pass
    with clock.span("backward"):
        pass
    assert marks.seconds() == {"forward": 0.5, "loss": 0.25, "backward": 0.25}
    assert marks.seconds() == {} and not ranges


@pytest.fixture(autouse=True)
def random_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never succeeds; verdicts by the answer's length give it gradients."""

    async def grade(self: Any, task: Any, messages: Any, end: Any) -> Any:
        return self.options.verdict(len(messages[-1]["content"]) % 2 == 0, end.value)

    monkeypatch.setattr(Ledger, "grade", grade)


def make_config(folder: Path, **train: Any) -> Config:
    return parse_config(
        {
            "run": {"dir": str(folder), "threads": 1},
            "model": {
                "name": "scratch",
                "dtype": "float32",
                "scratch": {
                    "hidden_size": 128,
                    "layers": 2,
                    "heads": 2,
                    "kv_heads": 1,
                    "intermediate_size": 256,
                },
            },
            "task": {"options": {"steps": 4, "level": 1}, "system": "Go.", "seed": 0},
            "tools": {"workers": 1},
            "rollout": {"call_format": "code", "max_turn_tokens": 16, "max_tokens": 300},
            "algo": {"n_total": 6},
            "train": {"steps": 3, "tasks_per_step": 4, "lr": 1e-3, "checkpoint_every": 1} | train,
            "eval": {"tasks": 0},
        }
    )


def trained(config: Config) -> Path:
    return loop.train(config, console=Console(file=io.StringIO(), width=100))


def test_the_regions_of_a_step_add_up(tmp_path: Path) -> None:
    run = trained(make_config(tmp_path))
    records = [record for record in read_metrics(run) if record["phase"] == "rl"]
    for record in records[1:]:  # the first one compiles
        times = {key: value for key, value in record.items() if key.startswith("time/")}
        named = sum(value for key, value in times.items() if key.removeprefix("time/") in REGIONS)
        assert 0.97 * times["time/step"] <= named <= times["time/step"] * (1 + 1e-9)
        assert times["time/other"] == pytest.approx(times["time/step"] - named)
        assert times["time/collect"] + times["time/train"] <= times["time/step"]
        for name in ("prefill", "decode", "sampling", "tool", "scoring", "packing", "forward"):
            assert times[f"time/{name}"] > 0, name
        for name in (
            "checkpoint",
            "loss",
            "backward",
            "optimizer",
            "weight_sync",
            "saving",
            "trees",
        ):
            assert times[f"time/{name}"] > 0, name
        assert "time/grading" in times, "which may be hidden"
        assert 0 < record["mfu"] < 1 and record["tokens_per_s"] > 0
        assert "device_idle" not in record, "there is no GPU"
        assert record["tokens/decode"] <= record["generated_tokens"]
        assert record["tokens/forward"] == record["tokens/backward"] == record["computed_tokens"]
    assert not any("/" in key for record in reproducible(records) for key in record)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"rl/time/decode", "rl/mfu", "rl/tokens_per_s"} <= set(events.Tags()["scalars"])


def test_with_overlap_what_the_update_hides_is_not_counted_twice(tmp_path: Path) -> None:
    apart = {"overlap": 1, "old_logprob": "recompute", "importance_sampling": "token"}
    run = trained(make_config(tmp_path, **apart))
    second = [record for record in read_metrics(run) if record["phase"] == "rl"][1]
    times = {key.removeprefix("time/"): v for key, v in second.items() if key.startswith("time/")}
    named = sum(value for key, value in times.items() if key in REGIONS)
    assert 0.97 * times["step"] <= named <= times["step"] * (1 + 1e-9)
