"""The benchmark beside TRL, on a tiny model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
# `bench` belongs to no distribution, and the root must not be on the path: `kernels/` lies there.
sys.modules.setdefault("bench", ModuleType("bench")).__path__ = [str(ROOT / "bench")]
peers = importlib.import_module("bench.peers.__main__")

TINY = ["--rounds", "1", "--rollouts", "2", "--tokens", "8", "--prompt-tokens", "12"]
TINY += ["--shape", "32", "1", "2", "1", "64", "--python", sys.executable]


def test_both_sides_do_the_same_work(tmp_path: Path) -> None:
    peers.main([*TINY, "--out", str(tmp_path), "--ours", "elpo"])
    saved = json.loads((tmp_path / "peers.json").read_text())
    theirs, ours = saved["turns"]
    assert (theirs["side"], ours["side"]) == ("trl", "elpo")
    assert theirs["steps"][0]["sampled"] == 2 * 2 * 8
    assert all(0 < t["steps"][0]["rollout"] < t["steps"][0]["seconds"] for t in saved["turns"])
    assert "times TRL's speed" in (tmp_path / "peers.md").read_text()


def test_another_gradient_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(side: str, job: Path, python: str) -> dict[str, object]:
        (job.parent / "probe.json").write_text('{"grad_norm": 1.0}')
        step = {"seconds": 2.0, "cpu": 2.0, "rollout": 1.0}
        return {"side": side, "grad_norm": 1.01, "steps": [step], "peak_bytes": 1}

    monkeypatch.setattr(peers, "run", run)
    monkeypatch.setattr(peers, "write_model", lambda *_: ["Day 0."])
    with pytest.raises(SystemExit, match="not do the same work"):
        peers.main([*TINY, "--out", str(tmp_path)])
