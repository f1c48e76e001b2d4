"""The GPU benchmark's code, on a CPU and in Triton's interpreter, so that it is not stale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_gpu_training_runs(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu_training", "--tiny", "--models", "7b", "--out", str(out)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    results = json.loads(out.read_text())
    assert results["failures"] == []
    assert {line.split()[0] for line in results["check"]} == {"sdpa", "path", "triton"}
    assert {"trees-triton", "rows-path"} <= results["training"][0]["ms"].keys()
