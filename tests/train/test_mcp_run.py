"""A run whose tool is a published MCP server, in trees that branch at its calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from elpo_fast import cli
from elpo_fast.train.summary import read_metrics
from elpo_fast.tree import io

CITIES = {"Asia/Tokyo": "21:00", "Asia/Kathmandu": "17:45", "America/Lima": "07:00"}
REWARD = """
def score(task, messages, end):
    return float(messages[-1]["content"] == task.info["answer"])
"""


def call(city: str) -> str:
    arguments = {"source_timezone": "Etc/UTC", "time": "12:00", "target_timezone": city}
    return f"<tool_call>{json.dumps({'name': 'convert_time', 'arguments': arguments})}</tool_call>"


def test_two_steps_on_trees_with_a_published_server(
    scripted: Callable[[Sequence[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted([*map(call, CITIES), *map(call, CITIES), *CITIES.values()])
    rows = [{"prompt": f"Noon in {city}?", "answer": time} for city, time in CITIES.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "clock_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    server = {"command": [sys.executable, "-m", "mcp_server_time"], "tools": ["convert_time"]}
    settings = {
        "run.name": "clock",
        "run.threads": 1,
        "model.name": "scratch",
        "model.dtype": "float32",
        "model.scratch": "{hidden_size: 32, layers: 1, heads: 2, kv_heads: 1, context: 4096}",
        "task.source": "file",
        "task.options": "{path: rows.jsonl, held_out_fraction: 0.3}",
        "task.reward": "clock_reward:score",
        "tools": json.dumps({"names": [], "mcp": [server]}),
        "rollout.max_tokens": 4000,
        "rollout.max_turns": 4,
        "algo.n_total": 6,
        "train.steps": 2,
        "train.tasks_per_step": 2,
        "train.lr": 1e-3,
        "eval.tasks": 1,
    }
    config = tmp_path / "clock.yaml"
    config.write_text("run: {name: clock}\n")
    pairs = [f"{name}={value}" for name, value in settings.items()]
    assert cli.main(["train", str(config), *pairs]) == 0
    steps = [record for record in read_metrics(Path("runs/clock")) if record["phase"] == "rl"]
    assert [step["trajectories"] for step in steps] == [12, 12]
    assert all(step["tool_runs"] > 0 == step["tool_errors"] for step in steps)
    assert all(step["faults"] == 0 < step["updates"] for step in steps)
    forests = [io.load(path) for path in sorted(Path("runs/clock/trees").glob("*.npz"))]
    branched = [np.bincount(forest.parent[forest.parent > 0]).max(initial=0) for forest in forests]
    assert max(branched) > 1, "no tree branches below its root"
    assert {0, 1} <= set(forests[0].reward[forests[0].leaf_node])
