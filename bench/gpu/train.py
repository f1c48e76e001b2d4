"""`elpo train` itself, cut short: the tiny configuration, then a random model of 0.5B shape."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from bench.gpu.part import Part

CUT = ["train.steps=2", "sft.epochs=1", "sft.target_loss=0", "eval.tasks=32", "train.overlap=0"]
TINIER = [
    "train.steps=1",
    "sft.demonstrations=32",
    "eval.tasks=8",
    "train.tasks_per_step=2",
    "train.updates_per_step=1",
]
WIDE = [
    "model.scratch.hidden_size=896",
    "model.scratch.layers=24",
    "model.scratch.heads=14",
    "model.scratch.kv_heads=2",
    "model.scratch.intermediate_size=4864",
    "sft.demonstrations=128",
]


def run(part: Part) -> None:
    runs = {"tiny": TINIER} if part.tiny else {"tiny": [], "0.5B-shaped": WIDE}
    for name, options in runs.items():
        part.attempt(name, partial(one_run, part, name, options))


def one_run(part: Part, name: str, options: list[str]) -> None:
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "elpo_fast.cli", "train", str(root / "configs/tiny.yaml")]
        command += [f"run.dir={folder}", *CUT, *options]
        if part.tiny:
            command.append("model.device=cpu")
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(1.0, part.left), check=False
        )
        if done.returncode:
            tail = (done.stdout + done.stderr).strip()[-400:]
            raise RuntimeError(f"elpo train ended with {done.returncode}: {tail}")
        (file,) = Path(folder).glob("**/metrics.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["phase"] == "rl":
            shown = ("time/collect", "time/train", "generated_per_s", "trained_tokens_per_s")
            figures = ", ".join(f"{key} {line[key]:.4g}" for key in shown)
            part.row(f"{name} step {line['step']}: {figures}", metrics=line)
        elif line["phase"] == "eval":
            part.row(f"{name} {line['name']}: success {line['success']}, {line['seconds']:.1f} s")
