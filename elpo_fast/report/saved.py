"""Analyses of saved trees: where critical steps lie, what successes cost, how sure searches are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from elpo_fast.algo.bel_bayes import posterior
from elpo_fast.report.analyse import Analysis
from elpo_fast.report.plots import new_figure
from elpo_fast.report.show import saved_steps
from elpo_fast.tree import io, ops
from elpo_fast.tree.store import Forest


def forests_of(path: Path) -> dict[int, Forest]:
    """The trees of a run folder by step, or those of one file as step 0. Raises `LookupError` where
    there are none."""
    if path.is_file():
        return {0: io.read(path)}
    found = {step: io.load(file) for step, file in sorted(saved_steps(path).items())}
    if not found:
        raise LookupError(f"{path} has no saved trees; train with train.save_trees=true")
    return found


@dataclass(frozen=True)
class _Localized:
    """One localized search: which of the reference's tool calls it found, from 1, and after each
    call that was probed what its suffixes came to."""

    calls: int
    step: int
    probes: list[tuple[int, int, int]]  # call, successes, failures


def _searches(forest: Forest) -> Iterator[_Localized]:
    leaf, correct = forest.leaf_node, forest.correct[forest.leaf_node] == 1
    right = ops.leaf_sum(forest.parent, leaf, correct.astype(np.float64))
    every = ops.leaf_sum(forest.parent, leaf, np.ones(len(leaf)))
    for node, reference in zip(
        forest.critical_node[forest.critical_localized],
        forest.critical_leaf[forest.critical_localized],
        strict=True,
    ):
        path = forest.path(int(leaf[reference]))[1:]
        calls = [at for at in path if forest.tool_call[at]]
        below = dict(pairwise(path))
        probes = []
        for number, call in enumerate(calls, start=1):
            rest = below.get(call)
            if rest is None:
                continue
            successes = int(right[call] - right[rest])
            failures = int(every[call] - every[rest]) - successes
            if successes or failures:
                probes.append((number, successes, failures))
        yield _Localized(len(calls), calls.index(int(node)) + 1, probes)


def _all_searches(forests: Mapping[int, Forest]) -> list[_Localized]:
    found = [search for forest in forests.values() for search in _searches(forest)]
    if not found:
        raise LookupError("no search of these trees localized a step; they need planner bel")
    return found


def critical(forests: Mapping[int, Forest]) -> Analysis:
    """Where critical steps lie: among the calls, and along the trajectory."""
    found = _all_searches(forests)
    at = Counter(search.step for search in found)
    rows = []
    for call in range(1, max(search.calls for search in found) + 1):
        reached = sum(search.calls >= call for search in found)
        share = {"critical": at[call], "share": at[call] / len(found)}
        rows.append({"call": call, **share, "reached": reached, "hazard": at[call] / reached})
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    left.bar([row["call"] for row in rows], [row["share"] for row in rows])
    left.set(xlabel="tool call", ylabel="share of critical steps")
    # A step covers its part of the trajectory; each search is one, spread over that part.
    edges = np.linspace(0, 1, 21)
    spread = np.zeros(len(edges) - 1)
    for search in found:
        first, last = (search.step - 1) / search.calls, search.step / search.calls
        cover = np.clip(np.minimum(edges[1:], last) - np.maximum(edges[:-1], first), 0, None)
        spread += cover / (last - first)
    right.stairs(spread / len(found) / np.diff(edges), edges, fill=True)
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xlabel="part of the trajectory's calls", ylabel="density (1: anywhere alike)")
    return Analysis(
        "Where critical steps lie",
        rows,
        figure,
        f"Of {len(found)} localized searches. `reached`: searched trajectories with so many calls; "
        "`hazard`: the share of these in which this call is the first irrecoverable one.",
    )


def calls(forests: Mapping[int, Forest]) -> Analysis:
    """Tool calls for each success, by training step."""
    rows = []
    for step, forest in forests.items():
        correct = forest.correct[forest.leaf_node] == 1
        along = ops.path_sum(forest.parent, forest.tool_call.astype(np.int64))[forest.leaf_node]
        made, successes = int(forest.tool_call.sum()), int(correct.sum())
        rows.append(
            {
                "step": step,
                "trajectories": len(correct),
                "success": float(correct.mean()),
                "calls made": made,
                "calls made per success": made / successes if successes else float("inf"),
                "calls of a success": float(along[correct].mean()) if successes else 0.0,
                "calls of a failure": float(along[~correct].mean()) if (~correct).any() else 0.0,
            }
        )
    figure = new_figure(7, 4)
    panel = figure.subplots()
    for name in ("calls made per success", "calls of a success", "calls of a failure"):
        panel.plot([row["step"] for row in rows], [row[name] for row in rows], ".-", label=name)
    panel.set(xlabel="step", ylabel="tool calls", ylim=(0, None))
    panel.legend()
    panel.grid(alpha=0.3)
    return Analysis(
        "Tool calls and success",
        rows,
        figure,
        "`calls made`: steps that called a tool, each once however many trajectories share it. "
        "Trees of a search hold more failures than the policy makes.",
    )


def posterior_of_steps(forests: Mapping[int, Forest]) -> Analysis:
    """How probable the localized steps are, given the probes."""
    found = _all_searches(forests)
    odds = [posterior(search.calls, search.probes) for search in found]
    own = np.array([each[search.step - 1] for each, search in zip(odds, found, strict=True)])
    best = np.array([each.max() for each in odds])
    suffixes = np.array([sum(s + f for _, s, f in search.probes) for search in found])
    rows: list[dict[str, Any]] = []
    lengths = np.array([search.calls for search in found])
    for length in np.unique(lengths):
        mine = lengths == length
        rows.append(
            {
                "calls": int(length),
                "searches": int(mine.sum()),
                "suffixes": float(suffixes[mine].mean()),
                "probability": float(own[mine].mean()),
                "most probable": float((own[mine] >= best[mine] - 1e-9).mean()),
            }
        )
    figure = new_figure(6, 4)
    panel = figure.subplots()
    panel.hist(own, bins=20, range=(0, 1))
    panel.set(xlabel="probability of the localized step, given its probes", ylabel="searches")
    return Analysis(
        "How sure searches are",
        rows,
        figure,
        "By the number of the trajectory's calls: suffixes spent on it; mean probability of the "
        "step that was found, under the model of `planner: bel_bayes`; how often no other step is "
        "more probable.",
    )


SAVED: dict[str, Callable[[Mapping[int, Forest]], Analysis]] = {
    "critical": critical,
    "calls": calls,
    "posterior": posterior_of_steps,
}
