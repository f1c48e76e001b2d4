"""The tiny tier end to end, as a user runs it: it learns what it is shown and then by itself."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from elpo_fast.train.summary import read_metrics
from elpo_fast.tree import io

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(1800)
def test_tiny_tier_learns(tmp_path: Path) -> None:
    elpo = Path(sys.executable).with_name("elpo")
    runs = tmp_path / "runs"
    subprocess.run([elpo, "train", "configs/tiny.yaml", f"run.dir={runs}"], cwd=ROOT, check=True)
    run = runs / "tiny"
    records = read_metrics(run)
    success = {r["name"]: r["success"] for r in records if r["phase"] == "eval"}
    assert success["before SFT"] < 0.05
    assert success["after SFT"] < success["after ELPO"]  # typically by 20 points and more
    steps = [r for r in records if r["phase"] == "rl"]
    assert all(r["trajectories"] == 16 * 12 for r in steps)
    assert sum(r["searches"] for r in steps) > 100
    assert all(r["approx_kl"] >= 0 for r in steps if r["updates"])
    forest = io.load(run / "trees" / "step_000001.npz")
    deep = forest.tool_call[forest.critical_node].all()
    assert deep, "a critical step is a tool call"
    shown = subprocess.run(
        [elpo, "tree", "show", run],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "160"},
    ).stdout
    assert "irrecoverable" in shown

    tutorial = (ROOT / "docs/tutorial.md").read_text()
    look = tutorial.split("## Look before you read")[1].split("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in look.split("```")[1].splitlines()]
    for _, *words in filter(None, commands):
        subprocess.run([elpo, *words], cwd=tmp_path, check=True)
    assert all((run / page).stat().st_size for page in ("trees.html", "report.html"))
    assert (tmp_path / "evals/tiny").is_dir()
