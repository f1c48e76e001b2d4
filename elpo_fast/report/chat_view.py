"""`elpo show`: trajectories as chats in the terminal.

What a model wrote must not steer the terminal: characters that do not print are replaced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.syntax import Syntax
from rich.text import Text

from elpo_fast.config import is_run
from elpo_fast.eval.evaluation import TRAJECTORIES
from elpo_fast.eval.trajectories import Record, read_trajectories
from elpo_fast.report.readable import node_text, read_message, read_prompt, read_response
from elpo_fast.report.show import decoder, step_file
from elpo_fast.report.tree_view import critical_nodes, critical_sign
from elpo_fast.tree import io, ops

_COLOURS = {"system": "dim", "user": "bold", "assistant": "cyan", "tool": "yellow"}
_PYTHON = Syntax("", "python", theme="ansi_dark", background_color="default")
_PAGER = "less"
_LESS = "FRX"  # leave where all fits on a screen, show colours, leave the screen as it is


def show_chats(
    source: Path,
    *,
    failed: bool = False,
    task: str | None = None,
    step: int | None = None,
    console: Console | None = None,
) -> None:
    """Print the trajectories of a run's step (by default the latest), of an evaluation's folder or
    of a file of JSON lines: all, or those judged wrong, of tasks whose id contains `task`. Raises
    `LookupError` where there are none."""
    console = console or Console()
    shown = 0
    for record in _records(source, step):
        right_task = task is None or task in str(record.get("task"))
        if right_task and not (failed and record.get("correct") is not False):
            _show(record, console)
            shown += 1
    if not shown:
        wanted = "failed " * failed + "trajectory" + (f" of a task {task!r}" if task else "")
        wanted += f" of step {step}" if step is not None else ""
        raise LookupError(f"{source} has no {wanted}")


@contextmanager
def paged(console: Console) -> Iterator[Console]:
    """A console whose output can be scrolled, in `$PAGER` or `less`; the same one where it is no
    terminal or there is no pager. Leaving the pager ends the block."""
    command = os.environ.get("PAGER", _PAGER if shutil.which(_PAGER) else "")
    if not (console.is_terminal and command):
        yield console
        return
    environment = {"LESS": _LESS, **os.environ}
    pager = subprocess.Popen(
        command, shell=True, stdin=subprocess.PIPE, text=True, errors="replace", env=environment
    )
    assert pager.stdin is not None
    try:
        yield _Paged(file=pager.stdin, force_terminal=True, width=console.width)
    except _Left:
        pass
    finally:
        with suppress(BrokenPipeError):
            pager.stdin.close()
        pager.wait()


class _Left(Exception):
    """The reader has seen enough."""


class _Paged(Console):
    def on_broken_pipe(self) -> None:
        raise _Left


def _records(source: Path, step: int | None) -> Iterator[Record]:
    if is_run(source) and not (source / TRAJECTORIES).is_file():
        return _of_run(source, step)
    records = read_trajectories(source / TRAJECTORIES if source.is_dir() else source)
    return (record for record in records if step is None or record.get("step") == step)


def _of_run(run: Path, step: int | None) -> Iterator[Record]:
    """The trajectories of a run's step, tree by tree in sampling order; an assistant's message says
    under `note` what a search found out about it."""
    step, file = step_file(run, step)
    forest, decode = io.load(file), decoder(run)
    critical, written = critical_nodes(forest), ops.segment_sum(forest.token_start, forest.agent)

    def text(node: int, agent: bool) -> str:
        return node_text(forest, node, decode, agent=agent)

    for tree, task in enumerate(forest.task_ids):
        leaves = forest.leaves(tree)
        for leaf in leaves:
            root, *steps = forest.path(int(forest.leaf_node[leaf]))
            messages = read_prompt(text(root, False))
            for node in steps:
                said: dict[str, Any] = {"role": "assistant", "content": text(node, True)}
                if node in critical:
                    said["note"] = critical_sign(critical[node])
                messages.append(said)
                if heard := read_response(text(node, False)):
                    messages.append({"role": "tool", "content": heard})
            bottom = steps[-1]
            yield {
                "task": task,
                "step": step,
                "tree": tree,
                "sample": leaf - leaves.start,
                "correct": bool(forest.correct[bottom] == 1),
                "reward": float(forest.reward[bottom]),
                "end": forest.ends[leaf],
                "reason": forest.reasons[leaf],
                "tool_calls": int(forest.tool_call[steps].sum()),
                "tokens": int(written[steps].sum()),
                "messages": messages,
            }


def _show(record: Record, console: Console) -> None:
    title = Text(_printable(str(record.get("task", "chat"))), "bold")
    for name in ("step", "tree", "sample"):
        if name in record:
            title.append(f" · {name} {record[name]}")
    console.print(Rule(title, align="left"))
    for message in record["messages"]:
        role = str(message["role"])
        line = Text(f"{_printable(role)}:", _COLOURS.get(role, "bold"))
        if "note" in message:
            line.append(f" {_printable(str(message['note']))}", "bold red")
        console.print(line, soft_wrap=True)
        _print_message(message, role, console)
    if "correct" in record:
        mark, colour = ("✓", "green") if record["correct"] else ("✗", "red")
        figures = f"reward {record['reward']:g}, ended by {record['end']}"
        tokens = f"{record['tokens']} tokens, {record['tool_calls']} calls"
        verdict = f"{mark} {record['reason']} ({figures}, {tokens})"
        _print(Text(_printable(verdict), colour), console, indent=0)
    console.print()


def _print_message(message: dict[str, Any], role: str, console: Console) -> None:
    """A message's text and its calls, in it or apart from it."""
    text = str(message.get("content") or "")
    parts = [f"→ {call.get('function', call)}" for call in message.get("tool_calls") or ()]
    code = ""
    if role == "assistant":
        text, call = read_message(text)
        if call is not None:
            code = _printable(str(call)).strip("\n")
            parts.append(f"→ {call.name}{' (malformed)' * call.malformed}".rstrip())
    for part in (text.strip("\n"), *parts):
        if part:
            _print(Text(_printable(part)), console)
    if code:
        written = _PYTHON.highlight(code) if console.is_terminal else Text(code)
        _print(written, console, indent=4)


def _print(text: Text, console: Console, indent: int = 2) -> None:
    """Wrapped at the terminal's width; elsewhere lines stay whole."""
    text.rstrip()
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent)))
    else:
        console.print(text, soft_wrap=True)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
