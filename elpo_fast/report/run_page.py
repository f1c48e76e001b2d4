"""`elpo report`: what a run did, as one page for people who were not there.

Everything is read from the run folder: metrics, configuration and, where they were saved, trees.
"""

from __future__ import annotations

import html
import io as streams
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elpo_fast import __version__
from elpo_fast.config import Config, flat, parse_config, run_config
from elpo_fast.report import page
from elpo_fast.report.plots import new_figure
from elpo_fast.report.show import saved_steps
from elpo_fast.train.advice import advice
from elpo_fast.train.summary import read_metrics
from elpo_fast.tree import io

Records = Sequence[Mapping[str, Any]]

_GOOD, _BAD, _BLUE, _GREY = "#11845b", "#c7402d", "#2d62c9", "#8a93a3"
_ENDS = {
    "answer": ("an answer", _GOOD),
    "turn_limit": ("the turn limit", "#e0a030"),
    "length": ("a token limit", _BAD),
    "fault": ("a fault", "#5b2a86"),
}
_SUMS = {"time/step", "time/collect", "time/train", "time/tool_hidden", "time/other"}
_REGIONS_SHOWN = 6
_STYLE: Any = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ee",
    "legend.frameon": False,
    "svg.hashsalt": "elpo",  # the same run, the same file
}


class _Plot(NamedTuple):
    name: str  # of its file
    title: str
    says: str  # what it shows, in a sentence
    figure: Figure


class _StepTrees(NamedTuple):
    """What the trees of one step say."""

    step: int
    success: tuple[float, float]  # mean over the trees, half its 95 % interval
    depths: list[int]  # steps at which searches localized, from 1
    open: int  # searches that the budget ended


def write_report(run: Path, out: Path | None = None, *, plots: str | None = None) -> list[Path]:
    """Write the report of a run, by default as `report.html` in it, and with `plots` (`png` or
    `svg`) each plot as a file beside it; what was written. Raises `LookupError` without a run."""
    config, records = run_config(run), read_metrics(run)
    if not records:
        raise LookupError(f"{run} has no metrics yet: nothing was trained or evaluated")
    out = out or run / "report.html"
    found = [_of_trees(step, file) for step, file in sorted(saved_steps(run).items())]
    written = [out]
    parts = [_head(run, out, config, records)]
    with matplotlib.rc_context(_STYLE):
        for plot in _plots(records, found):
            parts.append(
                f"<figure><h2>{html.escape(plot.title)}</h2>{_svg(plot.figure)}"
                f"<figcaption>{html.escape(plot.says)}</figcaption></figure>"
            )
            if plots is not None:
                written.append(out.with_name(f"{out.stem}_{plot.name}.{plots}"))
                page.write_bytes(written[-1], _rendered(plot.figure, plots))
    parts.append(_configuration(run, config))
    body = "\n".join(parts)
    page.write(out, page.page(f"{config.run.name} · report", page.asset("report.css"), body))
    return written


def _of_trees(step: int, file: Path) -> _StepTrees:
    forest = io.load(file)
    correct = forest.correct[forest.leaf_node] == 1
    shares = np.add.reduceat(correct, forest.leaf_start[:-1], dtype=float)
    shares /= np.diff(forest.leaf_start)
    # Trees are the independent draws; the trajectories of one are not.
    half = 1.96 * shares.std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
    localized = forest.critical_node[forest.critical_localized]
    depths = forest.depth[localized].tolist()
    return _StepTrees(
        step, (float(shares.mean()), float(half)), depths, int(sum(~forest.critical_localized))
    )


def _head(run: Path, out: Path, config: Config, records: Records) -> str:
    steps, evaluations = _phase(records, "rl"), _phase(records, "eval")
    about = [
        f"model {config.model.name}",
        f"task {config.task.source}",
        f"planner {config.algo.planner}, advantage {config.algo.advantage}",
        f"{len(steps)} of {config.train.steps} steps of {config.train.tasks_per_step} tasks, "
        f"{config.algo.n_total} trajectories each",
        f"elpo-fast {__version__}",
    ]
    parts = [
        f"<h1>{html.escape(config.run.name)}</h1>",
        f"<p class=dim>{html.escape(' · '.join(about))}</p>",
    ]
    if evaluations:
        rows = "".join(
            f"<tr><td>{html.escape(r['name'])}</td><td>{r['step']}</td>"
            f"<td><b>{r['success']:.1%}</b></td><td>{r['low']:.1%} – {r['high']:.1%}</td>"
            f"<td>{r['tasks']}</td><td>{r['samples']}</td></tr>"
            for r in evaluations
        )
        heads = ("", "step", "held-out success", "95 % interval", "tasks", "samples a task")
        head = "".join(f"<th>{name}</th>" for name in heads)
        parts.append(f"<table><tr>{head}</tr>{rows}</table>")
    parts += [f"<p class=warn>{html.escape(said)}</p>" for said in _warnings(steps)]
    if (run / "trees.html").is_file() and out.parent == run:
        parts.append('<p><a href="trees.html">the rollout trees of this run</a></p>')
    return f"<header>{''.join(parts)}</header>"


def _warnings(steps: Records) -> list[str]:
    """What went wrong, once each, with the steps at which it did."""
    seen: dict[str, list[tuple[int, str]]] = {}
    for record in steps:
        for kind, said in advice(record, steps[0]).items():
            seen.setdefault(kind, []).append((record["step"], said))
    return [
        f"{len(of_kind)} of {len(steps)} steps, the last one {of_kind[-1][0]}: {of_kind[-1][1]}"
        for of_kind in seen.values()
    ]


def _plots(records: Records, found: Sequence[_StepTrees]) -> list[_Plot]:
    steps, evaluations = _phase(records, "rl"), _phase(records, "eval")
    cold = [r for r in _phase(records, "sft") if "loss" in r]
    plots = []
    if steps or evaluations:
        plots.append(_learning(steps, evaluations, found))
    if any(each.depths or each.open for each in found):
        plots.append(_critical(found))
    if steps:
        plots += [_ends(steps), _calls(steps), _time(steps), _policy(steps)]
    if cold:
        plots.append(_cold(cold))
    return plots


def _learning(steps: Records, evaluations: Records, found: Sequence[_StepTrees]) -> _Plot:
    figure, axes = _axes()
    if found:
        x = [each.step for each in found]
        mean, half = np.array([each.success for each in found]).T
        axes.fill_between(x, mean - half, mean + half, color=_BLUE, alpha=0.15, lw=0)
    if steps:
        x, y = [r["step"] for r in steps], [r["success"] for r in steps]
        axes.plot(x, y, color=_BLUE, marker=".", label="training, within the trees")
    for at, record in enumerate(evaluations):
        y = record["success"]
        bars = [[max(0.0, y - record["low"])], [max(0.0, record["high"] - y)]]
        axes.errorbar(
            record["step"],
            y,
            bars,
            fmt="o",
            color=_GOOD,
            capsize=3,
            label="held out" if at == 0 else None,
        )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.set_xlabel("step")
    axes.legend()

    says = "Share of correct trajectories with 95 % intervals, those of training over tasks."
    if any(each.depths or each.open for each in found):
        says += " Probes start from failures: trees mostly show less success than held-out tasks."
    return _Plot("learning", "Success", says, figure)


def _critical(found: Sequence[_StepTrees]) -> _Plot:
    middle = (len(found) + 1) // 2
    halves = found[:middle], found[middle:]
    depths = [[depth for each in half for depth in each.depths] for half in halves]
    localized, unfinished = sum(map(len, depths)), sum(each.open for each in found)

    figure, axes = _axes()
    deepest = max((max(each) for each in depths if each), default=1)
    places = np.arange(1, deepest + 1)
    for side, (half, each, colour) in enumerate(zip(halves, depths, (_GREY, _BAD), strict=True)):
        if not half:
            continue
        counts = np.bincount(each, minlength=deepest + 1)[1:]
        first, last = half[0].step, half[-1].step
        label = f"steps {first} to {last}" if first < last else f"step {first}"
        axes.bar(places + 0.4 * side - 0.2, counts, 0.38, color=colour, label=label)
    axes.set_xlabel("step of the trajectory")
    axes.set_ylabel("searches")
    axes.legend()

    searches = localized + unfinished
    says = (
        f"First irrecoverable steps that searches found: {localized} of {searches}, "
        f"{unfinished} searches were ended by the budget."
    )
    return _Plot("critical", "Where trajectories become irrecoverable", says, figure)


def _ends(steps: Records) -> _Plot:
    names = sorted({name for r in steps for name in r if name.startswith("end_")})
    known = [name for end in _ENDS if (name := f"end_{end}") in names]
    labels, colours = zip(*(_ENDS[name.removeprefix("end_")] for name in known), strict=True)

    figure, axes = _axes()
    shares = [[r.get(name, 0.0) for r in steps] for name in known]
    _stack(axes, steps, shares, labels, colours)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))

    last = ", ".join(
        f"{steps[-1][name]:.1%} by {label}"
        for name, label in zip(known, labels, strict=True)
        if steps[-1].get(name)
    )
    return _Plot("ends", "How trajectories end", f"At the last step: {last}.", figure)


def _calls(steps: Records) -> _Plot:
    figure, axes = _axes()
    x = [r["step"] for r in steps]
    calls = [r["tool_calls"] for r in steps]
    axes.plot(x, calls, color=_BLUE)
    axes.set_ylim(0, 1.2 * max(*calls, 1.0))
    axes.set_xlabel("step")
    axes.set_ylabel("calls a trajectory", color=_BLUE)
    right = axes.twinx()
    right.grid(False)
    for name, label, colour in (
        ("tool_errors", "errors", "#e0a030"),
        ("malformed_calls", "malformed", _BAD),
    ):
        share = [r[name] / max(r["tool_runs"], 1) for r in steps]
        right.plot(x, share, color=colour, label=label)
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    _legend_above(right)

    runs = sum(r["tool_runs"] for r in steps)
    wrong = sum(r["malformed_calls"] for r in steps)
    says = f"{runs} calls in all, {wrong} of them could not be read; shares of calls on the right."
    return _Plot("calls", "Tool calls", says, figure)


def _time(steps: Records) -> _Plot:
    """By region, the largest ones; what else a step took is the rest."""
    found = {name for record in steps for name in record if name.startswith("time/")}
    sums = {name: sum(r.get(name, 0.0) for r in steps) for name in found - _SUMS}
    names = sorted(sums, key=lambda name: (-sums[name], name))[:_REGIONS_SHOWN]
    whole = [r.get("time/step", 0.0) for r in steps]
    columns = [[r.get(name, 0.0) for r in steps] for name in names]
    columns.append([all_of - sum(row) for all_of, *row in zip(whole, *columns, strict=True)])
    labels = [*(name.removeprefix("time/") for name in names), "the rest"]

    figure, axes = _axes()
    _stack(axes, steps, columns, labels, [f"C{at}" for at in range(len(labels))])
    axes.set_ylabel("seconds")

    total = sum(whole) or 1.0
    shares = zip(labels, map(sum, columns), strict=True)
    parts = ", ".join(f"{label} {value:.0f} s ({value / total:.0%})" for label, value in shares)
    return _Plot("time", "Time", f"Of {total:.0f} s in all: {parts}.", figure)


def _policy(steps: Records) -> _Plot:
    columns = {"entropy": "entropy, nats", "approx_kl": "KL to the sampler, nats"}
    columns["mismatch_mean"] = "engine against trainer, nats"

    figure, axes = _axes()
    for (name, label), colour in zip(columns.items(), (_BLUE, _BAD, _GREY), strict=True):
        rows = [(r["step"], r[name]) for r in steps if r.get(name) is not None]
        if rows:
            axes.plot(*zip(*rows, strict=True), color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend()

    first, last = steps[0]["entropy"], steps[-1]["entropy"]
    says = f"Means over tokens; entropy went from {first:.2g} to {last:.2g} nats."
    return _Plot("policy", "The policy", says, figure)


def _cold(cold: Records) -> _Plot:
    figure, axes = _axes()
    axes.plot([r["step"] for r in cold], [r["loss"] for r in cold], color=_BLUE)
    axes.set_yscale("log")
    axes.set_xlabel("update")
    axes.set_ylabel("loss, nats a token")

    says = f"Supervised fine-tuning, {len(cold)} updates; the loss ended at {cold[-1]['loss']:.3f}."
    return _Plot("sft", "Fine-tuning on demonstrations", says, figure)


def _stack(
    axes: Axes,
    steps: Records,
    rows: Sequence[Sequence[float]],
    labels: Sequence[str],
    colours: Sequence[Any],
) -> None:
    """Bars of a step each, one thing upon the other."""
    x, bottom = [r["step"] for r in steps], np.zeros(len(steps))
    for row, label, colour in zip(rows, labels, colours, strict=False):
        axes.bar(x, row, 0.9, bottom, color=colour, label=label)
        bottom += row
    axes.set_xlabel("step")
    _legend_above(axes)


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=len(_ENDS))


def _axes() -> tuple[Figure, Axes]:
    figure = new_figure(5.6, 3.1)
    axes = figure.subplots()
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator("auto", integer=True))
    return figure, axes


def _rendered(figure: Figure, kind: str) -> bytes:
    out = streams.BytesIO()
    figure.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _svg(figure: Figure) -> str:
    """Without its XML declaration and document type, which a page has no room for."""
    text = _rendered(figure, "svg").decode()
    return text[text.index("<svg") :]


def _configuration(run: Path, config: Config) -> str:
    """What differs from the defaults, then all of it."""
    theirs, ours = flat(parse_config({}).model_dump()), flat(config.model_dump())
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td><code>{html.escape(str(value))}</code></td></tr>"
        for key, value in ours.items()
        if theirs.get(key) != value
    )
    whole = html.escape((run / "config.yaml").read_text(encoding="utf-8"))
    return (
        "<section><h2>Configuration</h2><p class=dim>What differs from the defaults:</p>"
        f"<table>{rows}</table><details><summary>all of it</summary><pre>{whole}</pre></details>"
        "</section>"
    )


def _phase(records: Records, phase: str) -> Records:
    return [record for record in records if record["phase"] == phase]
