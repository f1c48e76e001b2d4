"""The GPU benchmark's code, on a CPU and in Triton's interpreter, so that it is not stale."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
# `bench` belongs to no distribution, and the root must not be on the path: `kernels/` lies there.
sys.modules["bench"] = ModuleType("bench")
sys.modules["bench"].__path__ = [str(ROOT / "bench")]

from bench.gpu import __main__ as gpu  # noqa: E402
from bench.gpu.part import Part  # noqa: E402


def test_benchmarks_import_what_is_there() -> None:
    for path in sorted((ROOT / "bench").glob("*.py")):
        importlib.import_module(f"bench.{path.stem}")


def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--out", str(out)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    parts = json.loads(out.read_text())["parts"]
    assert set(parts) == set(gpu.NAMES)
    assert all(part["rows"] and not part["faults"] for part in parts.values())
    assert run.stdout.rstrip().endswith("0 faults")
    copy = tmp_path / "elpo_fast_gpu" / "results.json"
    assert json.loads(copy.read_text()) == json.loads(out.read_text())


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Results:
    monkeypatch.setattr(gpu, "TEMPORARY", tmp_path)
    monkeypatch.chdir(ROOT)
    return gpu.Results([tmp_path / "out.json", tmp_path / "copy.json"], {"device": "cpu"})


def test_what_hangs_is_ended_and_the_next_part_runs(
    results: gpu.Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STAGES", ({"ceilings": 0.0}, {"correct_attention": 75}))
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    gpu.run_all(["ceilings", "correct_attention"], 900, results, tiny=True)
    parts = results.all["parts"]
    assert any("was ended" in fault for fault in parts["ceilings"]["faults"])
    assert parts["correct_attention"]["rows"] and not parts["correct_attention"]["faults"]
    again = gpu.Results(results.files[1:], {"device": "cpu"})
    assert again.done("correct_attention") and not again.done("ceilings")
    assert not gpu.Results(results.files, {"device": "another"}).done("correct_attention")


def test_nothing_begins_when_time_is_up(results: gpu.Results) -> None:
    gpu.run_all(["ceilings", "loss"], 0, results, tiny=True)
    assert all("time was up" in part["faults"][0] for part in results.all["parts"].values())


def test_a_fault_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    part = Part(tmp_path / "part.json", 60, tiny=True, ahead=False)

    def broken() -> None:
        raise RuntimeError("no such luck")

    assert set(part.interleaved("x", {"broken": broken, "fine": lambda: None})) == {"fine"}
    written = json.loads(part.out.read_text())
    assert written["faults"] == ["x broken: RuntimeError: no such luck"]
