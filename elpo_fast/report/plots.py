"""What all plots have in common: each is written as PNG and as SVG, without a display."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches wide and high."""
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """`path` with the suffixes `.png` and `.svg`; equal figures give equal files."""
    figure.savefig(path.with_suffix(".png"), dpi=120)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
