"""`elpo watch`: how a run stands, while it goes and afterwards."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from elpo_fast import cli
from elpo_fast.lock import Lock, holder
from elpo_fast.report import watch as module
from elpo_fast.report.tree_view import LOCALIZED
from elpo_fast.report.watch import bars, watch


@pytest.fixture
def watched(run: Path, characters, monkeypatch: pytest.MonkeyPatch) -> Path:
    (run / "tokenizer").mkdir()
    monkeypatch.setattr(module, "decoder", lambda _: characters)
    return run


def shown(run: Path, *, terminal: bool = False, **how) -> str:
    out = io.StringIO()
    watch(run, Console(file=out, width=120, force_terminal=terminal or None), **how)
    return out.getvalue()


def rows(text: str) -> dict[str, list[str]]:
    return {line[:29].strip(): line[29:].split() for line in text.splitlines()}


def test_a_run_that_ended_is_shown_once(watched: Path):
    text = shown(watched)
    assert text.startswith("run · step 3 of 8 · not running\n")
    records = list(map(json.loads, (watched / "metrics.jsonl").read_text().splitlines()))
    first, last = (record for record in records if record["phase"] == "rl" and record["step"] != 2)
    curves = rows(text)
    said = [f"{first['success']:.1%}", f"{last['success']:.1%}"]
    assert curves["success, training"][1:] == said
    assert curves["success, held out"] == ["▁█", "35.0%", "69.0%", "(64%-75%)"]
    assert curves["KL to the sampler, nats"] == ["▁▅█", "0.01", "0.03"]
    assert curves["loss of fine-tuning"] == ["█▃▁", "6.000", "2.000"]
    assert "memory, GiB" not in curves and LOCALIZED in text and "step 3, tree" in text


def test_a_run_that_goes_on_is_watched_until_its_end(
    watched: Path, monkeypatch: pytest.MonkeyPatch
):
    lines = (watched / "metrics.jsonl").read_text().splitlines(keepends=True)
    (watched / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # being written
    lock = Lock(watched)
    polls = []

    def sleep(_: float) -> None:
        polls.append((watched / "metrics.jsonl").read_text().count("\n"))
        if len(polls) == 1:
            (watched / "metrics.jsonl").write_text("".join(lines[:6]))
        else:
            lock.release()

    monkeypatch.setattr(module.time, "sleep", sleep)
    text = shown(watched, terminal=True)
    assert polls == [3, 6]
    assert "sft, step 3" in text and "step 2 of 8" in text and "0:00:24 left" in text
    assert "memory, GiB" in text
    assert text.rindex("not running") > text.rindex("0:00:24 left")


def test_what_is_wrong_is_said_with_its_remedy(watched: Path):
    lines = (watched / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-2])
    lines[-2] = json.dumps({**last, "malformed_calls": 50})
    (watched / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "warning: 50 of 100 tool calls cannot be read; show the format" in shown(watched)


def test_a_run_that_only_begins_has_a_title(watched: Path):
    (watched / "metrics.jsonl").unlink()
    lock = Lock(watched)
    assert holder(watched) is not None
    assert shown(watched, once=True).startswith("run · starting\n")
    lock.release()
    assert holder(watched) is None


def test_the_process_of_a_run_that_was_killed_is_not_running(watched: Path):
    import socket

    (watched / ".lock").write_text(f"process 999999999 on {socket.gethostname()}")
    assert "not running" in shown(watched, terminal=True)


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["watch", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_bars_keep_the_shape_of_long_curves():
    assert bars([0, 1, 2, 3], 4) == "▁▃▆█"
    assert bars([5.0] * 3) == "▅▅▅"
    assert bars(range(1000), 8) == "▁▂▃▄▅▆▇█"
