"""`elpo watch`: a run as it goes, in a terminal.

Only the run folder is read, so that it may be a run of another process, or on another machine that
shares the folder. Curves are of the whole run; memory is known since watching began.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elpo_fast.algo import score
from elpo_fast.config import run_config
from elpo_fast.lock import holder
from elpo_fast.report.show import decoder, interesting, saved_steps
from elpo_fast.report.tree_view import render_tree
from elpo_fast.train.advice import advice
from elpo_fast.train.summary import read_metrics
from elpo_fast.tree import io

Records = Sequence[Mapping[str, Any]]

POLL_S = 2.0
_BARS = "▁▂▃▄▅▆▇█"
_CURVE = 32  # columns
_RECENT = 5  # steps that tell how long the next ones take

# What is shown of a step, and how.
_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "success": ("success, training", "{:.1%}".format),
    "failures_localized": ("failures localized", "{:.0%}".format),
    "tool_calls": ("calls a trajectory", "{:.1f}".format),
    "entropy": ("entropy, nats", "{:.3g}".format),
    "approx_kl": ("KL to the sampler, nats", "{:.2g}".format),
    "mismatch_mean": ("engine against trainer, nats", "{:.2g}".format),
    "grad_norm": ("gradient norm", "{:.2g}".format),
    "time/collect": ("collecting, s", "{:.1f}".format),
    "time/train": ("training, s", "{:.1f}".format),
    "generated_per_s": ("generated tokens a second", "{:,.0f}".format),
    "trained_tokens_per_s": ("trained tokens a second", "{:,.0f}".format),
}


def watch(run: Path, console: Console | None = None, *, once: bool = False) -> None:
    """Show a run until it ends; `once`, or where nobody looks, how it stands. Raises `LookupError`
    for what is no run."""
    console = console or Console()
    view = _View(run)
    if console.is_terminal and not once and view.running:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while view.running:
                live.update(view.drawn(), refresh=True)
                time.sleep(POLL_S)
    console.print(view.drawn())


class _View:
    """What is known of a run."""

    def __init__(self, run: Path) -> None:
        self.run, self.config = run, run_config(run)
        self._memory: list[float] = []  # GiB
        self._tree: tuple[Path, list[RenderableType]] | None = None  # the latest step's

    @property
    def running(self) -> bool:
        """Whether a process has the run; of one elsewhere the folder alone can tell."""
        held = holder(self.run)
        return held is not None and (held[1] != socket.gethostname() or psutil.pid_exists(held[0]))

    def drawn(self) -> Group:
        records = read_metrics(self.run)
        steps = [record for record in records if record["phase"] == "rl"]
        parts: list[RenderableType] = [self._title(records, steps), self._curves(records, steps)]
        if steps:
            first, last = steps[0], steps[-1]
            parts += [Text(f"warning: {said}", "yellow") for said in advice(last, first).values()]
        return Group(*parts, *self._latest_tree())

    def _title(self, records: Records, steps: Records) -> Text:
        said = [f"step {len(steps)} of {self.config.train.steps}"]
        if not steps:
            said = [
                f"{records[-1]['phase']}, step {records[-1]['step']}" if records else "starting"
            ]
        left = self.config.train.steps - len(steps)
        if not self.running:
            said.append("not running")
        elif steps and left:
            recent = [r["time/collect"] + r["time/train"] for r in steps[-_RECENT:]]
            said.append(f"{timedelta(seconds=round(np.mean(recent) * left))} left")
        return Text(self.run.name, "bold").append(" · " + " · ".join(said), "not bold")

    def _curves(self, records: Records, steps: Records) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        table.add_column("since the beginning", width=_CURVE)
        for name in ("first", "now"):
            table.add_column(name, justify="right")
        rows = [(title, shown, _column(steps, name)) for name, (title, shown) in _FIGURES.items()]
        cold = _column([r for r in records if r["phase"] == "sft"], "loss")
        rows.append(("loss of fine-tuning", "{:.3f}".format, cold))
        rows.append(("memory, GiB", "{:.1f}".format, self._memory_now()))
        evaluations = [record for record in records if record["phase"] == "eval"]
        if evaluations:
            first, last = evaluations[0], evaluations[-1]
            curve = bars([record["success"] for record in evaluations])
            now = f"{last['success']:.1%} ({last['low']:.0%}-{last['high']:.0%})"
            table.add_row("success, held out", curve, f"{first['success']:.1%}", now)
        for title, shown, values in rows:
            if values:
                table.add_row(title, bars(values), shown(values[0]), shown(values[-1]))
        return table

    def _memory_now(self) -> list[float]:
        """Of the run's process, since watching began. What it forked shares it."""
        held = holder(self.run)
        if held is not None and held[1] == socket.gethostname():
            with suppress(psutil.NoSuchProcess):
                self._memory.append(psutil.Process(held[0]).memory_info().rss / 2**30)
        return self._memory

    def _latest_tree(self) -> list[RenderableType]:
        files = saved_steps(self.run)
        if not files or not (self.run / "tokenizer").is_dir():
            return []
        step = max(files)
        if self._tree is None or self._tree[0] != files[step]:
            forest = io.load(files[step])
            tree = interesting(forest)
            scored = score(forest, self.config.algo)
            title = Text(f"\nstep {step}, tree {tree}: {forest.task_ids[tree]}", "bold")
            drawn = render_tree(forest, tree, scored, decoder(self.run))
            self._tree = files[step], [title, drawn]
        return self._tree[1]


def _column(records: Records, name: str) -> list[float]:
    return [float(record[name]) for record in records if record.get(name) is not None]


def bars(values: Sequence[float], width: int = _CURVE) -> str:
    """A curve of at most `width` characters, from its lowest to its highest value."""
    chunks = np.array_split(np.asarray(values, float), min(width, len(values)))
    means = np.array([chunk.mean() for chunk in chunks])
    span = means.max() - means.min()
    heights = (means - means.min()) / span if span > 0 else np.full(len(means), 0.5)
    return "".join(_BARS[round(height * (len(_BARS) - 1))] for height in heights)
