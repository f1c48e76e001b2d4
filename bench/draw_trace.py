"""A picture of a trace of `elpo profile`: one row a track, one colour a name.

python -m bench.draw_trace runs/NAME/profile/trace.json.gz trace.png [--from S] [--to S]
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

LEAST = 1 / 3000  # of the width, that short spans are seen


def draw(trace: dict[str, Any], begin: float = 0.0, end: float | None = None) -> Figure:
    """What lies between two moments, in seconds from the trace's beginning."""
    events = trace["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    last = max((e["ts"] + e["dur"]) / 1e6 for e in spans) if end is None else end
    rows = {tid: row for row, tid in enumerate(sorted(tracks))}
    colours: dict[str, Any] = {}
    palette = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    figure = Figure(figsize=(14, 1.5 + 0.16 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for tid, row in rows.items():
        kind = tracks[tid].split()[0]
        by_name: dict[str, list[tuple[float, float]]] = {}
        for span in spans:
            if span["tid"] == tid:
                name = {"trajectories": "trajectory", "gpu": "kernel"}.get(kind, span["name"])
                length = max(span["dur"] / 1e6, LEAST * (last - begin))
                by_name.setdefault(name, []).append((span["ts"] / 1e6, length))
        for name, bars in by_name.items():
            colour = colours.setdefault(name, palette[len(colours) % len(palette)])
            axes.broken_barh(bars, (row - 0.45, 0.9), color=colour, linewidth=0)
    kinds = [tracks[tid].split()[0] for tid in rows]
    first = [row for row, kind in enumerate(kinds) if kind not in kinds[:row]]
    axes.set_yticks(first, [kinds[row] for row in first])
    axes.set_xlim(begin, last)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("seconds")
    legend = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=legend, loc="outside upper center", ncols=10, fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="begin", type=float, default=0.0, help="seconds")
    parser.add_argument("--to", dest="end", type=float, help="seconds")
    options = parser.parse_args()
    trace = json.loads(gzip.decompress(options.trace.read_bytes()))
    draw(trace, options.begin, options.end).savefig(options.out, dpi=100)


if __name__ == "__main__":
    main()
