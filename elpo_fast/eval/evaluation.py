"""`elpo eval`: a model's trajectories on held-out tasks, each sampled once, and their figures.

The folder of an evaluation holds

    config.yaml          the resolved configuration
    evaluation.json      the model, the fingerprint of its weights and, at the end, the figures
    trajectories.jsonl   see `elpo_fast.eval.trajectories`
    chat.txt             how the chat template is used, and a task as the model sees it
    task_secret          what generated tasks are drawn with, unless `task.seed` says it
    sglang.log           of our own SGLang server, if there is one
    .lock                held by the process that evaluates

Invariants: a trajectory's seed follows from `run.seed`, its task and its number alone, so neither a
stop nor more samples or tasks change what is there. A folder belongs to one model, one set of
weights and one way to sample: whatever else the mathematics of it is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from elpo_fast.algo.star import StarPlanner
from elpo_fast.config import (
    MECHANICS,
    Config,
    ConfigError,
    differences,
    dump_config,
    load_config,
    within,
)
from elpo_fast.eval.figures import figures
from elpo_fast.eval.metrics import Comparison, paired_comparison
from elpo_fast.eval.run import held_out_tasks
from elpo_fast.eval.sampler import sampler
from elpo_fast.eval.trajectories import Record, Trajectories, read_trajectories, record_of
from elpo_fast.lock import Lock
from elpo_fast.model.load import LoadedModel, load_model
from elpo_fast.rollout.collector import Collector
from elpo_fast.tasks import make_source, tokenizer_texts
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import Task, TaskSource

TRAJECTORIES = "trajectories.jsonl"
_SECRET, _CHAT = "task_secret", "chat.txt"
_EVALUATION = "evaluation.json"
_MAY_DIFFER = (*MECHANICS, "algo", "sft", "train", "eval.tasks", "eval.samples", "eval.every")
"""Keys that do not change a trajectory."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and how: `config`, with nothing left to the machine, names the model and,
    as run folder, that of the evaluation. `weights` differs where weights of the same name may;
    `load` is given texts to make the tokenizer of a scratch model from; `secret` draws the
    tasks."""

    name: str
    config: Config
    weights: str
    load: Callable[[Iterable[str]], LoadedModel]
    secret: str | None = None


class Progress(Protocol):
    def advance(self, figures: str = "", *, units: int = 1, report: bool = True) -> None: ...
    def say(self, text: str) -> None: ...


Phase = Callable[[str, int, int], AbstractContextManager[Progress]]
"""Shows a phase of a name, so many units, and so many of them done."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    folder: Path
    name: str
    figures: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """Raises `LookupError` for a folder that holds none, or one that is not finished."""
        try:
            about = json.loads((folder / _EVALUATION).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise LookupError(f"{folder} is not the folder of an evaluation") from None
        if about["figures"] is None:
            raise LookupError(f"{folder} is not finished; go on by the command that began it")
        return cls(folder, about["model"], about["figures"])

    def success(self) -> dict[str, float]:
        """Mean over the samples of every task, by its id."""
        found: dict[str, list[bool]] = {}
        for record in read_trajectories(self.folder / TRAJECTORIES):
            if record["sample"] < self.figures["samples"]:
                found.setdefault(record["task"], []).append(record["correct"])
        return {task: float(np.mean(correct)) for task, correct in found.items()}


def is_evaluation(folder: Path) -> bool:
    return (folder / _EVALUATION).is_file()


def of_model(name: str, config: Config) -> Subject:
    """The model called `name`, as `model.name` is."""
    model = config.model.model_copy(update={"name": name, "lora": None})

    def load(texts: Iterable[str]) -> LoadedModel:
        return load_model(model, seed=config.run.seed, tokenizer_texts=texts)

    folder = Path(name).expanduser()
    files = sorted(folder.rglob("*")) if folder.is_dir() else []
    seen = [(str(file.relative_to(folder)), file.stat()) for file in files]
    stamps = [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in seen]
    weights = hashlib.sha256("\n".join(stamps).encode()).hexdigest() if stamps else ""
    return Subject(name, config.model_copy(update={"model": model}), weights, load)


def compare(one: Evaluation, other: Evaluation) -> tuple[Comparison, int]:
    """`one` against `other` on the tasks that both have, and how many these are. Raises
    `LookupError` where there are none."""
    ours, theirs = one.success(), other.success()
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise LookupError(
            f"{one.folder} and {other.folder} have no task in common; evaluate both on the same "
            "tasks: generated ones are the same where task.seed is the same number"
        )
    compared = paired_comparison([theirs[t] for t in shared], [ours[t] for t in shared])
    return compared, len(shared)


def run_evaluation(subject: Subject, phase: Phase) -> Evaluation:
    """Sample what the folder does not have yet. Raises `ConfigError` where it belongs to another
    evaluation, or to another process."""
    config, folder = subject.config, subject.config.run_dir
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
    except OSError as error:
        raise ConfigError(f"cannot create folder {folder}: {error.strerror}") from None
    try:
        _claim(folder, config, subject)
        with closing(Trajectories(folder / TRAJECTORIES)) as trajectories:
            by_task = asyncio.run(_evaluate(config, subject, trajectories, phase))
        found = figures(by_task)
        _say(folder, subject, found)
    finally:
        lock.release()
    return Evaluation(folder, subject.name, found)


def _claim(folder: Path, config: Config, subject: Subject) -> None:
    """Make the folder this evaluation's, or see that it is. One that has sampled nothing, perhaps
    because it could not begin, has no claim to it."""
    saved, records = folder / "config.yaml", folder / TRAJECTORIES
    begun = is_evaluation(folder)
    if not begun and any(file.name != ".lock" for file in folder.iterdir()):
        raise ConfigError(f"{folder} holds something else; name another folder with --out")
    if not (begun and records.is_file() and records.stat().st_size):
        (folder / _SECRET).unlink(missing_ok=True)
        _say(folder, subject, None)
        saved.write_text(dump_config(config), encoding="utf-8")
        return
    about = json.loads((folder / _EVALUATION).read_text(encoding="utf-8"))
    changes = differences(load_config(saved), config)
    other = [text for key, text in changes.items() if not within(key, _MAY_DIFFER)]
    if about["weights"] != subject.weights:
        other.append(f"the weights of {subject.name} are others than they were")
    if other:
        raise ConfigError(
            f"{folder} holds another evaluation: {'; '.join(other)}; change it back or name "
            "another folder with --out"
        )
    saved.write_text(dump_config(config), encoding="utf-8")


def _say(folder: Path, subject: Subject, found: dict[str, Any] | None) -> None:
    about = {"model": subject.name, "weights": subject.weights, "figures": found}
    temporary = folder / f"{_EVALUATION}.tmp"
    temporary.write_text(json.dumps(about, indent=1), encoding="utf-8")
    os.replace(temporary, folder / _EVALUATION)


def _secret(folder: Path, config: Config, subject: Subject) -> str | None:
    """What generated tasks are drawn with: the run's that is evaluated, or the folder's."""
    if config.task.seed is not None:
        return None
    file = folder / _SECRET
    if not file.is_file():
        file.touch(0o600)
        file.write_text(subject.secret or secrets.token_hex(), encoding="utf-8")
    return file.read_text(encoding="utf-8")


async def _evaluate(
    config: Config, subject: Subject, trajectories: Trajectories, phase: Phase
) -> list[list[Record]]:
    """The records of every task, all of them there at the end."""
    toolbox, folder = Toolbox(config.tools), config.run_dir
    try:
        secret = _secret(folder, config, subject)
        drawn = config.task, config.run.seed, toolbox.run_function
        source = make_source(*drawn, secret, apart=toolbox.apart)
        toolbox.offer(source.tools)
        if _missing(source, config, trajectories):
            _say(folder, subject, None)
            loaded = subject.load(tokenizer_texts(source, *drawn))
            async with sampler(config, toolbox, source, loaded) as collector:
                missing = _missing(source, config, trajectories)  # of what has room to answer
                total = len(held_out_tasks(source, config.eval)) * config.eval.samples
                first = held_out_tasks(source, config.eval)[0]
                shown = collector.chat.shown(first.messages)
                (folder / _CHAT).write_text(shown, encoding="utf-8")
                with phase("evaluating", total, total - len(missing)) as progress:
                    for note in collector.chat.template.notes:
                        progress.say(f"chat template: {note}")
                    await _sample(collector, config, missing, trajectories, progress)
        tasks = held_out_tasks(source, config.eval)
    finally:
        await toolbox.close()
    records = trajectories.records
    return [[records[task.id, n] for n in range(config.eval.samples)] for task in tasks]


def _missing(
    source: TaskSource, config: Config, trajectories: Trajectories
) -> list[tuple[Task, int]]:
    """The tasks, and which of their samples, that are still to be evaluated."""
    tasks = held_out_tasks(source, config.eval)
    if not tasks:
        raise ConfigError(
            f"there is no task to evaluate: eval.tasks={config.eval.tasks}, and {source.name} has "
            f"{source.held_out_size} held-out ones"
        )
    every = [(task, sample) for task in tasks for sample in range(config.eval.samples)]
    return [at for at in every if (at[0].id, at[1]) not in trajectories.records]


async def _sample(
    collector: Collector,
    config: Config,
    wanted: Sequence[tuple[Task, int]],
    trajectories: Trajectories,
    progress: Progress,
) -> None:
    """One trajectory for each of `wanted`, many at a time, written as they end."""
    sizes, correct = config.rollout.sizes(), 0
    gate = asyncio.Semaphore(max(sizes.trees_in_flight, sizes.max_batch))

    async def one(task: Task, number: int) -> None:
        nonlocal correct
        async with gate:
            sequence = np.random.SeedSequence([config.run.seed, number])
            (tree,) = await collector.collect(
                [task],
                lambda: StarPlanner(1),
                seed=int(sequence.generate_state(1)[0]),
                temperature=config.eval.temperature,
            )
            record = record_of(tree, task, number, collector.chat)
            trajectories.add(record)
            correct += record["correct"]
            progress.advance(f"{correct} correct", report=False)

    async with asyncio.TaskGroup() as group:
        for task, number in wanted:
            group.create_task(one(task, number))
