"""Analyses that sample with a run's policy: on a tiny run, and their figures on known trees."""

from __future__ import annotations

import asyncio
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from elpo_fast.algo import score
from elpo_fast.algo.planners import Planner
from elpo_fast.cli import _OF_POLICIES, main
from elpo_fast.config import AlgoConfig, load_config, parse_config
from elpo_fast.report.ratios import ratios_of
from elpo_fast.report.sampled import SAMPLED, agreement, first_trajectories, ranking, recovery
from elpo_fast.train.export import run_subject
from elpo_fast.train.loop import train
from elpo_fast.tree import io
from elpo_fast.tree.store import Forest, Tree
from elpo_fast.types import ToolCall

from ..algo.world import World, play

ALGO = AlgoConfig(n_total=20)


def collects(worlds: int, **shape: Any) -> Callable[[Callable[[], Planner]], Any]:
    """Trees of scripted worlds in the place of an engine's."""

    async def collect(make: Callable[[], Planner]) -> list[Tree]:
        trees = []
        for seed in range(worlds):
            world, planner = World(seed, max_calls=6, **shape), make()
            play(planner, world, np.random.default_rng(seed))
            for critical in planner.critical:
                world.tree.mark_critical(critical.node, critical.leaf, critical.localized)
            trees.append(world.tree)
        return trees

    return collect


def test_searches_rank_the_hopeless_below_the_others() -> None:
    """Where nothing is noise, and prefixes that can recover always do."""
    rows = asyncio.run(ranking(collects(6), ALGO, 4)).rows
    assert [row["planner"] for row in rows] == ["bel", "bel_bayes", "random", "entropy"]
    for row in rows:
        assert row["trees"] == 6 and row["pairs"] > 20
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["accuracy"] > 0.8 and row["tau"] > 0.5


def test_replacing_what_was_lost_already_does_not_help() -> None:
    rows = {r["replaced"]: r for r in asyncio.run(recovery(collects(8), ALGO, 4)).rows}
    assert rows["first irrecoverable"]["searches"] > 8
    assert rows["second"]["recovered"] == rows["third"]["recovered"] == 0
    assert rows["first irrecoverable"]["recovered"] > rows["a random step"]["recovered"]


def test_noiseless_searches_agree() -> None:
    rows = asyncio.run(agreement(collects(6), ALGO, 2)).rows
    assert all(row["agreement"] == 1 and row["calls apart"] == 0 for row in rows)


def test_nothing_localized_is_said() -> None:
    with pytest.raises(LookupError, match=r"raise algo.n_total"):
        asyncio.run(agreement(collects(2, solve_rate=1.0), ALGO, 2))


def test_the_first_trajectories_are_the_tree_before_the_others(tmp_path: Path) -> None:
    world, again = World(3, max_calls=6), World(3, max_calls=6)
    for _ in range(5):
        world.sample(0)
        again.sample(0)
    again.tree.mark_critical(again.tree.leaves[1], 1, localized=True)
    world.tree.mark_critical(world.tree.leaves[1], 1, localized=True)
    for _ in range(4):
        again.sample(0)
    io.save(Forest.from_trees([world.tree]), tmp_path / "one.npz")
    io.save(Forest.from_trees([first_trajectories(again.tree, 5)]), tmp_path / "other.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that took no step: its first checkpoint."""
    small = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 64}
    config = parse_config(
        {
            "run": {"dir": str(tmp_path_factory.mktemp("runs")), "name": "small", "log": []},
            "model": {"name": "scratch", "dtype": "float32", "scratch": small},
            "task": {"options": {"steps": 4, "level": 1}, "system": "Go.", "seed": 0},
            "tools": {"workers": 1},
            "rollout": {"call_format": "code", "max_turn_tokens": 8, "max_tokens": 300},
            "algo": {"n_total": 4},
            "train": {"steps": 0, "micro_batch_tokens": 40},
            "eval": {"tasks": 2},
        }
    )
    return train(config, console=Console(quiet=True))


@pytest.mark.parametrize("kind", _OF_POLICIES)
def test_each_has_a_command(
    kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an untrained policy says is taken for a call: it fails, and there are searches."""
    assert list(SAMPLED) == list(_OF_POLICIES)
    call = ToolCall("python_session", {"code": "1"})
    monkeypatch.setattr("elpo_fast.rollout.chat.Chat.parse_call", lambda self, text: call)
    arguments = ["--samples", "2", "--out", str(tmp_path), "algo.n_total=6"]
    arguments += ["rollout.max_turns=3", "algo.bel.b_max=1"]
    assert main(["analyse", kind, str(run), *arguments]) == 0
    with (tmp_path / f"{kind}.csv").open() as file:
        assert list(csv.DictReader(file))


def test_ratios_are_those_of_each_path_by_itself(run: Path) -> None:
    """Of trees that are cut into micro-batches, against one row for each trajectory."""
    random = np.random.default_rng(0)
    tree = Tree(random.integers(1, 90, 5))
    nodes = [0]
    for parent in (0, 1, 1, 0, 4, 4):
        ids, agent = random.integers(1, 90, 9), np.arange(9) < 6
        sampled = random.uniform(-5, -1, 9) * agent
        step = (nodes[parent], ids, agent, sampled, np.zeros(9))
        nodes.append(tree.add_step(*step, tool_call=parent == 0))
    for leaf in (2, 3, 5, 6):
        tree.finish(nodes[leaf], reward=leaf, correct=False, end="answer")
    forest = Forest.from_trees([tree, tree])
    found = ratios_of(run)(forest, score(forest, AlgoConfig()))
    subject = run_subject(run, load_config(run / "config.yaml"))
    model = subject.load([]).model
    for leaf in forest.leaf_node:
        spans = [slice(*forest.token_start[at : at + 2]) for at in forest.path(int(leaf))]
        ids, old, agent, ours = (
            np.concatenate([values[span] for span in spans])
            for values in (forest.token_ids, forest.logprob, forest.agent, found)
        )
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].double()
        new = logits.log_softmax(-1)[np.arange(len(ids) - 1), ids[1:]].numpy()
        expected = np.where(agent[1:] == 1, np.exp(new - old[1:]), 0)
        np.testing.assert_allclose(ours[1:], expected, rtol=1e-4)


def test_a_folder_that_is_no_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", "ranking", "nowhere"]) == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err
