"""The siege of `bench/mutate_tools.py`, shortened: every innocent answer is right, nothing left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "mutate_tools.py"


@pytest.mark.parametrize("isolation", ["bubblewrap", "landlock"])
def test_innocents_beside_mutated_attacks_get_right_answers(
    make_box, tmp_path, isolation: str
) -> None:
    make_box(isolation).close()  # skips, with the reason, where it cannot be had
    out = tmp_path / "siege.json"
    command = [sys.executable, str(SCRIPT), "--calls", "300", "--isolation", isolation]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads(out.read_text())
    ended = {how: number for how, number in record["ended"].items() if how != "snapshot lost"}
    assert sum(ended.values()) >= 300 and record["innocent_answers"] > 100
