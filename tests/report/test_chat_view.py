"""`elpo show` on runs and files, for terminals and pipes; evaluations: see `test_evaluation`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from elpo_fast import cli
from elpo_fast.report.chat_view import paged, show_chats
from elpo_fast.report.tree_view import LOCALIZED
from elpo_fast.tree import io as trees

CHAT = [
    {"role": "user", "content": "add 7"},
    {"role": "assistant", "content": "so <code>x = x + 7\nprint(x)</code>"},
    {"role": "tool", "content": "46"},
]


@pytest.fixture
def run(thousand: Path, characters, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("elpo_fast.report.chat_view.decoder", lambda _: characters)
    return thousand


def printed(source: Path, *, width: int = 200, terminal: bool = False, **chosen) -> str:
    out = io.StringIO()
    show_chats(
        source, console=Console(file=out, width=width, force_terminal=terminal or None), **chosen
    )
    return out.getvalue()


def test_a_run_shows_the_trajectories_of_its_latest_step(run: Path):
    text = printed(run, task="task-7")
    assert text.count("task-7 · step 10 · tree 7 · sample ") == 12
    assert text.count("task-7 · step 10 · tree 57 · sample ") == 12
    assert "user:\nAdd 7, then double it." in text
    assert "assistant:\n→\nx = x + 7\ntool:\n46\n" in text


def test_what_is_chosen_is_what_is_shown(run: Path):
    forest = trees.load(run / "trees" / "step_000003.npz")
    wanted = [tree for tree, task in enumerate(forest.task_ids) if "task-4" in task]
    correct = np.concatenate([forest.correct[forest.leaf_node[forest.leaves(t)]] for t in wanted])
    text = printed(run, step=3, task="task-4")
    assert text.count(" · step 3 · ") == 12 * len(wanted) == 12 * 22
    assert text.count("✓ ") == (correct == 1).sum()
    failed = printed(run, step=3, task="task-4", failed=True)
    assert failed.count("✗ ") == (correct == 0).sum() and "✓" not in failed
    localized = forest.critical_node[forest.critical_localized]
    assert failed.count(LOCALIZED) >= np.isin(forest.tree[localized], wanted).sum() > 0
    with pytest.raises(LookupError, match="no failed trajectory of a task 'task-99' of step 3"):
        printed(run, step=3, failed=True, task="task-99")


def test_rows_of_a_file_have_steps_or_not(tmp_path: Path):
    file = tmp_path / "chats.jsonl"
    rows = [{"messages": CHAT, "task": f"t{step}", "step": step} for step in (1, 2)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert "t2" in printed(file, step=2) and "t1" not in printed(file, step=2)
    with pytest.raises(LookupError, match="has no trajectory of step 3"):
        printed(file, step=3)


@pytest.mark.parametrize("width", [30, 80])
def test_a_terminal_wraps_words_and_a_pipe_keeps_lines(tmp_path: Path, width: int):
    file = tmp_path / "chats.jsonl"
    long = "seven " * 40
    file.write_text(json.dumps({"messages": [{"role": "user", "content": long.strip()}]}) + "\n")
    assert long.strip() in printed(file, width=width)
    lines = Text.from_ansi(printed(file, width=width, terminal=True)).plain.splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines[2:]).split()) == long.strip()


def test_calls_are_coloured_and_cannot_steer_the_terminal(tmp_path: Path):
    file = tmp_path / "chats.jsonl"
    evil = "<code>x = '\x1b[2J\u202e'</code>"
    chat = [*CHAT, {"role": "assistant", "content": evil}]
    file.write_text(json.dumps({"messages": chat}) + "\n")
    plain, coloured = printed(file), printed(file, terminal=True)
    assert "so\n→\nx = x + 7\nprint(x)\n" in plain
    assert "\x1b" not in plain and "\x1b[2J" not in coloured and "\u202e" not in coloured
    assert "\x1b[" in coloured


def test_a_terminal_gets_a_pager_and_leaving_it_is_no_fault(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = tmp_path / "seen"
    monkeypatch.setenv("PAGER", f"head -n 3 > {seen}")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=50)
    with paged(terminal) as console:
        assert console is not terminal and console.width == 50
        show_chats(run, console=console)
        raise AssertionError("the pager was left long before")
    assert "task-0" in seen.read_text()
    pipe = Console(file=io.StringIO())
    with paged(pipe) as console:
        assert console is pipe


def test_the_command_prints_where_nobody_scrolls(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("PAGER", "false")
    arguments = ["show", str(run), "--task", "task-7", "--step", "1", "--no-pager"]
    assert cli.main(arguments) == 0
    assert "task-7" in capsys.readouterr().out
