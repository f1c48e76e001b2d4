"""What a run achieved, read back from its `metrics.jsonl`: the table at the end of `elpo train`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elpo_fast.train.costs import DEFINED

DURING = "during training"  # evaluations that the table leaves out


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order, perhaps none; one that is being written at the moment is left
    out."""
    file = run / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = text.splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def reproducible(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records without what depends on the moment: times and what was done in them, and how many
    prompt tokens happened to be in the engine's cache. All else a run that was killed and resumed
    has like one that never stopped: bitwise on the CPU, in one process of one thread."""

    def of_the_moment(name: str) -> bool:
        return (
            "seconds" in name
            or name in ("mfu", "device_idle")
            or name.startswith(("time/", *(f"{kind}/" for kind in DEFINED)))
            or name.endswith(("_per_s", "tokens_cached", "tokens_computed"))
        )

    return [
        {name: value for name, value in record.items() if not of_the_moment(name)}
        for record in records
    ]


def print_summary(run: Path, console: Console) -> None:
    """Held-out loss and success before, between and after, localization, and where to look next."""
    records = read_metrics(run)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    losses = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    if losses:
        say(f"held-out loss: {losses[0]:.3f} before SFT, {losses[-1]:.3f} after")
    shown = [r for r in records if r["phase"] == "eval" and r["name"] != DURING]
    if shown:
        table = Table(title="Held-out success", title_justify="left")
        table.add_column("stage")
        for name in ("success", "95 % interval", "tasks", "samples a task"):
            table.add_column(name, justify="right")
        for record in shown:
            table.add_row(
                record["name"],
                f"{record['success']:.1%}",
                f"{record['low']:.1%} - {record['high']:.1%}",
                str(record["tasks"]),
                str(record["samples"]),
            )
        console.print(table)
    steps = [record for record in records if record["phase"] == "rl"]
    failures = sum(record["failures"] for record in steps)
    if failures and any(record["searches"] for record in steps):
        localized = sum(record["failures_localized"] * record["failures"] for record in steps)
        share = localized / failures
        say(f"failed trajectories with a localized step: {share:.1%} of {failures}")
    say(f"run folder: {run}\nthe model: {run / 'model'}")
    if any((run / "trees").glob("*.npz")):
        say(f"its trees: elpo tree html {run}")
    say(f"what it did: elpo report {run}")
