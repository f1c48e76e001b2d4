"""From a step's metrics to sentences: what is wrong, and the key to turn; nothing where nothing
is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elpo_fast.train.advice import advice

GOOD = {
    "updates": 4,
    "grad_norm": 0.7,
    "trajectories": 96,
    "success": 0.4,
    "entropy": 0.08,
    "tool_runs": 500,
    "malformed_calls": 3,
    "mismatch_mean": 0.01,
    "mismatch_ess": 0.99,
}
FIRST = {"entropy": 0.2}
NOTHING = {"updates": 0, "success": 0.5}


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ({"updates": 0, "success": 1.0}, "solved", ["all 96", "correct", "harder tasks"]),
        ({"updates": 0, "success": 0.0}, "failed", ["all 96", "fail", "sft.demonstrations"]),
        ({"grad_norm": 0.0, "success": 0.0}, "failed", ["trains on nothing"]),
        (NOTHING, "uniform", ["50%", "algo.n_total"]),
        ({"entropy": 0.019}, "entropy", ["0.019 nats", "0.2", "train.lr"]),
        ({"faults": 96, "updates": 0, "success": 0.0}, "faults", ["96 of 96", "exception"]),
        ({"malformed_calls": 51}, "malformed", ["51 of 500", "rollout.call_format"]),
        ({"mismatch_mean": 0.2}, "apart", ["0.2 nats", "train.importance_sampling=token"]),
        ({"mismatch_ess": 0.3}, "apart", ["30%", "rollout.dtype=float32"]),
    ],
    ids=[
        "solved",
        "failed",
        "no gradient",
        "uniform",
        "entropy",
        "faults",
        "malformed",
        "mean",
        "ess",
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(
    values: dict[str, Any], kind: str, said: list[str]
) -> None:
    found = advice({**GOOD, **values}, FIRST)
    assert list(found) == [kind]
    for words in said:
        assert words in found[kind]


def test_nothing_is_said_about_a_good_step() -> None:
    assert advice(GOOD, FIRST) == {} == advice(GOOD)
    assert advice({**GOOD, "tool_runs": 2, "malformed_calls": 2}) == {}  # too few to say anything


def test_a_step_without_updates_has_no_figures_of_them() -> None:
    """No gradient, no mismatch: keys that only updates give are absent."""
    bare = {
        k: v for k, v in GOOD.items() if k not in ("grad_norm", "mismatch_mean", "mismatch_ess")
    }
    assert list(advice({**bare, "updates": 0, "success": 1.0}, FIRST)) == ["solved"]


def test_recorded_runs_that_learned_were_not_warned_of() -> None:
    file = Path(__file__).parents[2] / "bench" / "results" / "quickstart" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["phase"] == "rl"]
    assert len(steps) == 10
    assert all(advice(step, steps[0]) == {} for step in steps)
