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
from elpo_fast.tree import io


def records_of(run: Path, *phases: str) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["phase"] in phases]


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
    assert "Of 12 s in all: decode 6 s (50%), backward 2 s (15%), tool 2 s (12%), " in text
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
    records = records_of(run, "rl")
    for record in records[1:]:
        record["malformed_calls"] = 40
    write(run, records)
    text = write_report(run)[0].read_text()
    assert "2 of 3 steps, the last one 3: 40 of 100 tool calls cannot be read" in text
    assert '<a href="trees.html">' in text


@pytest.mark.parametrize(
    ("phase", "shown"),
    [("sft", "Fine-tuning on demonstrations"), ("eval", "Success")],
)
def test_runs_that_lack_parts_have_a_report(run: Path, phase: str, shown: str):
    shutil.rmtree(run / "trees")
    write(run, records_of(run, phase))
    assert titles(write_report(run)[0]) == [shown]


def test_a_run_without_trees_has_the_other_plots(run: Path):
    records = records_of(run, "rl")
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
