"""Where the time of a run's steps went."""

from __future__ import annotations

import gzip
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from elpo_fast.cli import main
from elpo_fast.config import Config, dump_config, parse_config
from elpo_fast.regions import CLOCK, REGIONS, Clock, Event
from elpo_fast.report.profile_view import read_profile
from elpo_fast.tasks.ledger import Ledger
from elpo_fast.train import loop
from elpo_fast.train.marks import CudaMarks
from elpo_fast.train.profile import TURN
from elpo_fast.train.summary import read_metrics, reproducible
from elpo_fast.train.trace import device_events, write_trace

ROOT = Path(__file__).parents[2]


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


async def by_length(self: Any, task: Any, messages: Any, end: Any) -> Any:
    """A verdict of an answer's length: an untrained model never succeeds, and then learns of
    nothing."""
    return self.options.verdict(len(messages[-1]["content"]) % 2 == 0, end.value)


@pytest.fixture(autouse=True)
def random_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "grade", by_length)


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


def as_file(config: Config, folder: Path) -> Path:
    file = folder / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    return file


def trained(config: Config) -> Path:
    return loop.train(config, console=Console(file=io.StringIO(), width=100))


def regions_cover(records: list[dict[str, Any]]) -> None:
    """The named regions are 97 % of a step: of the best one, since on a busy machine a thread that
    waits for a core waits between two regions as well. What is in no region would be in no step."""
    shares = []
    for record in records:
        times = {k.removeprefix("time/"): v for k, v in record.items() if k.startswith("time/")}
        named = sum(value for key, value in times.items() if key in REGIONS)
        assert times["other"] == pytest.approx(times["step"] - named)
        shares.append(named / times["step"])
    assert 0.97 <= max(shares) <= 1 + 1e-9, shares


def test_the_regions_of_a_step_add_up(tmp_path: Path) -> None:
    run = trained(make_config(tmp_path))
    records = [record for record in read_metrics(run) if record["phase"] == "rl"]
    regions_cover(records[1:])  # the first one compiles
    for record in records[1:]:
        times = {key: value for key, value in record.items() if key.startswith("time/")}
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
    run = trained(make_config(tmp_path, **apart, steps=6))
    regions_cover([record for record in read_metrics(run) if record["phase"] == "rl"][1:])


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder of `elpo profile`, and what it printed."""
    folder = tmp_path_factory.mktemp("profiled")
    config = as_file(make_config(folder), folder)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(Ledger, "grade", by_length)
        patch.setenv("COLUMNS", "160")
        assert main(["profile", str(config), "--steps", "2", "train.overlap=0"]) == 0
    return folder / "run-profile", printed.getvalue()


def test_a_profile_says_where_the_time_goes(profiled: tuple[Path, str]) -> None:
    run, printed = profiled
    profile = read_profile(run)
    assert [step["step"] for step in profile["steps"]] == [2, 3], "the first one compiles"
    shares = [
        sum(region["seconds"] for region in step["regions"].values()) / step["seconds"]
        for step in profile["steps"]
    ]
    assert 0.97 <= max(shares) <= 1 + 1e-9, shares
    for step in profile["steps"]:
        for name in ("prefill", "decode", "forward", "backward", "optimizer", "tool"):
            assert step["regions"][name]["floor"] > 0, name
    assert profile["machine"]["cores"] and profile["versions"]["torch"]
    assert min(profile["limits"].values()) > 0
    for said in ("decode", "floor", "GFLOP/s", "the bottleneck is", "ui.perfetto.dev"):
        assert said in printed
    assert set(TURN) == set(REGIONS)


def test_a_trace_has_a_track_for_each_who_works_and_a_span_for_each_call(
    profiled: tuple[Path, str],
) -> None:
    run, _ = profiled
    trace = json.loads(gzip.decompress((run / "profile" / "trace.json.gz").read_bytes()))
    tracks = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"
              and e["name"] == "thread_name"}  # fmt: skip
    assert {"steps", "trainer", "engine", "collector", "tools", "trajectories"} <= {
        name.partition(" ")[0] for name in tracks.values()
    }
    spans: dict[str, list[dict[str, Any]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            spans.setdefault(tracks[event["tid"]], []).append(event)

    def all_of(track: str) -> list[dict[str, Any]]:
        return [e for name, events in spans.items() if name.startswith(track) for e in events]

    records = [record for record in read_metrics(run) if record["phase"] == "rl"][1:]
    calls = [event for event in all_of("tools") if event["name"] == "tool"]
    calls = [event for event in calls if event["args"]["detail"] != "open"]
    assert len(calls) == sum(record["tool_runs"] for record in records)
    assert len(all_of("trajectories")) == sum(record["trajectories"] for record in records)
    assert {"forward", "loss", "backward", "optimizer", "packing"} <= {
        event["name"] for event in all_of("trainer")
    }
    assert {"decode", "decode+prefill", "sampling"} <= {e["name"] for e in all_of("engine")}
    assert [event["name"] for event in all_of("steps")] == ["step 2", "step 3"]
    for name, events in spans.items():  # spans of one lane lie within each other or apart
        open_until: list[float] = []
        for event in events:
            while open_until and open_until[-1] <= event["ts"] + 0.002:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1] + 0.002, name
            assert not (open_until and name.startswith(("tools", "trajectories"))), name
            open_until.append(end)


def test_two_profiles_are_compared(
    profiled: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = profiled
    slower = json.loads((run / "profile" / "profile.json").read_text())
    for step in slower["steps"]:
        step["regions"]["backward"]["seconds"] *= 3
    (tmp_path / "profile.json").write_text(json.dumps(slower))
    assert main(["profile", "--compare", str(run), str(tmp_path)]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    ratios = {row[1].strip(): row[4].strip() for row in rows if len(row) > 4}
    assert ratios["backward"] == "3.00" and ratios["forward"] == "1.00"
    assert main(["profile", "--compare", str(run), str(tmp_path / "none")]) == 2
    assert "no profile at" in capsys.readouterr().err


def test_steps_of_a_long_run_are_profiled_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(make_config(tmp_path, profile={"steps": [2, 9]}))
    assert [step["step"] for step in read_profile(run)["steps"]] == [2]
    assert CLOCK.events is None
    assert main(["profile", str(run)]) == 0
    assert "step 2" in capsys.readouterr().out


def test_what_cannot_be_profiled_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["profile"], ["profile", "configs/tiny.yaml", "--steps", "0"]):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_kernels_of_a_gpu_get_a_track_a_stream(tmp_path: Path) -> None:
    recorded = ROOT / "bench" / "results" / "h200" / "loss_trace.json.gz"
    found, waits = device_events(json.loads(gzip.decompress(recorded.read_bytes())))
    assert len(found) == 399 + 98 + 5 and waits > 0
    host = [Event("loss", "trainer", found[0].began, found[-1].ended, "", {})]
    write_trace([*found, *host], tmp_path / "trace.json.gz")
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert names == ["trainer", "gpu stream 7"]
