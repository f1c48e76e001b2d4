"""Held-out success of a comparison's runs against what it took: the tables and plots of its page.

A run's curve has a point for each evaluation after the cold start. Its area is the mean success
over the range that all runs cover, trapezoid by trapezoid. Figures of an algorithm are means over
its seeds with Student's t intervals at 95 %; differences are taken seed by seed, because runs of a
seed begin with the same weights and tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from elpo_fast.report.plots import new_figure, save_figure
from elpo_fast.report.tables import markdown, write_csv
from elpo_fast.train.summary import read_metrics

AXES = {
    "rollouts": "rollouts",
    "tokens": "tokens that the policy sampled",
    "seconds": "seconds of collecting and training",
}
_CROWD = 5  # algorithms; more bands than these hide each other


class Point(NamedTuple):
    """One evaluation, and all that was spent before it."""

    step: int
    rollouts: float
    tokens: float
    seconds: float
    success: float


@dataclass(frozen=True)
class Curve:
    algorithm: str
    seed: int
    points: tuple[Point, ...]

    def area(self, axis: str, end: float) -> float:
        """Mean success while the axis goes from 0 to `end`, which the curve reaches."""
        x = np.array([getattr(point, axis) for point in self.points])
        y = np.array([point.success for point in self.points])
        inside = np.append(x[x < end], end)
        return float(np.trapezoid(np.interp(inside, x, y), inside) / end)


class Estimate(NamedTuple):
    """A mean over seeds and its interval, NaN for a single seed."""

    value: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    reach = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - reach, mean + reach)


def curve_of(run: Path, algorithm: str, seed: int, steps: int) -> Curve | None:
    """The curve of a run folder that was evaluated after all `steps`, else `None`."""
    spent, points = np.zeros(3), []
    for record in read_metrics(run):
        if record["phase"] == "rl":
            seconds = record["time/collect"] + record["time/train"]
            # Dynamic sampling samples more trajectories than a step trains on.
            rollouts = record.get("rollouts", record["trajectories"])
            spent += [rollouts, record["generated_tokens"], seconds]
        elif record["phase"] == "eval" and record["name"] != "before SFT":
            rollouts, tokens, seconds = spent.tolist()
            success = record["success"]
            points.append(Point(record["step"], rollouts, tokens, seconds, success))
    if len(points) < 2 or points[-1].step != steps:
        return None
    return Curve(algorithm, seed, tuple(points))


def write_page(out: Path, title: str, curves: Sequence[Curve], *, missing: int) -> None:
    """`compare.md`, `.png`, `.svg`, `runs.csv` and `evaluations.csv` in `out`. The first
    algorithm is what the others are compared with; `missing`: runs that are not finished."""
    ends = {axis: min(getattr(c.points[-1], axis) for c in curves) for axis in AXES}
    areas = [{axis: curve.area(axis, end) for axis, end in ends.items()} for curve in curves]
    grouped: dict[str, list[int]] = {}
    for index, curve in enumerate(curves):
        grouped.setdefault(curve.algorithm, []).append(index)
    write_csv(
        out / "evaluations.csv",
        (
            {"algorithm": curve.algorithm, "seed": curve.seed, **point._asdict()}
            for curve in curves
            for point in curve.points
        ),
    )
    write_csv(
        out / "runs.csv",
        (
            {"algorithm": curve.algorithm, "seed": curve.seed}
            | {f"area_{axis}": value for axis, value in area.items()}
            | curve.points[-1]._asdict()
            for curve, area in zip(curves, areas, strict=True)
        ),
    )
    rows = [_row(name, grouped, curves, areas) for name in grouped]
    _draw(out / "compare", title, grouped, curves, areas)
    reference = next(iter(grouped))
    unfinished = f" {missing} runs are not finished and left out." if missing else ""
    (out / "compare.md").write_text(
        f"# {title}: algorithms at the same budget\n\n![held-out success](compare.png)\n\n"
        f"{markdown(rows)}\n\n"
        "Success on held-out tasks in %, means over seeds with 95 % intervals (Student's t); the "
        f"area is the mean success over the first {ends['rollouts']:.0f} rollouts, and is compared "
        f"with that of {reference} seed by seed. Seconds are those of collecting and training, "
        f"beside whatever else ran.{unfinished} Runs: `runs.csv`, evaluations: "
        "`evaluations.csv`.\n",
        encoding="utf-8",
    )


def _row(
    name: str,
    grouped: Mapping[str, Sequence[int]],
    curves: Sequence[Curve],
    areas: Sequence[Mapping[str, float]],
) -> dict[str, str]:
    """What the page says about one algorithm."""
    mine, reference = grouped[name], next(iter(grouped))
    last = [curves[i].points[-1] for i in mine]
    theirs = {curves[i].seed: areas[i]["rollouts"] for i in grouped[reference]}
    gaps = [areas[i]["rollouts"] - theirs[curves[i].seed] for i in mine if curves[i].seed in theirs]
    compared = "" if name == reference or not gaps else _percent(estimate(gaps), sign="+")
    return {
        "algorithm": name,
        "seeds": str(len(mine)),
        "at the start": f"{np.mean([100 * curves[i].points[0].success for i in mine]):.1f}",
        "at the end": _percent(estimate([point.success for point in last])),
        "area": _percent(estimate([areas[i]["rollouts"] for i in mine])),
        f"area - {reference}'s": compared,
        "rollouts": f"{np.mean([point.rollouts for point in last]):.0f}",
        "tokens": f"{np.mean([point.tokens for point in last]):.0f}",
        "seconds": f"{np.mean([point.seconds for point in last]):.0f}",
    }


def _percent(found: Estimate, sign: str = "") -> str:
    value = f"{100 * found.value:{sign}.1f}"
    if math.isnan(found.low):
        return value
    return f"{value} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"


def _draw(
    path: Path,
    title: str,
    grouped: Mapping[str, Sequence[int]],
    curves: Sequence[Curve],
    areas: Sequence[Mapping[str, float]],
) -> None:
    """Success against each axis, and the areas as points with their intervals."""
    figure = new_figure(13, 9)
    panels = figure.subplots(2, 2).flat
    colours = {name: f"C{number % 10}" for number, name in enumerate(grouped)}
    styles = {name: ("-", "--", ":")[number // 10 % 3] for number, name in enumerate(grouped)}
    for (axis, label), panel in zip(AXES.items(), panels, strict=False):
        for name, members in grouped.items():
            # Seeds are evaluated after the same steps, if not after the same tokens or seconds.
            steps = zip(*(curves[i].points for i in members), strict=True)
            at = [([getattr(p, axis) for p in ps], [100 * p.success for p in ps]) for ps in steps]
            x = [float(np.mean(spent)) for spent, _ in at]
            y = [estimate(success) for _, success in at]
            line = {"color": colours[name], "linestyle": styles[name]}
            panel.plot(x, [each.value for each in y], marker=".", label=name, **line)
            if len(members) > 1 and len(grouped) <= _CROWD:
                low, high = [each.low for each in y], [each.high for each in y]
                panel.fill_between(x, low, high, color=colours[name], alpha=0.12, linewidth=0)
        panel.set(xlabel=label, ylabel="held-out success (%)", xlim=(0, None))
        panel.grid(alpha=0.3)
    last = next(panels)
    names = list(reversed(list(grouped)))
    for height, name in enumerate(names):
        members = grouped[name]
        found = estimate([100 * areas[i]["rollouts"] for i in members])
        last.plot(found.value, height, "o", color=colours[name])
        if len(members) > 1:
            last.plot([found.low, found.high], [height, height], color=colours[name])
    last.set_yticks(range(len(names)), names)
    last.set(xlabel="area under the curve over rollouts: mean success (%), 95 % interval")
    last.grid(alpha=0.3)
    figure.suptitle(title)
    figure.axes[0].legend(fontsize="small", ncols=1 + len(grouped) // 8)
    save_figure(figure, path)
