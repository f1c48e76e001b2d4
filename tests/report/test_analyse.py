"""`elpo analyse`: each question on a saved fixture of trees or few scripted policies."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elpo_fast.algo.bel import BelPlanner
from elpo_fast.algo.bel_bayes import posterior
from elpo_fast.cli import _OF_SCRIPTS, _OF_TREES, main
from elpo_fast.report.saved import SAVED, forests_of
from elpo_fast.report.simulated import SIMULATED, agreement, localization, sensitivity
from elpo_fast.tree import io
from elpo_fast.tree.store import Forest

from ..algo.world import World, play

TREES = Path(__file__).parents[2] / "bench" / "data" / "quickstart_step5.npz"


def table(page: Path) -> list[dict[str, str]]:
    with page.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two steps' trees, those of a recorded run."""
    (tmp_path / "run" / "trees").mkdir(parents=True)
    for step in (3, 12):
        shutil.copy(TREES, tmp_path / "run" / "trees" / f"step_{step:06d}.npz")
    return tmp_path / "run"


def test_every_analysis_has_a_command() -> None:
    assert list(SAVED) == list(_OF_TREES)
    assert list(SIMULATED) == list(_OF_SCRIPTS)


@pytest.mark.parametrize("kind", [*_OF_TREES, *_OF_SCRIPTS])
def test_each_is_a_table_and_a_plot(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = [str(run)] if kind in _OF_TREES else ["--policies", "10"]
    assert main(["analyse", kind, *of, "--out", str(tmp_path / "out")]) == 0
    page = tmp_path / "out" / f"{kind}.md"
    assert capsys.readouterr().out == f"wrote {page}\n"
    rows = table(page)
    lines = page.read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + len(rows) > 1
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in page.with_suffix(".svg").read_text()


@pytest.fixture
def world() -> tuple[World, BelPlanner, dict[int, Forest]]:
    """A tree of noiseless probes and its searches."""
    planner = BelPlanner(30, 2, 1, 3, 5.0)
    world = World(7, max_calls=8)
    play(planner, world, np.random.default_rng(0))
    for critical in planner.critical:
        world.tree.mark_critical(critical.node, critical.leaf, critical.localized)
    return world, planner, {4: Forest.from_trees([world.tree])}


def places(world: World, planner: BelPlanner) -> list[tuple[int, int]]:
    """Of the localized searches: which call it was, and of how many."""
    found = []
    for critical in planner.critical:
        path = world.tree.path(world.tree.leaves[critical.leaf])
        calls = [node for node in path if world.tree.tool_call[node]]
        if critical.localized:
            found.append((calls.index(critical.node) + 1, len(calls)))
    assert len(found) > 3
    return found


def test_critical_steps_are_counted_by_call(world: Any) -> None:
    tree, planner, forests = world
    found = places(tree, planner)
    rows = SAVED["critical"](forests).rows
    assert sum(row["critical"] for row in rows) == len(found)
    for row in rows:
        assert row["critical"] == sum(step == row["call"] for step, _ in found)
        assert row["reached"] == sum(calls >= row["call"] for _, calls in found)
        assert row["hazard"] == pytest.approx(row["critical"] / row["reached"])


def test_probes_are_read_back_from_the_tree(world: Any) -> None:
    """The posterior of each search, from what was asked for and what came of it."""
    tree, planner, forests = world
    store = tree.tree
    expected: dict[int, list[float]] = {}
    for critical in planner.critical:
        if not critical.localized:
            continue
        path = store.path(store.leaves[critical.leaf])
        calls = [node for node in path if store.tool_call[node]]
        probes = []
        for number, call in enumerate(calls, start=1):
            asked = [leaf for leaf, node in enumerate(tree.asked) if node == call]
            right = sum(store.correct[store.leaves[leaf]] for leaf in asked)
            if asked:
                probes.append((number, right, len(asked) - right))
        odds = posterior(len(calls), probes)
        expected.setdefault(len(calls), []).append(odds[calls.index(critical.node)])
    rows = SAVED["posterior"](forests).rows
    assert [row["calls"] for row in rows] == sorted(expected)
    for row in rows:
        assert row["searches"] == len(expected[row["calls"]])
        assert row["probability"] == pytest.approx(np.mean(expected[row["calls"]]))


def test_calls_are_counted_once_and_by_trajectory(world: Any) -> None:
    tree, _, forests = world
    store = tree.tree
    (row,) = SAVED["calls"](forests).rows
    right = [leaf for leaf in store.leaves if store.correct[leaf] == 1]
    along = [sum(store.tool_call[node] for node in store.path(leaf)) for leaf in right]
    assert row["step"] == 4 and row["trajectories"] == 30
    assert row["calls made per success"] == sum(store.tool_call) / len(right)
    assert row["calls of a success"] == pytest.approx(np.mean(along))


def test_steps_of_a_run_are_read_in_order(run: Path) -> None:
    assert list(forests_of(run)) == [3, 12]
    assert [row["step"] for row in SAVED["calls"](forests_of(run)).rows] == [3, 12]


def test_localization_is_reported_beside_theory() -> None:
    rows = localization(60).rows
    assert [row["planner"] for row in rows] == ["bel", "bel_bayes"] * 2
    for row in rows[::2]:
        assert abs(row["deviation"]) < 4 and abs(row["its deviation"]) < 4
        assert row["right in theory"] == pytest.approx(row["right"], abs=0.2)


def test_agreement_is_certain_without_a_choice() -> None:
    rows = {row["calls"]: row for row in agreement(40, times=3).rows}
    assert rows[1]["bel"] == rows[1]["bel_bayes"] == rows[1]["bel in theory"] == 1
    assert all(0 < row["bel in theory"] <= 1 + 1e-9 for row in rows.values())


def test_sensitivity_changes_one_setting_at_a_time() -> None:
    rows = sensitivity(10).rows
    paper = {"x_min": 1, "x_max": 3, "beta": 5, "n_total": 16, "b_max": 3}
    same = [row for row in rows if row["value"] == paper[row["setting"]]]
    figures = {tuple(list(row.values())[2:]) for row in same}
    assert len(figures) == 2, "the paper's settings give the same for each planner"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["critical", "nowhere"], "nowhere has no saved trees"),
        (["critical", "star.npz"], "no search of these trees localized a step"),
        (["localization", "--policies", "3"], "give at least 10"),
        (["calls", "damaged.npz"], "is not a saved forest"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_fault_is_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged.npz").write_text("no")
    world = World(3, max_calls=2)
    for _ in range(3):
        world.sample(0)
    io.save(Forest.from_trees([world.tree]), "star.npz")
    assert main(["analyse", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_pages_can_be_made_again_the_same(run: Path, tmp_path: Path) -> None:
    pages = []
    for name in ("one", "two"):
        main(["analyse", "critical", str(run), "--out", str(tmp_path / name)])
        pages.append([p.read_bytes() for p in sorted((tmp_path / name).iterdir())])
    assert pages[0] == pages[1]
    assert json.dumps(table(tmp_path / "one" / "critical.md"))
