"""A run whose tool is a published MCP server, in trees that branch at its calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CITIES = {"Asia/Tokyo": "21:00", "Asia/Kathmandu": "17:45", "America/Lima": "07:00"}
REWARD = """
def score(task, messages, end):
    return float(messages[-1]["content"] == task.info["answer"])
"""


def call(city: str) -> str:
    arguments = {"source_timezone": "Etc/UTC", "time": "12:00", "target_timezone": city}
    return f"<tool_call>{json.dumps({'name': 'convert_time', 'arguments': arguments})}</tool_call>"


def test_two_steps_on_trees_with_a_published_server(
    scripted: Callable[[Sequence[str]], None], two_steps: Callable[..., Any], tmp_path: Path
) -> None:
    scripted([*map(call, CITIES), *map(call, CITIES), *CITIES.values()])
    rows = [{"prompt": f"Noon in {city}?", "answer": time} for city, time in CITIES.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "clock_reward.py").write_text(REWARD)
    server = {"command": [sys.executable, "-m", "mcp_server_time"], "tools": ["convert_time"]}
    settings = {
        "task.source": "file",
        "task.options": "{path: rows.jsonl, held_out_fraction: 0.3}",
        "task.reward": "clock_reward:score",
        "tools": json.dumps({"names": [], "mcp": [server]}),
        "rollout.max_turns": 4,
    }
    steps, forests = two_steps("clock", settings)
    assert all(step["tool_runs"] > 0 == step["tool_errors"] for step in steps)
    branched = [np.bincount(forest.parent[forest.parent > 0]).max(initial=0) for forest in forests]
    assert max(branched) > 1, "no tree branches below its root"
    assert {0, 1} <= set(forests[0].reward[forests[0].leaf_node])
