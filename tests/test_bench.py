"""The GPU benchmark's code, on a CPU and in Triton's interpreter, so that it is not stale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def gpu_training(out: Path, *options: str, before: str = "", interpreted: bool = True) -> Any:
    """The finished process, after its module `g` was changed by the code `before`."""
    arguments = ["gpu_training", "--tiny", "--out", str(out), *options]
    code = f"import sys; sys.argv = {arguments!r}\nfrom bench import gpu_training as g\n"
    return subprocess.run(
        [sys.executable, "-c", f"{code}{before}\ng.main()"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_gpu_training_runs(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run = gpu_training(out, "--models", "7b")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    results = json.loads(out.read_text())
    assert results["failures"] == []
    assert {line.split()[0] for line in results["check"]} == {"sdpa", "path", "triton"}
    assert {"trees-triton", "rows-path"} <= results["training"][0]["ms"].keys()


BROKEN = """
def broken(*arguments):
    raise RuntimeError("no such luck")

make, backward = g.make_model, g.backward
def only_trees_of_7b(run, policy, attention, batches):
    if policy.name == "7b" and sum(len(batch.trees) for batch in batches) > 2:
        broken()
    return backward(run, policy, attention, batches)

def make_model(run, name):
    if name == "1.5b":
        broken()
    made = make(run, name)
    made.name = name
    return made

g.BACKENDS["sdpa"], g.make_model, g.backward = broken, make_model, only_trees_of_7b
"""


def test_gpu_training_keeps_what_the_broken_did_not_touch(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run = gpu_training(out, before=BROKEN, interpreted=False)
    assert run.returncode == 1
    results = json.loads(out.read_text())
    assert {line.split()[0] for line in results["check"]} == {"path"}
    times = {row["model"]: set(row["ms"]) for row in results["training"]}
    assert times == {"0.5b": {"trees-path", "rows-path"}, "7b": {"trees-path"}}
    broken = [text for text in results["failures"] if "no such luck" in text]
    assert {text.split(":")[0].split(" heads")[0] for text in broken} == {
        "sdpa", "training 1.5b", "7b rows-path"
    }  # fmt: skip
    assert [text for text in results["failures"] if text not in broken] == [
        "7b: no rows to compare with"
    ]


def test_gpu_training_ends_when_time_is_up(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run = gpu_training(out, "--seconds", "0", "--models", "7b", interpreted=False)
    assert run.returncode == 1
    results = json.loads(out.read_text())
    assert all("time was up" in failure for failure in results["failures"])
    assert results["check"] == results["attention"] == results["training"] == []


TOO_LARGE = """
class Tile(g._triton_attention.Tile):
    def __init__(self, rows, columns, warps, stages):
        if columns == 32 and stages == 3:
            stages = 1000
        super().__init__(rows, columns, warps, stages)
attend = g.BACKENDS["triton"]
def limited(*arguments):
    tiles = g._triton_attention.TILES["sm_80"][4, 64]
    if max(tiles.forward.stages, tiles.query.stages, tiles.key.stages) > 100:
        raise g.triton.OutOfResources(300000, 232448, "shared memory")
    return attend(*arguments)
g._triton_attention.Tile = Tile
g.BACKENDS["triton"] = limited
"""


def test_gpu_training_tunes_in_several_calls(tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    options = ("--tune", "--models", "0.5b")
    run = gpu_training(out, *options, "--seconds", "0", interpreted=False)
    assert run.returncode == 0 and "6 tiles are left" in run.stdout
    assert json.loads(out.read_text())["tune"] == []
    run = gpu_training(out, *options, before=TOO_LARGE)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    rows = json.loads(out.read_text())["tune"]
    assert [row["ms"] is None for row in rows] == [False, True] * 3
    run = gpu_training(out, *options, before=TOO_LARGE)
    assert run.returncode == 0 and json.loads(out.read_text())["tune"] == rows
