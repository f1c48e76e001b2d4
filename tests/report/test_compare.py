"""`elpo compare`: same tasks, evaluation and budget, once each, whatever stops it; its page."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from scipy import stats

from elpo_fast import cli
from elpo_fast.config import ConfigError
from elpo_fast.report import compare as module
from elpo_fast.report.compare import Run, compare, seeds_of
from elpo_fast.report.curves import Curve, Point, curve_of, estimate, write_page

ALGORITHMS = Path(__file__).parents[2] / "configs" / "algorithms"
FILES = [ALGORITHMS / "grpo.yaml", ALGORITHMS / "elpo.yaml"]


def task_file(folder: Path) -> Path:
    data = {
        "run": {"log": []},
        "model": {
            "name": "scratch",
            "dtype": "float32",
            "scratch": {
                "hidden_size": 32,
                "layers": 1,
                "heads": 2,
                "kv_heads": 1,
                "intermediate_size": 64,
            },
        },
        "task": {"options": {"steps": 4, "level": 1}, "system": "Go."},
        "tools": {"workers": 1},
        "rollout": {"call_format": "code", "max_turn_tokens": 12, "max_tokens": 300},
        "algo": {"n_total": 4},
        "sft": {"demonstrations": 2, "batch": 2, "lr": 1e-3},
        "train": {"steps": 2, "tasks_per_step": 2},
        "eval": {"tasks": 2, "every": 1},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def run(task: Path, out: Path, files: list[Path] = FILES, **changed: Any) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    settings = {"overrides": [], "seeds": [3], "jobs": 2} | changed
    failed = compare(task, files, out=out, console=console, **settings)
    return failed, console.file.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The comparison of two algorithms on two steps, run as a user does; but the runs after the
    cold start in this process, where everything is imported."""
    folder = tmp_path_factory.mktemp("compare")
    task, out = task_file(folder), folder / "out"
    one_by_one = Lock()

    def process(command: list[str], **streams: Any) -> Any:
        arguments = command[3:]
        if arguments[0] == "sft":
            return subprocess.run(command, **streams)
        with one_by_one:
            return subprocess.CompletedProcess(command, cli.main(arguments))

    options = ["--seeds", "3", "--jobs", "2", "--out", str(out), "train.lr=1e-3"]
    with pytest.MonkeyPatch.context() as patch:
        processes = SimpleNamespace(run=process, DEVNULL=subprocess.DEVNULL)
        patch.setattr(module, "subprocess", processes)
        code = cli.main(["compare", *map(str, [task, *FILES]), *options])
    assert code == 0, [log.read_text() for log in (out / "logs").iterdir()]
    return task, out


@pytest.fixture
def again(done: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it to spoil."""
    shutil.copytree(done[1], tmp_path / "out")
    return done[0], tmp_path / "out"


def records(out: Path, name: str) -> list[dict[str, Any]]:
    lines = (out / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_comparison_is_one_cold_start_and_a_run_for_each_algorithm(
    done: tuple[Path, Path],
) -> None:
    _, out = done
    assert {p.name for p in (out / "runs").iterdir()} == {"cold-seed3", "grpo-seed3", "elpo-seed3"}
    grpo, elpo = records(out, "grpo-seed3"), records(out, "elpo-seed3")
    for each in (grpo, elpo):
        assert [(r["phase"], r["step"]) for r in each] == [
            ("sft", 1),
            *(("eval", 0), ("rl", 1), ("eval", 1), ("rl", 2), ("eval", 2)),
        ]
        assert not list(out.glob("runs/*-seed3/checkpoints/rl*"))
    same = ("loss", "grad_norm", "seconds")
    assert [grpo[0][key] for key in same] == [elpo[0][key] for key in same], "learned once"
    assert grpo[1]["success"] == elpo[1]["success"]
    for name in ("compare.md", "compare.png", "compare.svg", "runs.csv", "evaluations.csv"):
        assert (out / name).stat().st_size > 50, name
    with (out / "runs.csv").open() as file:
        rows = {row["algorithm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["grpo", "elpo"]
    assert all(float(row["rollouts"]) == 2 * 2 * 4 for row in rows.values())
    page = (out / "compare.md").read_text()
    assert "| grpo | 1 |" in page and "| elpo | 1 |" in page


def test_what_is_finished_is_left_alone(
    again: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, out = again
    called: list[str] = []

    def fails(run: Run, _: str) -> bool:
        called.append(run.name)
        run.log.write_text("it said this\n\n")
        return False

    monkeypatch.setattr(module, "_call", fails)
    before = (out / "runs.csv").read_text()
    (out / "runs.csv").unlink()
    assert run(task, out, overrides=["train.lr=1e-3"])[0] == 0
    assert not called
    assert (out / "runs.csv").read_text() == before

    shutil.rmtree(out / "runs" / "elpo-seed3")
    failed, said = run(task, out, overrides=["train.lr=1e-3"])
    assert called == ["elpo-seed3"] and failed == 1
    assert "failed: elpo-seed3: it said this" in said and "1/" in said
    begun = out / "runs" / "elpo-seed3"
    assert (begun / "config.yaml").is_file() and list(begun.glob("checkpoints/sft*"))
    assert not (begun / "model").exists(), "it begins with its cold start and no more"
    assert "1 runs are not finished" in (out / "compare.md").read_text()


def test_a_broken_run_goes_on(again: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    task, out = again
    shutil.rmtree(out / "runs" / "grpo-seed3" / "model")
    asked: list[list[str]] = []

    def process(arguments: list[str], **_: Any) -> Any:
        asked.append(arguments)
        return type("Done", (), {"returncode": 1})

    monkeypatch.setattr(module.subprocess, "run", process)
    assert run(task, out, overrides=["train.lr=1e-3"])[0] == 1
    ((*_, command, settings, resume, allow),) = asked
    assert (command, resume, allow) == ("train", "--resume", "--allow-change")
    assert settings == str(out / "configs" / "grpo-seed3.yaml")


def test_other_settings_are_another_comparison(again: tuple[Path, Path]) -> None:
    task, out = again
    with pytest.raises(ConfigError, match=r"holds another comparison: .*train.lr was 0.001"):
        run(task, out, overrides=["train.lr=1e-2"])


def test_a_failed_cold_start_fails_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_call", lambda run, _: bool(run.log.touch()))
    failed, said = run(task_file(tmp_path), tmp_path / "out", seeds=[0, 1])
    assert failed == 6
    assert said.count("its cold start failed") == 4
    assert not (tmp_path / "out" / "compare.md").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("algo: {n_total: 8}", "not compared at the same tasks and budget: algo.n_total was 4"),
        ("train: {steps: 8}", "train.steps was 2"),
        ("eval: {tasks: 8}", "eval.tasks was 2"),
        ("algo: {planner: entropy}", "initial=8 must be between"),
    ],
)
def test_unequal_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        run(task_file(tmp_path), tmp_path / "out", [FILES[0], file])
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'grpo' is taken"):
        run(task_file(tmp_path), tmp_path / "out", [FILES[0], FILES[0]])


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", [0]), ("0-2", [0, 1, 2]), ("5,1-2, 2", [5, 1, 2])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1;2"])
def test_faulty_seeds_are_one_line(text: str) -> None:
    with pytest.raises(LookupError, match="give numbers"):
        seeds_of(text)


def curve(algorithm: str, seed: int, *success: float) -> Curve:
    spent = ((step, 100.0 * step, 10.0 * step * (seed + 1), 2.0 * step) for step in range(9))
    return Curve(
        algorithm, seed, tuple(Point(*at, s) for at, s in zip(spent, success, strict=False))
    )


def test_the_area_is_the_mean_height() -> None:
    rising = curve("a", 0, 0.2, 0.4, 0.8)
    assert rising.area("rollouts", 200) == pytest.approx((0.3 + 0.6) / 2)
    assert rising.area("rollouts", 150) == pytest.approx((0.3 * 100 + 0.5 * 50) / 150)
    assert rising.area("tokens", 20) == pytest.approx(rising.area("seconds", 4))


def test_intervals_are_students() -> None:
    values = [0.1, 0.3, 0.35]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert estimate(values) == pytest.approx((0.25, low, high))
    assert np.isnan(estimate([0.5]).low)


def test_the_page_compares_seed_by_seed(tmp_path: Path) -> None:
    curves = [
        *(curve("base", seed, 0.1 * seed, 0.1 * seed) for seed in range(3)),
        *(curve("other", seed, 0.1 * seed, 0.1 * seed + 0.1) for seed in range(1, 3)),
    ]
    write_page(tmp_path, "small", curves, missing=1)
    page = (tmp_path / "compare.md").read_text()
    assert "| base | 3 | 10.0 | 10.0 (-14.8 to 34.8) | 10.0 (-14.8 to 34.8) |  | 100 |" in page
    assert "+5.0 (+5.0 to +5.0)" in page, "of each seed, not of the means"
    with (tmp_path / "evaluations.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 10
    first = (tmp_path / "compare.svg").read_bytes()
    write_page(tmp_path, "small", curves, missing=1)
    assert (tmp_path / "compare.svg").read_bytes() == first


def test_a_curve_counts_what_was_spent_before_each_evaluation(tmp_path: Path) -> None:
    def rl(step: int) -> dict[str, Any]:
        spent = {"trajectories": 8, "generated_tokens": 50, "time/collect": 2}
        return {"phase": "rl", "step": step, "time/train": 1, **spent}

    def evaluated(name: str, step: int, success: float) -> dict[str, Any]:
        return {"phase": "eval", "name": name, "step": step, "success": success}

    rows = [evaluated("before SFT", 0, 0.0), evaluated("after SFT", 0, 0.1), rl(1)]
    rows += [evaluated("during training", 1, 0.2), rl(2), evaluated("after RL", 2, 0.3)]
    file = tmp_path / "metrics.jsonl"
    assert curve_of(tmp_path, "a", 0, 2) is None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert curve_of(tmp_path, "a", 0, 2) is None, "not finished"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = curve_of(tmp_path, "a", 0, 2)
    assert found is not None
    assert found.points == (
        *(Point(0, 0, 0, 0, 0.1), Point(1, 8, 50, 3, 0.2), Point(2, 16, 100, 6, 0.3)),
    )


def test_names_of_runs_are_their_folders(tmp_path: Path) -> None:
    from elpo_fast.config import Config

    found = Run(tmp_path, "grpo", 2, Config())
    assert found.folder == tmp_path / "runs" / "grpo-seed2"
    assert not found.finished
