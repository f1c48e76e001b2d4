"""`elpo compare`: algorithms on the same tasks, evaluation and budget, each over several seeds.

The folder of a comparison holds

    compare.md, .png, .svg    the page: tables, and held-out success in plots
    runs.csv                  every run: its areas under the curve and what it took
    evaluations.csv           every evaluation of every run
    configs/NAME.yaml         the configuration of each run, as it was begun
    logs/NAME.log             what each run said
    runs/NAME                 its run folder, `.../cold-seedN` that of a cold start
    .lock                     held by the process that compares

Invariants: the runs differ in `algo` and `train` alone, and not in the number of rollouts that they
ask for. All runs of a seed begin with the same cold start, which is learned once. A run goes on
where it stopped, a finished one is left alone and loses its checkpoints. Generated tasks are public
ones (`task.seed: 0` unless it says another), so that all runs are judged by the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from elpo_fast.algo import check
from elpo_fast.config import (
    MECHANICS,
    Config,
    ConfigError,
    differences,
    dump_config,
    is_run,
    load_config,
    within,
)
from elpo_fast.lock import Lock
from elpo_fast.report.curves import Curve, curve_of, write_page

_BUDGET = ("algo.n_total", "train.steps", "train.tasks_per_step")
_LEFT_OUT = ("model", "adapters", "tensorboard", "trackers.json", ".lock", "*.log")
# As the command itself would start: not with the working directory first on the path.
_COMMAND = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from elpo_fast.cli import main; sys.exit(main())"
)


@dataclass(frozen=True)
class Run:
    """One run of a comparison, or, without an algorithm, the cold start of its seed."""

    out: Path
    algorithm: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.algorithm or 'cold'}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"

    @property
    def settings(self) -> Path:
        return self.out / "configs" / f"{self.name}.yaml"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do but to be looked at."""
        return (self.folder / "model").is_dir() and (not self.algorithm or self.curve is not None)

    @property
    def curve(self) -> Curve | None:
        """Its evaluations, if the last one is there."""
        return curve_of(self.folder, self.algorithm, self.seed, self.config.train.steps)


def seeds_of(text: str) -> list[int]:
    """`0-4`, `1,5,7` or both. Raises `LookupError`."""
    seeds: list[int] = []
    for part in text.split(","):
        if not (found := re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())):
            raise LookupError(f"--seeds {text}: give numbers such as 0-4 or 1,5,7")
        first, last = int(found[1]), int(found[2] or found[1])
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def compare(
    task: Path,
    files: Sequence[Path],
    overrides: Sequence[str],
    *,
    seeds: Sequence[int],
    jobs: int,
    out: Path,
    console: Console,
) -> int:
    """Run what is missing, `jobs` processes at once (0: none), and write the page; the number of
    runs that failed. The first file is what the others are compared with.

    Raises `ConfigError` where the files do not make a comparison or the folder holds another one.
    """
    runs = [run for seed in seeds for run in _planned(task, files, overrides, seed, jobs, out)]
    try:
        for folder in ("runs", "logs", "configs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        lock = Lock(out)
    except OSError as error:
        raise ConfigError(f"cannot create folder {out}: {error.strerror}") from None
    try:
        for run in runs:
            _claim(run)
        failed = _run_all(runs, jobs, console) if jobs else []
        curves = [run.curve for run in runs if run.algorithm]
        done = [curve for curve in curves if curve is not None]
        if done:
            write_page(out, task.stem, done, missing=len(curves) - len(done))
            console.print(f"the page: {out / 'compare.md'}", highlight=False, soft_wrap=True)
    finally:
        lock.release()
    for run in failed:
        lines = run.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        console.print(f"failed: {run.name}: {said} ({run.log})", highlight=False, soft_wrap=True)
    return len(failed)


def _planned(
    task: Path, files: Sequence[Path], overrides: Sequence[str], seed: int, jobs: int, out: Path
) -> list[Run]:
    """The runs of one seed, the cold start first if there is one."""
    threads = max(1, (os.cpu_count() or 1) // max(jobs, 1))

    def configured(name: str, over: Sequence[Path]) -> Config:
        common = [f"run.dir={out / 'runs'}", f"run.name={name}-seed{seed}", f"run.seed={seed}"]
        config = load_config(task, [*common, f"run.threads={threads}", *overrides], over)
        public = config.task.model_copy(update={"seed": config.task.seed or 0})
        return config.model_copy(update={"task": public})

    alone = configured("cold", [])
    runs = [Run(out, "", seed, alone)] if alone.sft.wanted else []
    names = [file.stem for file in files]
    for file, name in zip(files, names, strict=True):
        if names.count(name) > 1 or name == "cold":
            raise ConfigError(f"{file}: runs are named by their files, and {name!r} is taken")
        config = configured(name, [file])
        for key, said in differences(alone, config).items():
            if within(key, _BUDGET) or not within(key, ("algo", "train", "run.name")):
                raise ConfigError(
                    f"{file} is not compared at the same tasks and budget: {said}; "
                    "change it for all, as section.key=value"
                )
        check(config.algo)
        runs.append(Run(out, name, seed, config))
    return runs


def _claim(run: Run) -> None:
    """Note the configuration of a run, or see that it is what was noted."""
    if run.settings.is_file():
        changed = differences(load_config(run.settings), run.config)
        other = [said for key, said in changed.items() if not within(key, MECHANICS)]
        if other:
            raise ConfigError(
                f"{run.out} holds another comparison: of {run.name}, {'; '.join(other)}; "
                "change it back or name another folder with --out"
            )
    run.settings.write_text(dump_config(run.config), encoding="utf-8")


def _run_all(runs: Sequence[Run], jobs: int, console: Console) -> list[Run]:
    """All that is not finished; the runs that failed."""
    cold: dict[int, Future[bool]] = {}
    running: dict[Future[bool], Run] = {}
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for run in sorted(runs, key=lambda run: bool(run.algorithm)):  # cold starts first
                if run.algorithm:
                    running[pool.submit(_train, run, cold.get(run.seed))] = run
                else:
                    cold[run.seed] = pool.submit(_learn, run)
                    running[cold[run.seed]] = run
            for number, future in enumerate(as_completed(running), start=1):
                run = running[future]
                said = "done" if future.result() else "failed"
                if future.result() and (curve := run.curve) is not None:
                    first, last = curve.points[0], curve.points[-1]
                    said = f"{first.success:.1%} to {last.success:.1%}, {last.seconds:.0f} s"
                elif not future.result():
                    failed.append(run)
                console.print(f"{number}/{len(running)} {run.name}: {said}", highlight=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _learn(run: Run) -> bool:
    return run.finished or _call(run, "sft")


def _train(run: Run, cold: Future[bool] | None) -> bool:
    if not run.finished:
        if cold is not None:
            if not cold.result():
                run.log.write_text("its cold start failed\n", encoding="utf-8")
                return False
            _begin(run)
        if not _call(run, "train"):
            return False
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    return True


def _begin(run: Run) -> None:
    """Give the run its seed's cold start, unless it has begun."""
    if run.folder.exists():
        return
    partial = run.folder.with_name(f".{run.name}")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(partial)
    cold = run.folder.with_name(f"cold-seed{run.seed}")
    shutil.copytree(cold, partial, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    partial.rename(run.folder)


def _call(run: Run, command: str) -> bool:
    """`elpo COMMAND` in a process of its own; whether it succeeded."""
    arguments = [command, str(run.settings)]
    if is_run(run.folder):
        arguments += ["--resume", "--allow-change"]  # from its cold start's; `_claim` saw the rest
    with run.log.open("ab") as log:
        process = [sys.executable, "-c", _COMMAND, *arguments]
        done = subprocess.run(process, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return done.returncode == 0
