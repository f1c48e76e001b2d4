"""Progress for people: a live bar on a terminal, one line a step elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """Shows one phase at a time."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Phase]:
        """A phase of `total` units, of which `done` are behind us."""
        progress = Progress(
            TextColumn("[bold]{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        with progress:
            yield Phase(self.console, progress, name, total, done)


class Phase:
    """Handle of a running phase."""

    def __init__(
        self, console: Console, progress: Progress, name: str, total: int, done: int
    ) -> None:
        self._console, self._progress, self._name, self._total = console, progress, name, total
        self._bar = progress.add_task(name, total=total, completed=done, figures="")
        self._done = done

    def detail(self, text: str) -> None:
        """Say what is going on within a unit; shown on terminals only."""
        self._progress.update(self._bar, figures=text)

    def advance(self, figures: str = "", *, units: int = 1, report: bool = True) -> None:
        """`units` more are done; `figures` is the one-line summary of the latest."""
        self._done += units
        self._progress.update(self._bar, advance=units, figures=figures)
        if report:
            line = f"{self._name:<12} {self._done:>4}/{self._total}  {figures}"
            if not self._console.is_terminal or figures:
                self._console.print(line, highlight=False, soft_wrap=True)
