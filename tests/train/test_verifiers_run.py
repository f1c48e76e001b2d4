"""Runs on environments of the package `verifiers`: one with a tool, in trees that branch at its
calls, and one that the package ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elpo_fast.tree.store import Forest

pytest.importorskip("verifiers")

MAGIC = '''
import verifiers as vf
from datasets import Dataset

def magic(number: int) -> str:
    """The word of a number."""
    return ("wand", "hat", "dove")[number]

def found(completion, answer):
    return float(completion[-1]["content"] == answer)

def load_environment(spells=3):
    rows = [{"question": f"Spell {n}?", "answer": magic(n % 3)} for n in range(spells)]
    rubric = vf.Rubric(funcs=[found])
    return vf.ToolEnv(tools=[magic], dataset=Dataset.from_list(rows), rubric=rubric, max_turns=4)
'''
SHIPPED = """
from verifiers.envs.integrations.reasoninggym_env import ReasoningGymEnv

def load_environment(**args):
    return ReasoningGymEnv(**args)
"""


@pytest.fixture
def trained(tmp_path: Path, two_steps: Callable[..., Any]) -> Callable[..., list[Forest]]:
    """Trains two steps on an environment whose module has this text; the run's trees."""

    def train(module: str, text: str, args: str, planner: str) -> list[Forest]:
        (tmp_path / f"{module}.py").write_text(text)
        settings = {
            "task.source": "verifiers",
            "task.options": f"{{env: {module}, args: {args}, held_out_fraction: 0.3}}",
            "tools.names": "[]",
            "algo.planner": planner,
        }
        steps, forests = two_steps(module, settings)
        assert all(step["tool_errors"] == 0 for step in steps)
        return list(forests)

    return train


def test_two_steps_on_trees_with_an_environments_tool(
    trained: Callable[..., list[Forest]], scripted: Callable[[Sequence[str]], None]
) -> None:
    calls = [
        f'<tool_call>{{"name": "magic", "arguments": {{"number": {n}}}}}</tool_call>'
        for n in range(3)
    ]
    scripted([*calls, *calls, "wand", "hat", "dove"])
    forests = trained("magic_env", MAGIC, "{spells: 12}", "bel")
    branched = [np.bincount(forest.parent[forest.parent > 0]).max(initial=0) for forest in forests]
    assert max(branched) > 1, "no tree branches below its root"
    assert {0, 1} <= set(forests[0].reward[forests[0].leaf_node])


def test_two_steps_on_a_single_turn_environment_of_the_package(
    trained: Callable[..., list[Forest]], scripted: Callable[[Sequence[str]], None]
) -> None:
    scripted([f"<answer>{word}</answer>" for word in ("Yes", "No")])
    forests = trained(
        "gym_env", SHIPPED, "{gym: syllogism, num_train_examples: 20, num_eval_examples: 5}", "star"
    )
    assert all(len(forest.leaf_node) == 12 for forest in forests)
