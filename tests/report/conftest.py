"""Trees that were really searched, of trajectories whose every token is a character."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from elpo_fast.algo.bel import BelPlanner
from elpo_fast.algo.planners import Request, trajectory_of
from elpo_fast.report.show import saved_steps
from elpo_fast.train.metrics import tree_metrics
from elpo_fast.tree import io
from elpo_fast.tree.store import Forest, Tree

BEFORE = {"phase": "eval", "step": 0, "name": "after SFT", "success": 0.35, "low": 0.3}
AFTER = {"phase": "eval", "step": 3, "name": "after ELPO", "success": 0.69, "low": 0.64}
COLD = [{"phase": "sft", "step": step, "loss": 6.0 / step} for step in (1, 2, 3)]
CALLS = 4
TRAJECTORIES = 12
PROMPT = "<|im_start|>user\nAdd 7, then double it. <img src=x onerror=hacked=1><|im_end|>\n"


class Growth:
    """A tree that a planner searched, by default bisection, and what it asked for. Some steps are
    mistakes, which no continuation recovers from."""

    def __init__(self, seed: int, planner: BelPlanner | None = None) -> None:
        self.random = random.Random(seed)
        self.tree = Tree(_codes(PROMPT), task_id=f"task-{seed}", info={"level": seed})
        self.depth, self.lost = {0: 0}, {0: False}
        self.requests: list[Request] = []
        self.planner = planner or BelPlanner(TRAJECTORIES, b_max=3, x_min=1, x_max=3, beta=5.0)
        while not self.planner.done:
            for request in self.planner.requests():
                self.requests.append(request)
                leaves = [self._trajectory(request.node) for _ in range(request.count)]
                for leaf in leaves:
                    self.planner.observe(trajectory_of(self.tree, leaf))
        for found in self.planner.critical:
            self.tree.mark_critical(found.node, found.leaf, found.localized)

    def _trajectory(self, node: int) -> int:
        while self.depth[node] < CALLS:
            wrong = self.lost[node] or self.random.random() < 0.25
            said = "<code>x = wrong(x)</code>" if wrong else "<code>x = x + 7</code>"
            if self.random.random() < 0.05:
                said = said.removesuffix("</code>")
            heard = "<|im_end|>\n<|im_start|>tool\n46<|im_end|>\n<|im_start|>assistant\n"
            node = self._step(node, said, heard, lost=wrong)
        correct = not self.lost[node]
        answer = "it is 46" if correct else "it is 23"
        node = self._step(node, answer, "", lost=not correct)
        end = {"end": "answer", "reason": f"answered {answer[-2:]}"}
        return self.tree.finish(node, reward=2.0 * correct - 1, correct=correct, **end)

    def _step(self, parent: int, said: str, heard: str, *, lost: bool) -> int:
        agent = np.arange(len(said + heard)) < len(said)
        sampled = np.round(np.where(agent, self.random.random(), 0), 2)
        step = (_codes(said + heard), agent, -sampled, 2 * sampled)
        node = self.tree.add_step(parent, *step, tool_call=bool(heard))
        self.depth[node], self.lost[node] = self.depth[parent] + 1, lost
        return node


def _codes(text: str) -> np.ndarray:
    return np.array([ord(character) for character in text], np.int32)


@pytest.fixture(scope="session")
def grow() -> Callable[[int], Growth]:
    return Growth


@pytest.fixture(scope="session")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with 1,000 trees of 50 tasks in 10 steps."""
    folder = tmp_path_factory.mktemp("runs") / "thousand"
    (folder / "trees").mkdir(parents=True)
    (folder / "config.yaml").write_text("{}\n")
    trees = [Growth(seed).tree for seed in range(50)]
    for step in range(10):
        io.save(Forest.from_trees(trees * 2), folder / "trees" / f"step_{step + 1:06d}.npz")
    return folder


@pytest.fixture(scope="session")
def characters() -> Callable[[np.ndarray], str]:
    return lambda ids: "".join(map(chr, ids))


def rl(run: Path, step: int) -> dict:
    """The record of a step, as training writes it."""
    forest = io.load(saved_steps(run)[step])
    counts = {"tool_runs": 100, "tool_errors": 7, "malformed_calls": 2, "faults": 0, "updates": 4}
    figures = {"grad_norm": 1.0, "approx_kl": 0.01 * step, "mismatch_mean": 0.002}
    regions = {"decode": 2.0, "tool": 0.5, "forward": 0.4, "backward": 0.6}
    sums = {"collect": 2.8, "train": 1.2, "step": 4.0, "tool_hidden": 9.0}
    seconds = {f"time/{name}": value for name, value in (regions | sums).items()}
    return {"phase": "rl", "step": step, **tree_metrics(forest), **counts, **figures, **seconds}


@pytest.fixture
def run(thousand: Path, tmp_path: Path) -> Path:
    """The folder of a run of three steps, after a cold start."""
    folder = tmp_path / "run"
    (folder / "trees").mkdir(parents=True)
    for step in (1, 2, 3):
        shutil.copy(saved_steps(thousand)[step], folder / "trees")
    config = "run: {name: mine}\nmodel: {name: a<b>}\ntrain: {steps: 8, lr: 3.0e-5}\n"
    (folder / "config.yaml").write_text(config)
    intervals = [{**each, "high": 0.75, "tasks": 300, "samples": 1} for each in (BEFORE, AFTER)]
    records = [*COLD, intervals[0], *(rl(folder, step) for step in (1, 2, 3)), intervals[1]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder
