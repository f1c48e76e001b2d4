"""`elpo analyse KIND`: one question about searches, answered by a table and a plot.

Each writes `KIND.md`, `.csv`, `.png` and `.svg`. `saved` asks the trees of a run, `simulated`
scripted policies, `sampled` fresh trees of a run's policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from elpo_fast.report.plots import save_figure
from elpo_fast.report.tables import markdown, write_csv


@dataclass(frozen=True)
class Analysis:
    title: str
    rows: Sequence[Mapping[str, Any]]  # at least one
    figure: Figure
    note: str  # what the columns are


def write_analysis(out: Path, kind: str, found: Analysis) -> Path:
    """The page of an analysis, which is written to the folder `out` with its table and plot."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / f"{kind}.csv", found.rows)
    save_figure(found.figure, out / kind)
    page = out / f"{kind}.md"
    page.write_text(
        f"# {found.title}\n\n![{found.title}]({kind}.png)\n\n{markdown(found.rows)}\n\n"
        f"{found.note}\n",
        encoding="utf-8",
    )
    return page
