"""The endurance run of `bench/soak_tools.py`, shortened: no growth, nothing left."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "soak_tools.py"


def test_thousands_of_mixed_calls_leave_nothing_behind(make_box, tmp_path) -> None:
    box = make_box()  # skips, with the reason, where nothing safe can be had
    isolation = asyncio.run(box.sandbox.describe()).isolation
    box.close()
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SCRIPT), "--calls", "2000", "--out", str(out)]
    command += ["--isolation", isolation]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert sum(record["made"].values()) == 2000 and record["killed_servers"] == 2
    assert record["growth"]["processes"] == 0 == record["processes_after_close"]
