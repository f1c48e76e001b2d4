"""Progress for people: a live bar on a terminal; elsewhere lines with the time of day and the time
left, one a step and, where steps are long in coming, one a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_S = 60.0  # at most, between lines of a phase that advances


class Display:
    """Shows one phase at a time."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        _print(self.console, text)

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
        self._done = self._timed = done
        self._since: float | None = None  # `_timed` were done; before it kernels may be compiled
        self._spoke = time.monotonic()

    def say(self, text: str) -> None:
        _print(self._console, text)

    def detail(self, text: str) -> None:
        """Say what is going on within a unit; shown on terminals only."""
        self._progress.update(self._bar, figures=text)

    def advance(self, figures: str = "", *, units: int = 1, report: bool = True) -> None:
        """`units` more are done; `figures` is the one-line summary of the latest."""
        self._done += units
        self._progress.update(self._bar, advance=units, figures=figures)
        if self._console.is_terminal:
            if report and figures:
                self.say(f"{self._name:<12} {self._done:>4}/{self._total}  {figures}")
            return
        now = time.monotonic()
        if self._since is None:
            self._since, self._timed = now, self._done
        if report or now - self._spoke >= QUIET_S:
            self._spoke = now
            at = f"{self._name:<12} {self._done:>4}/{self._total}"
            self.say(f"{at}  left {self._left(now - self._since)}  {figures}".rstrip())

    def _left(self, passed_s: float) -> str:
        """Time for the units to come, if they take as long as those did that `passed_s` had."""
        done, to_do = self._done - self._timed, self._total - self._done
        if to_do and not done:
            return "?"
        return str(timedelta(seconds=round(passed_s / max(done, 1) * to_do)))


def _print(console: Console, text: str) -> None:
    stamp = "" if console.is_terminal else time.strftime("%Y-%m-%d %H:%M:%S  ")
    console.print(stamp + text, highlight=False, soft_wrap=True, markup=False)
