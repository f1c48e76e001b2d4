"""Everything that only a GPU can show, in one command of about nine minutes.

    python -m bench.gpu --out results.json

Parts run one after another, each in a process of its own with a time limit, so that none can stop
the others; what is right comes before what is fast. A fault is noted, not raised. Results are
written after every row, to `--out` and to a temporary folder: the same command again, there, runs
what failed or was not reached, and keeps the rest. A table and the faults come last.

In a checkout that is not installed, PYTHONPATH=kernels/src:. ; `--wheels DIR` fetches what a bare
machine lacks (`gpu_wheels.txt`), where there is a package registry. While the first parts run, the
later ones compile. `--tiny` runs all of it on a CPU, to see that nothing is misspelt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.part import Part

TEMPORARY = Path(tempfile.gettempdir()) / "elpo_fast_gpu"
WHEELS = Path(__file__).parent.parent / "gpu_wheels.txt"
PLATFORMS = ("2_34", "2_28", "2_27", "2_26", "2_24", "2_17", "2_12", "2_5")

# Seconds of each part; those of a line run at the same time, and so does compiling ahead.
STAGES: tuple[dict[str, float], ...] = (
    {"ceilings": 20},
    {"correct_loss": 75, "correct_attention": 75, "correct_model": 75},
    {"loss": 100},
    {"attention": 90},
    {"update": 110},
    {"engine": 50},
    {"train": 80},
)
AHEAD = ("attention", "update")
GRACE = 10.0  # from the limit to the kill
TINY_SLOWER = 12  # on a CPU others may use too
NAMES = tuple(name for stage in STAGES for name in stage)


class Process:
    """One part of `program`, imported at once and begun by `go`."""

    def __init__(self, name: str, folder: Path, *options: str, program: str = "bench.gpu") -> None:
        self.name = name
        self.out = folder / f"{name}{'.ahead' if '--ahead' in options else ''}.json"
        self.out.unlink(missing_ok=True)
        self.log = self.out.with_suffix(".log")
        command = [sys.executable, "-m", program, "--part", name, "--out", str(self.out)]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def go(self, seconds: float) -> None:
        self.began, self.limit = time.perf_counter(), seconds
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{seconds}\n".encode())
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it ended already: `result` says how

    def result(self) -> dict[str, Any]:
        """What it wrote, once it has ended or was ended."""
        late = False
        try:
            left = self.limit + GRACE - (time.perf_counter() - self.began)
            code = self._process.wait(max(0.0, left))
        except subprocess.TimeoutExpired:
            code, late = self.end(), True
        found: dict[str, Any] = {"rows": [], "faults": ["wrote nothing"]}
        if self.out.exists():
            found = json.loads(self.out.read_text())
        if late:
            found["faults"].append(f"was ended after {self.limit + GRACE:.0f} s")
        elif code:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            found["faults"].append(f"ended with {code}: {' | '.join(tail)[-400:]}")
        found["seconds"] = round(time.perf_counter() - self.began, 1)
        return found

    def end(self) -> int:
        """Stop it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


class Results:
    """What is known so far, in every file that shall hold it."""

    def __init__(self, files: Sequence[Path], machine: dict[str, Any]) -> None:
        self.files = files
        self.all: dict[str, Any] = {"machine": machine, "parts": {}}
        for file in files:
            old = json.loads(file.read_text()) if file.exists() else {}
            if old.get("machine") == machine:
                self.all = old
                break

    def done(self, name: str) -> bool:
        part = self.all["parts"].get(name)
        return part is not None and not part["faults"]

    def keep(self, name: str, part: dict[str, Any]) -> None:
        self.all["parts"][name] = part
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_name(file.name + ".part")
            new.write_text(json.dumps(self.all, indent=1))
            new.replace(file)

    def show(self) -> None:
        """Every row's line, then what is wrong."""
        for name, part in self.all["parts"].items():
            print(f"\n{name} ({part['seconds']} s)")
            print(*(f"  {row['line']}" for row in part["rows"]), sep="\n")
        faults = [f"{n}: {f}" for n, part in self.all["parts"].items() for f in part["faults"]]
        print(f"\n{len(faults)} faults", *faults, sep="\n  ", flush=True)


def machine(tiny: bool) -> dict[str, Any]:
    """What results depend on, and are kept with."""
    import torch
    import transformers
    import triton

    return {
        "device": "cpu" if tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "tiny": tiny,
    }


def run_all(names: Sequence[str], seconds: float, results: Results, tiny: bool) -> None:
    """Run the parts `names`, none beyond `seconds` from now."""
    deadline = time.perf_counter() + seconds
    folder = TEMPORARY / "parts"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = ["--tiny"] if tiny else []
    stages = [[name for name in stage if name in names] for stage in STAGES]
    slower = TINY_SLOWER if tiny else 1
    limits = {name: slower * limit for stage in STAGES for name, limit in stage.items()}
    stages = [stage for stage in stages if stage]
    waiting: dict[str, Process] = {}

    def prepare(stage: int) -> None:
        for name in stages[stage] if stage < len(stages) else ():
            waiting[name] = Process(name, folder, *options)

    ahead = [] if tiny else [n for n in AHEAD if n in names and len(stages) > 1]
    compiling = [Process(name, folder, "--ahead") for name in ahead]
    prepare(0)
    for process in compiling:
        process.go(sum(STAGES[0].values()) + max(STAGES[1].values()))
    for number, stage in enumerate(stages):
        left = deadline - time.perf_counter()
        if left < GRACE:
            for name in stage:
                late = {"rows": [], "faults": ["not begun: time was up"], "seconds": 0.0}
                results.keep(name, late)
                if name in waiting:
                    waiting[name].end()
            continue
        if compiling and not any(name in STAGES[0] or name in STAGES[1] for name in stage):
            for process in compiling:  # whatever is timed from here on has the machine alone
                process.end()
            compiling = []
        running = [waiting.pop(name) for name in stage]
        for process in running:
            process.go(min(limits[process.name], left - GRACE))
        prepare(number + 1)
        ended: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()

        def wait(process: Process, ended: queue.Queue[Any] = ended) -> None:
            ended.put((process.name, process.result()))

        for process in running:
            threading.Thread(target=wait, args=(process,)).start()
        for _ in running:
            name, part = ended.get()
            results.keep(name, part)
            lines = [row["line"] for row in part["rows"]]
            print(f"[{name}: {part['seconds']} s]", *lines, *part["faults"], sep="\n  ", flush=True)
    for process in compiling:
        process.end()


def fetch_wheels(folder: Path, wheels: Path = WHEELS) -> None:
    """Download what the file `wheels` names, for CPython 3.12 on Linux."""
    platforms = [f"--platform=manylinux_{number}_x86_64" for number in PLATFORMS]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    for requirement in wheels.read_text().split():
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--only-binary=:all:", "--python-version=3.12", "--implementation=cp"),
                *(*platforms, "--dest", str(folder), requirement),
            ],
            check=True,
        )


def one_part(
    name: str, out: Path, *, tiny: bool, ahead: bool = False, program: str = "bench.gpu"
) -> None:
    """The child's side: import, wait for the number of seconds, run."""
    module = importlib.import_module(f"{program}.{name}")
    line = sys.stdin.readline()
    if line:
        part = Part(out, float(line), tiny=tiny, ahead=ahead)
        part.attempt("part", lambda: module.run(part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", nargs="+", choices=NAMES, help="these parts, also if done")
    parser.add_argument("--seconds", type=float, help="for all parts together, 540 on a GPU")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--wheels", type=Path, help="only fetch wheels into this folder")
    parser.add_argument("--part", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--ahead", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.wheels:
        fetch_wheels(options.wheels)
        return
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.part:
        one_part(options.part, options.out, tiny=options.tiny, ahead=options.ahead)
        return
    import torch

    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("bench.gpu needs a GPU; --tiny runs its code on a CPU")
    results = Results([options.out, TEMPORARY / "results.json"], machine(options.tiny))
    names = options.only or [name for name in NAMES if not results.done(name)]
    seconds = options.seconds or (540 * TINY_SLOWER if options.tiny else 540)
    try:
        run_all(names, seconds, results, options.tiny)
    finally:
        results.show()
    if any(part["faults"] for part in results.all["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
