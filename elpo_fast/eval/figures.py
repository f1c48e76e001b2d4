"""What the trajectories of an evaluation amount to. All intervals are 95 % ones of Wilson that
count tasks, not samples, and are therefore conservative with several samples a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from elpo_fast.eval.metrics import Comparison, major_at_k, pass_at_k, wilson_interval
from elpo_fast.eval.trajectories import Record

Estimate = dict[str, float]  # value, low, high


def figures(by_task: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Figures of tasks `[N]` with the same number of samples each, at least one.

    `pass@k` is the unbiased estimator, `major@k` the exact mean over all votes of k samples;
    `major@k` is empty where a correct trajectory marks no answer that could be voted for.
    """
    samples = len(by_task[0])
    every = [record for records in by_task for record in records]
    ks = sorted({2**power for power in range(samples.bit_length())} | {samples})
    calls = sum(record["tool_calls"] for record in every)

    def estimate(value_of: Callable[[Sequence[Record]], float]) -> Estimate:
        values = [value_of(records) for records in by_task]
        low, high = wilson_interval(sum(values), len(values))
        return {"value": float(np.mean(values)), "low": low, "high": high}

    def mean(name: str) -> float:
        return float(np.mean([record[name] for record in every]))

    votes = all(record["answer"] is not None for record in every if record["correct"])
    return {
        "tasks": len(by_task),
        "samples": samples,
        "success": estimate(lambda records: sum(r["correct"] for r in records) / samples),
        "pass@k": {str(k): estimate(partial(_pass, k=k)) for k in ks if k > 1},
        "major@k": {str(k): estimate(partial(_major, k=k)) for k in ks if k > 2 and votes},
        "reward": mean("reward"),
        "tool_calls": mean("tool_calls"),
        "malformed_calls": sum(r["malformed_calls"] for r in every) / calls if calls else 0.0,
        "prompt_tokens": mean("prompt_tokens"),
        "tokens": mean("tokens"),
        "tool_tokens": mean("tool_tokens"),
        "ends": {
            end: count / len(every) for end, count in Counter(r["end"] for r in every).most_common()
        },
    }


def _pass(records: Sequence[Record], k: int) -> float:
    return pass_at_k(len(records), sum(record["correct"] for record in records), k)


def _major(records: Sequence[Record], k: int) -> float:
    # All that equals the truth is equal: correct answers vote together, however they are written.
    answers = [
        (True, "") if r["correct"] else r["answer"] and (False, r["answer"]) for r in records
    ]
    return major_at_k(answers, [record["correct"] for record in records], k)


def table(title: str, values: Mapping[str, Any]) -> Table:
    """The figures for people."""
    samples = values["samples"]
    drawn = Table(title=title, title_justify="left")
    drawn.add_column(f"{values['tasks']} tasks, {samples} sample{'s' * (samples > 1)} each")
    drawn.add_column("", justify="right")
    drawn.add_column("95 % interval", justify="right")

    def add(name: str, estimate: Estimate) -> None:
        value, low, high = (f"{100 * estimate[key]:.1f}" for key in ("value", "low", "high"))
        drawn.add_row(name, f"{value} %", f"{low} - {high}")

    add("success" if samples == 1 else f"mean@{samples}", values["success"])
    for kind in ("pass@k", "major@k"):
        for k, estimate in values[kind].items():
            add(f"{kind[:-1]}{k}", estimate)
    drawn.add_section()
    drawn.add_row("reward", f"{values['reward']:.3f}")
    drawn.add_row("tool calls a trajectory", f"{values['tool_calls']:.2f}")
    drawn.add_row("malformed calls", f"{values['malformed_calls']:.1%}")
    drawn.add_row("tokens written", f"{values['tokens']:.0f}")
    drawn.add_row("tokens of tools", f"{values['tool_tokens']:.0f}")
    drawn.add_section()
    for end, share in values["ends"].items():
        drawn.add_row(f"ended by {end}", f"{share:.1%}")
    return drawn


def compared(one: str, other: str, found: Comparison, tasks: int) -> str:
    """A comparison for people: `one` against `other`."""
    difference, low, high = (f"{100 * x:+.1f}" for x in (found.difference, found.low, found.high))
    return (
        f"{one} against {other}: {difference} points of success (95 % interval {low} to {high}), "
        f"better on {found.better} and worse on {found.worse} of {tasks} tasks, "
        f"p = {found.p_value:.3g} (sign test)"
    )
