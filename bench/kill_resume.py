"""Kill a run at random moments, resume it each time, and compare it with one that never stopped.

    python -m bench.kill_resume [--kills 20] [--seed 0] [--threads 2] [--overlap] [--out FILE]

Every kill is aimed at a phase (collection, update, weight push, writing of a checkpoint), in turn,
and falls at a random time after one of the next times that the run enters it. A kill is SIGKILL to
the trainer alone. At the end the run must equal the uninterrupted one: all metrics but times and
cache counts, the tasks of every step, and the weights of the exported model, bitwise. Nothing of a
killed run may be left behind: no process, no half-written folder.

The model is tiny and untrained. Verdicts are the task's own, or else go by the answer's length, so
that there is something to learn in every step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PHASES = ("collect", "update", "push", "write")
"""What the kills are aimed at; `evaluate`, `cold_start` and `copy` are only named in the report."""
WATCHED = (*PHASES, "evaluate", "cold_start", "copy")
CONFIG = """
run: {name: run}
model:
  name: scratch
  dtype: float32
  scratch: {hidden_size: 64, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 128}
task: {options: {steps: 4, level: 1}, system: Go., seed: 0}
rollout: {call_format: code, max_turn_tokens: 16, max_tokens: 300}
algo: {n_total: 6}
sft: {demonstrations: 8, batch: 4, lr: 1.0e-3}
train: {tasks_per_step: 4, updates_per_step: 2, lr: 1.0e-3, checkpoint_every: 2}
eval: {tasks: 8, every: 3}
"""
OVERLAP = (
    "train.overlap=1",
    "train.old_logprob=recompute",
    "train.importance_sampling=token",
)
LEFTOVERS = (".writing-*", ".deleting-*", "*.tmp")
_MARK = "ELPO_KILL_RESUME"  # in the environment of all processes of a run


class Beacon:
    """What a run is doing, in memory that another process reads: for every phase how often it was
    entered, and how often it was left."""

    def __init__(self, file: Path) -> None:
        if not file.exists():
            file.write_bytes(bytes(8 * len(WATCHED)))
        with file.open("r+b") as stream:
            self._counts = memoryview(mmap.mmap(stream.fileno(), 0)).cast("I")

    def clear(self) -> None:
        for index in range(len(self._counts)):
            self._counts[index] = 0

    def entered(self, phase: str) -> int:
        return self._counts[2 * WATCHED.index(phase)]

    def present(self) -> list[str]:
        return [p for i, p in enumerate(WATCHED) if self._counts[2 * i] > self._counts[2 * i + 1]]

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        index = 2 * WATCHED.index(phase)
        self._counts[index] += 1
        try:
            yield
        finally:
            self._counts[index + 1] += 1


def trainer(beacon_file: str, arguments: list[str]) -> int:
    """`elpo` with these arguments, with its phases marked; runs in a process of its own."""
    from elpo_fast import cli
    from elpo_fast.tasks.ledger import Ledger
    from elpo_fast.train import loop
    from elpo_fast.train.checkpoint import Checkpoints

    beacon = Beacon(Path(beacon_file))

    def mark(owner: type, name: str, phase: str) -> None:
        real = getattr(owner, name)

        async def marked(*arguments: Any, **options: Any) -> Any:
            with beacon.inside(phase):
                return await real(*arguments, **options)

        waits = asyncio.iscoroutinefunction(real)
        setattr(owner, name, marked if waits else beacon.inside(phase)(real))

    for phase in ("collect", "update", "evaluate", "cold_start"):
        mark(loop._Run, phase, phase)
    mark(loop._Run, "push_weights", "push")
    mark(Checkpoints, "save", "copy")
    mark(Checkpoints, "_write", "write")
    real = Ledger.grade

    async def grade(self: Any, task: Any, messages: Any, end: Any) -> Any:
        verdict = await real(self, task, messages, end)
        lucky = len(messages[-1]["content"]) % 2 == 0
        return verdict if verdict.correct else self.options.verdict(lucky, verdict.reason)

    Ledger.grade = grade
    return cli.main(arguments)


def start(folder: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    beacon = Beacon(folder / "beacon")
    beacon.clear()
    program = [sys.executable, "-m", "bench.kill_resume", "--trainer", str(folder / "beacon")]
    command = ["train", str(folder / "config.yaml"), f"run.dir={folder}", *arguments]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [*program, *command],
            env=os.environ | {_MARK: str(folder), "OMP_WAIT_POLICY": "passive"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def processes_of(folder: Path) -> list[int]:
    """Those that still live of the runs in `folder`."""
    mark, found = f"{_MARK}={folder}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # gone, or somebody else's
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.0005)
    return True


def main() -> int:
    if sys.argv[1:2] == ["--trainer"]:
        return trainer(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="default: four for every kill")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--out", type=Path, help="write a report as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> int:
    from elpo_fast.train.summary import read_metrics, reproducible

    rng = random.Random(options.seed)
    whole, killed = folder / "whole", folder / "killed"
    for each in (whole, killed):
        each.mkdir()
        (each / "config.yaml").write_text(CONFIG)
    arguments = [f"run.threads={options.threads}"]
    arguments.append(f"train.steps={options.steps or 4 * options.kills}")
    arguments += OVERLAP if options.overlap else ()

    began = time.monotonic()
    if start(whole, arguments).wait():
        print((whole / "output.txt").read_text())
        return 1
    uninterrupted = time.monotonic() - began
    records = read_metrics(whole / "run")
    steps = [record for record in records if record["phase"] == "rl"]
    # About how long a phase takes, in seconds.
    lengths = {name: sum(r[f"time/{key}"] for r in steps) / len(steps) for name, key in
               (("collect", "collect"), ("update", "train"))}  # fmt: skip
    lengths |= {"push": 0.01, "write": 0.05}
    print(f"uninterrupted: {len(steps)} steps in {uninterrupted:.0f} s", flush=True)

    kills: list[dict[str, Any]] = []
    beacon = Beacon(killed / "beacon")
    finished = False
    while not finished:
        process = start(killed, [*arguments, *(["--resume"] if kills else [])])
        if len(kills) == options.kills:
            finished = process.wait() == 0
            if not finished:
                break
            continue
        phase = PHASES[len(kills) % len(PHASES)]
        number, delay = rng.randint(1, 3), rng.uniform(0, lengths[phase])

        def reached(process: Any = process, phase: str = phase, number: int = number) -> bool:
            return beacon.entered(phase) >= number or process.poll() is not None

        if not wait_for(reached, 120) or process.poll() is not None:
            break
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        moment = beacon.present()
        if not wait_for(lambda: not processes_of(killed), 10):
            print(f"left behind: processes {processes_of(killed)}")
            return 1
        kills.append({"aimed": phase, "time": number, "delay_s": round(delay, 4), "in": moment,
                      "records": len(read_metrics(killed / "run"))})  # fmt: skip
        print(f"kill {len(kills)}: aimed at {phase} {number}, fell into {moment or 'none'}",
              flush=True)  # fmt: skip
    if not finished:
        print((killed / "output.txt").read_text()[-3000:])
        print(f"the run ended by itself after {len(kills)} kills, code {process.returncode}")
        return 1

    faults = differences(whole / "run", killed / "run")
    for fault in faults:
        print(fault)
    print(f"{len(kills)} kills: {'DIFFERENT' if faults else 'equal to the uninterrupted run'}")
    if options.out:
        report = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "steps": len(steps),
            "threads": options.threads,
            "overlap": options.overlap,
            "seed": options.seed,
            "kills": kills,
            "faults": faults,
            "last": reproducible(records)[-2:],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if faults else 0


def differences(whole: Path, killed: Path) -> list[str]:
    """What the second run has otherwise than the first."""
    import torch
    from safetensors.torch import load_file

    from elpo_fast.train.summary import read_metrics, reproducible
    from elpo_fast.tree import io

    faults = []
    ours, theirs = (reproducible(read_metrics(run)) for run in (killed, whole))
    if len(ours) != len(theirs):
        faults.append(f"{len(ours)} records instead of {len(theirs)}")
    for mine, expected in zip(ours, theirs, strict=False):
        for name in mine.keys() | expected.keys():
            if mine.get(name) != expected.get(name):
                faults.append(
                    f"{expected['phase']} {expected['step']}: {name} is {mine.get(name)!r} "
                    f"instead of {expected.get(name)!r}"
                )
    files = [sorted((run / "trees").glob("*.npz")) for run in (killed, whole)]
    tasks = [[io.load(file).task_ids for file in each] for each in files]
    if tasks[0] != tasks[1]:
        faults.append("other tasks were trained on")
    seen = [task for step in tasks[0] for task in step]
    if len(set(seen)) != len(seen):
        faults.append("a task was trained twice")
    mine, expected = (load_file(run / "model" / "model.safetensors") for run in (killed, whole))
    for name, tensor in expected.items():
        if not torch.equal(mine[name], tensor):
            faults.append(f"weight {name} differs")
    for leftover in (path for kind in LEFTOVERS for path in killed.rglob(kind)):
        faults.append(f"left behind: {leftover}")
    return faults


if __name__ == "__main__":
    sys.exit(main())
