"""`elpo report`: what the page says of a run, and of runs that lack parts of one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from elpo_fast import cli
from elpo_fast.report.run_page import write_report
from elpo_fast.report.show import saved_steps
from elpo_fast.train.metrics import tree_metrics
from elpo_fast.tree import io

BEFORE = {"phase": "eval", "step": 0, "name": "after SFT", "success": 0.35, "low": 0.3}
AFTER = {"phase": "eval", "step": 3, "name": "after ELPO", "success": 0.69, "low": 0.64}
COLD = [{"phase": "sft", "step": step, "loss": 6.0 / step} for step in (1, 2, 3)]


def rl(run: Path, step: int) -> dict:
    """The record of a step, as training writes it."""
    forest = io.load(saved_steps(run)[step])
    counts = {"tool_runs": 100, "tool_errors": 7, "malformed_calls": 2, "faults": 0, "updates": 4}
    figures = {"grad_norm": 1.0, "approx_kl": 0.01 * step, "mismatch_mean": 0.002}
    seconds = {"seconds_collect": 3.0, "seconds_train": 1.0}
    return {"phase": "rl", "step": step, **tree_metrics(forest), **counts, **figures, **seconds}


@pytest.fixture
def run(thousand: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "trees").mkdir(parents=True)
    for step in (1, 2, 3):
        shutil.copy(saved_steps(thousand)[step], folder / "trees")
    config = "run: {name: mine}\nmodel: {name: a<b>}\ntrain: {steps: 8, lr: 3.0e-5}\n"
    (folder / "config.yaml").write_text(config)
    intervals = [{**each, "high": 0.75, "tasks": 300, "samples": 1} for each in (BEFORE, AFTER)]
    write(folder, [*COLD, intervals[0], *(rl(folder, step) for step in (1, 2, 3)), intervals[1]])
    return folder


def write(run: Path, records: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def titles(page: Path) -> list[str]:
    return re.findall("<figure><h2>(.*?)</h2><svg", page.read_text())


def test_a_report_tells_what_the_run_did(run: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report", str(run)]) == 0
    page = run / "report.html"
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert titles(page) == [
        "Success",
        "Where trajectories become irrecoverable",
        "How trajectories end",
        "Tool calls",
        "Time",
        "The policy",
        "Fine-tuning on demonstrations",
    ]
    text = page.read_text()
    assert "model a&lt;b&gt;" in text and "a<b>" not in text
    assert "3 of 8 steps" in text
    assert "<b>69.0%</b></td><td>64.0% – 75.0%</td>" in text
    forests = [io.load(file) for file in saved_steps(run).values()]
    found = sum(int(forest.critical_localized.sum()) for forest in forests)
    searches = sum(len(forest.critical_node) for forest in forests)
    assert f"{found} of {searches}, {searches - found} searches were ended" in text
    assert "300 calls in all, 6 of them could not be read" in text
    assert "Of 12 s in all: collect 9 s (75%), train 3 s (25%)." in text
    assert "<td>train.lr</td><td><code>3e-05</code></td>" in text
    assert "<td>train.steps</td>" in text and "<td>algo.n_total</td>" not in text
    assert not re.search(r"<script|<link|<img|src=|@import|<!DOCTYPE svg", text)


def test_the_same_run_has_the_same_report(run: Path):
    write_report(run)
    first = (run / "report.html").read_bytes()
    write_report(run)
    assert (run / "report.html").read_bytes() == first


def test_plots_are_files_on_demand(run: Path, tmp_path: Path):
    page, *plots = write_report(run, tmp_path / "page.html", plots="png")
    assert page == tmp_path / "page.html" and len(plots) == 7
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert plots[0] == tmp_path / "page_learning.png"
    assert write_report(run, plots="svg")[1].read_text().lstrip().startswith("<?xml")


def test_what_went_wrong_is_said_in_words(run: Path):
    (run / "trees.html").touch()
    records = [rl(run, step) for step in (1, 2, 3)]
    for record in records[1:]:
        record["malformed_calls"] = 40
    write(run, records)
    text = write_report(run)[0].read_text()
    assert "2 of 3 steps, the last one 3: 40 of 100 tool calls cannot be read" in text
    assert '<a href="trees.html">' in text


@pytest.mark.parametrize(
    ("records", "shown"),
    [
        (COLD, ["Fine-tuning on demonstrations"]),
        ([{**BEFORE, "high": 0.4, "tasks": 9, "samples": 1}], ["Success"]),
    ],
    ids=["fine-tuning alone", "evaluation alone"],
)
def test_runs_that_lack_parts_have_a_report(run: Path, records: list[dict], shown: list[str]):
    shutil.rmtree(run / "trees")
    write(run, records)
    assert titles(write_report(run)[0]) == shown


def test_a_run_without_trees_has_the_other_plots(run: Path):
    records = [rl(run, step) for step in (1, 2)]
    shutil.rmtree(run / "trees")
    write(run, records)
    shown = titles(write_report(run)[0])
    assert shown == ["Success", "How trajectories end", "Tool calls", "Time", "The policy"]


def test_faults_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report", "nowhere"]) == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err
    write(run, [])
    assert cli.main(["report", str(run)]) == 2
    assert "has no metrics yet" in capsys.readouterr().err
