"""Analyses of searches among scripted policies: errors against theory, agreement, sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from elpo_fast.algo import make_planner
from elpo_fast.algo.bel import suffix_count
from elpo_fast.algo.simulator import Policy, Script, Search, repeated, searches, theory
from elpo_fast.config import AlgoConfig, BelConfig
from elpo_fast.report.analyse import Analysis
from elpo_fast.report.plots import new_figure

_WORLDS = {"monotone": True, "not monotone": False}
_PLANNERS = ("bel", "bel_bayes")


def _config(planner: str, **changed: Any) -> AlgoConfig:
    data: dict[str, Any] = {"planner": planner}
    for name, value in changed.items():
        if name in BelConfig.model_fields:
            data.setdefault("bel", {})[name] = value
        else:
            data[name] = value
    return AlgoConfig.model_validate(data)


def _found(config: AlgoConfig, policies: int, monotone: bool) -> list[Search]:
    """All searches of so many policies. A planner that overspends raises."""
    return [
        search
        for seed in range(policies)
        for search in searches(
            make_planner(config), Policy(seed, monotone=monotone), config.n_total
        )
    ]


def _expected(script: Script, bel: BelConfig, left: int = 10**9) -> dict[int, float]:
    """Probability of each call that Algorithm 1 may find."""
    entropies = script.trajectory.tool_entropy
    counts = [suffix_count(entropy, bel.x_min, bel.x_max, bel.beta) for entropy in entropies]
    steps: dict[int, float] = {}
    for (step, _), chance in theory(script, counts, left).items():
        steps[step] = steps.get(step, 0.0) + chance
    return steps


def localization(policies: int) -> Analysis:
    """Errors of both planners, and of Algorithm 1 in theory."""
    rows: list[dict[str, Any]] = []
    figure = new_figure(10, 4)
    for (world, monotone), panel in zip(
        _WORLDS.items(), figure.subplots(1, 2, sharey=True), strict=True
    ):
        for planner in _PLANNERS:
            config = _config(planner)
            found = _found(config, policies, monotone)
            localized = [search for search in found if search.critical.localized]
            row: dict[str, Any] = {
                "recoverability": world,
                "planner": planner,
                "searches": len(found),
                "localized": len(localized) / len(found),
                "right if localized": _share(localized),
                "right": _share(found),
                "calls off": float(np.mean([abs(search.error) for search in found])),
            }
            theoretical = dict.fromkeys(
                ("right in theory", "deviation", "calls off in theory", "its deviation"), ""
            )
            if planner == "bel":
                theoretical = _theory(found, config.bel)
            rows.append(row | theoretical)
            errors = np.array([search.error for search in found])
            at = np.arange(-6, 7)
            shares = [np.mean(errors == error) for error in at]
            panel.plot(at, shares, ".-", label=planner)
        panel.set(title=world, xlabel="localized step - first irrecoverable step (calls)")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.axes[0].set_ylabel("share of searches")
    return Analysis(
        f"Localization among {policies} scripted policies",
        rows,
        figure,
        "Shares of all searches, those included that the budget of 16 rollouts cut short; `right`: "
        "exactly the first irrecoverable step; `calls off`: mean distance. `deviation`: of what "
        "was found from theory, in standard errors. No planner spent more than the budget.",
    )


def _share(found: Sequence[Search]) -> float:
    return float(np.mean([search.error == 0 for search in found]))


def _theory(found: Sequence[Search], bel: BelConfig) -> dict[str, Any]:
    """Given the trajectory and what was left, a search's result is random by its probes alone."""
    moments = np.zeros((2, 2))  # of being right, and of the distance: mean and variance
    measured = np.zeros(2)
    for search in found:
        truth, steps = search.script.irrecoverable, _expected(search.script, bel, search.left)
        right = steps.get(truth, 0.0)
        mean = sum(p * abs(step - truth) for step, p in steps.items())
        square = sum(p * (step - truth) ** 2 for step, p in steps.items())
        moments += [[right, right * (1 - right)], [mean, square - mean**2]]
        measured += [search.error == 0, abs(search.error)]
    deviation = (measured - moments[:, 0]) / np.sqrt(moments[:, 1])
    expected = moments[:, 0] / len(found)
    return {
        "right in theory": float(expected[0]),
        "deviation": float(deviation[0]),
        "calls off in theory": float(expected[1]),
        "its deviation": float(deviation[1]),
    }


def agreement(policies: int, times: int = 8) -> Analysis:
    """How often two searches of the same failed trajectory find the same step."""
    scripts = []
    for seed in range(policies):
        policy = Policy(seed)
        list(searches(make_planner(_config("star")), policy, 16))
        scripts += list(policy.scripts.values())[:1]
    rows = []
    for calls in sorted({len(script.recoverability) for script in scripts}):
        mine = [script for script in scripts if len(script.recoverability) == calls]
        row: dict[str, Any] = {"calls": calls, "trajectories": len(mine)}
        for planner in _PLANNERS:
            config = _config(planner, n_total=1000, b_max=1)
            pairs = [
                one == other
                for number, script in enumerate(mine)
                for one, other in combinations(
                    repeated(script, partial(make_planner, config), times, number), 2
                )
            ]
            row[planner] = float(np.mean(pairs))
        steps = [_expected(script, BelConfig()) for script in mine]
        row["bel in theory"] = float(np.mean([sum(p * p for p in s.values()) for s in steps]))
        rows.append(row)
    figure = new_figure(6, 4)
    panel = figure.subplots()
    x = [row["calls"] for row in rows]
    for name in _PLANNERS:
        panel.plot(x, [row[name] for row in rows], ".-", label=name)
    panel.plot(x, [row["bel in theory"] for row in rows], "k:", label="bel in theory")
    panel.set(xlabel="tool calls of the trajectory", ylabel="agreement", ylim=(0, 1.02))
    panel.legend()
    panel.grid(alpha=0.3)
    return Analysis(
        "Agreement of repeated searches",
        rows,
        figure,
        f"Share of pairs of {times} searches of the same failed trajectory that find the same "
        "step; scripted policies with monotone recoverability, no budget.",
    )


_RANGES: dict[str, Sequence[float]] = {
    "x_min": (1, 2, 3),
    "x_max": (1, 2, 3, 4, 6),
    "beta": (0, 2, 5, 10, 20),
    "n_total": (8, 12, 16, 24, 32),
    "b_max": (1, 2, 3, 4, 6),
}


def sensitivity(policies: int) -> Analysis:
    """One setting at a time, the others as in the paper."""
    rows: list[dict[str, Any]] = []
    figure = new_figure(14, 3.2)
    panels = figure.subplots(1, len(_RANGES), sharey=True)
    for panel, (name, values) in zip(panels, _RANGES.items(), strict=True):
        for planner, style in zip(_PLANNERS, ("-", "--"), strict=True):
            for value in values:
                found = _found(_config(planner, **{name: value}), policies, True)
                localized = [search for search in found if search.critical.localized]
                rows.append(
                    {
                        "setting": name,
                        "value": value,
                        "planner": planner,
                        "searches a task": len(found) / policies,
                        "localized a task": len(localized) / policies,
                        "right a task": sum(s.error == 0 for s in localized) / policies,
                        "right if localized": _share(localized),
                        "right": _share(found),
                    }
                )
            mine = rows[-len(values) :]
            for number, kind in enumerate(("right if localized", "right a task")):
                label = f"{kind} ({planner})"
                y = [row[kind] for row in mine]
                panel.plot(values, y, f".{style}", color=f"C{number}", label=label)
        panel.set(xlabel=name)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="x-small")
    return Analysis(
        f"Sensitivity of localization among {policies} scripted policies",
        rows,
        figure,
        "One setting at a time, the others as in the paper; monotone recoverability. `right a "
        "task`: localized searches that found the first irrecoverable step, for each task.",
    )


SIMULATED: dict[str, Callable[[int], Analysis]] = {
    "localization": localization,
    "agreement": agreement,
    "sensitivity": sensitivity,
}
