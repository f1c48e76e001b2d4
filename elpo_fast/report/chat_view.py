"""`elpo show FILE`: trajectories as chats in the terminal.

What a model wrote must not steer the terminal: characters that do not print are replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from elpo_fast.eval.evaluation import TRAJECTORIES
from elpo_fast.eval.trajectories import Record, read_trajectories

_COLOURS = {"system": "dim", "user": "bold", "assistant": "cyan", "tool": "yellow"}


def show_chats(
    file: Path, *, failed: bool = False, task: str | None = None, console: Console | None = None
) -> None:
    """Print the trajectories of a file of JSON lines, or of an evaluation's folder: all, or those
    judged wrong, of tasks whose id contains `task`. Raises `LookupError` where there are none."""
    console = console or Console()
    if (file / "config.yaml").is_file() and not (file / TRAJECTORIES).is_file():
        raise LookupError(
            f"{file} is a training run, which keeps trees: elpo tree show {file} draws one, and "
            f"elpo eval {file} writes trajectories to read"
        )
    file = file / TRAJECTORIES if file.is_dir() else file
    shown = 0
    for record in read_trajectories(file):
        right_task = task is None or task in str(record.get("task"))
        if right_task and not (failed and record.get("correct") is not False):
            _show(record, console)
            shown += 1
    if not shown:
        wanted = "failed " * failed + "trajectory" + (f" of a task {task!r}" if task else "")
        raise LookupError(f"{file} has no {wanted}")


def _show(record: Record, console: Console) -> None:
    title = Text(_printable(str(record.get("task", "chat"))), "bold")
    if "sample" in record:
        title.append(f" · sample {record['sample']}")
    console.print(Rule(title, align="left"))
    for message in record["messages"]:
        role = str(message["role"])
        console.print(Text(f"{_printable(role)}:", _COLOURS.get(role, "bold")))
        console.print(Text(_printable(_said(message))), soft_wrap=True)
    if "correct" in record:
        mark, colour = ("✓", "green") if record["correct"] else ("✗", "red")
        figures = f"reward {record['reward']:g}, ended by {record['end']}"
        tokens = f"{record['tokens']} tokens, {record['tool_calls']} calls"
        verdict = f"{mark} {record['reason']} ({figures}, {tokens})"
        console.print(Text(_printable(verdict), colour), soft_wrap=True)
    console.print()


def _said(message: dict[str, Any]) -> str:
    """A message's text and its calls, if they are apart from it."""
    parts = [str(message.get("content") or "")]
    for call in message.get("tool_calls") or ():
        parts.append(f"→ {call.get('function', call)}")
    return "\n".join(part for part in parts if part)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
