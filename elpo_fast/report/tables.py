"""Tables of one form: rows are mappings with the same names, as CSV and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """At least one row."""
    first, *others = rows
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, first.keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows([first, *others])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """At least one row; the first column to the left, numbers to three digits."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    lines += ["| " + " | ".join(map(_shown, row.values())) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
