"""The run folder: everything a run leaves behind, and the only place a resume looks.

    config.yaml      the resolved configuration
    task_secret      what generated tasks are drawn with, unless `task.seed` says it
    metrics.jsonl    one JSON object a record: {"phase": "sft" | "eval" | "rl", "step": int, ...}
    tensorboard/     the same numbers as TensorBoard events, and sample trajectories as text
    trackers.json    what the services of `run.log` know the run by
    trees/           one forest a step, `step_000001.npz`
    tokenizer/       for `elpo tree show` and `elpo export`
    chat.txt         how the chat template is used, and a task's conversation as the model sees it
    .lock            held by the process that runs it
    checkpoints/     see `elpo_fast.train.checkpoint`
    model/           at the end: the trained model, a folder in Hugging Face layout
    adapters/        with `model.lora`, at the end: its adapters alone, in peft's layout
    sglang.log       of our own SGLang server, if there is one

Invariant: records are appended in order and belong to work that the last checkpoint either contains
or will do again; a resume drops the records (and trees) of work that is done again.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elpo_fast.config import (
    MECHANICS,
    Config,
    ConfigError,
    differences,
    dump_config,
    load_config,
    within,
)
from elpo_fast.faults import enough_disk
from elpo_fast.lock import LOCK, Lock
from elpo_fast.train.trackers import Trackers
from elpo_fast.tree import io

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECRET, CHAT = "task_secret", "chat.txt"
_MAY_DIFFER = (
    *MECHANICS,
    *("eval", "train.steps", "train.checkpoint_every", "train.keep_checkpoints"),
    "sft.checkpoint_every",
    *(
        "train.profile",
        "train.save_trees",
        "rollout.max_turns",
        "rollout.max_turn_tokens",
        "rollout.max_tokens",
    ),
    *("task.reward_timeout_s", "tools.timeout_s", "tools.memory_mb", "tools.output_tokens"),
)
"""Keys that a resumed run may change: mechanics, limits, evaluation, what is kept."""
_MAY_NOT = ("model.name", "model.revision", "model.scratch", "model.lora")
"""Keys that make another model of it, which cannot go on from a checkpoint."""


class RunFolder:
    """An open run folder, locked for this process. `create` starts a new one, `resume` continues
    one; `changes` says in what a resumed run differs from before."""

    changes: Sequence[str] = ()
    first: Mapping[str, Any] | None  # record of the first step of reinforcement learning

    def __init__(self, path: Path, lock: Lock, trackers: Trackers) -> None:
        self.path = path
        self._lock = lock
        self._trackers = trackers
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        self._steps = 0  # so far, the cold start's and then the others
        self._cold = 0  # of these, the cold start's
        self.first: Mapping[str, Any] | None = None

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        path, trackers = config.run_dir, Trackers(config)
        with _locked(path) as lock:
            if not _unused(path):
                raise ConfigError(
                    f"run folder {path} already exists; continue it with --resume, "
                    "or choose another run.name"
                )
            (path / "trees").mkdir(exist_ok=True)
            secret = path / SECRET
            secret.unlink(missing_ok=True)
            if config.task.seed is None:
                secret.touch(0o600)
                secret.write_text(secrets.token_hex(), encoding="utf-8")
            (path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            return cls(path, lock, trackers)

    @classmethod
    def resume(cls, config: Config, *, allow_change: bool = False) -> RunFolder:
        """Continue a run. With `allow_change` alone may what changes the mathematics differ, and
        what makes another model never."""
        path, trackers = config.run_dir, Trackers(config)
        saved = path / "config.yaml"
        if not saved.is_file():
            raise ConfigError(f"nothing to resume at {path}; start it without --resume")
        with _locked(path) as lock:
            changes = differences(load_config(saved), config)  # with newer keys' defaults
            for key in ("run.dir", "run.name"):  # the folder was moved
                changes.pop(key, None)
            never = [text for key, text in changes.items() if within(key, _MAY_NOT)]
            other = [text for key, text in changes.items() if not within(key, _MAY_DIFFER)]
            if never:
                raise ConfigError(
                    f"cannot resume {path} with another model: {'; '.join(never)}; change it back "
                    "or start a new run"
                )
            if other and not allow_change:
                raise ConfigError(
                    f"cannot resume {path}: {'; '.join(other)}; change it back, allow it with "
                    "--allow-change or start a new run"
                )
            if config.task.seed is None and not (path / SECRET).is_file():
                raise ConfigError(
                    f"cannot resume {path}: its {SECRET} is gone, and with it the tasks; put it "
                    "back or start a new run"
                )
            _replace(saved, dump_config(config))
            folder = cls(path, lock, trackers)
            folder.changes = tuple(changes.values())
            return folder

    @property
    def secret(self) -> str | None:
        """What generated tasks are drawn with; `None` where the configuration says it."""
        file = self.path / SECRET
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one record; a crash loses at most the record being written."""
        record = {"phase": phase, "step": step, **values}
        with enough_disk(self.path / "metrics.jsonl", "lower train.keep_checkpoints"):
            self._metrics.write(json.dumps(record, allow_nan=False, default=float) + "\n")
            self._metrics.flush()
            self._count(record)
            self._trackers.numbers(
                self._steps,
                {
                    f"{phase}/{key}": value
                    for key, value in record.items()
                    if isinstance(value, (int, float))
                },
            )

    def show(self, name: str, text: str) -> None:
        """Give a text to the trackers, beside the numbers of the latest record."""
        with enough_disk(self.path / "tensorboard", "lower train.keep_checkpoints"):
            self._trackers.text(self._steps, name, text)

    def _count(self, record: Mapping[str, Any]) -> None:
        if record["phase"] == "sft":
            self._cold = record["step"]
        if record["phase"] == "rl" and self.first is None:
            self.first = record
        self._steps = record["step"] + (0 if record["phase"] == "sft" else self._cold)

    def rewind(self, records: int) -> None:
        """Keep the first `records` metric records only: the rest belongs to work done again. What a
        killed run was writing goes too."""
        self._metrics.close()
        for leftover in self.path.rglob(f"*{io.TEMPORARY}"):
            leftover.unlink()
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:records]
        _replace(path, "".join(lines))
        self._metrics = path.open("a", encoding="utf-8")
        self._steps, self._cold, self.first = 0, 0, None
        for line in lines:
            self._count(json.loads(line))
        self._trackers.rewind(self._steps if lines else None)

    @property
    def records(self) -> int:
        """Number of metric records written so far."""
        return sum(1 for _ in (self.path / "metrics.jsonl").open(encoding="utf-8"))

    def keep_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with enough_disk(self.path / "tokenizer"):
            tokenizer.save_pretrained(self.path / "tokenizer")

    def keep_chat(self, shown: str) -> None:
        _replace(self.path / CHAT, shown)

    def tree_file(self, step: int) -> Path:
        return self.path / "trees" / f"step_{step:06d}.npz"

    def close(self) -> None:
        self._metrics.close()
        self._trackers.close()
        self._lock.release()


class Follower(RunFolder):
    """The run folder as the ranks see it that do not write: the leading one does."""

    def __init__(self, config: Config) -> None:
        self.path = config.run_dir
        self.first = None

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def show(self, name: str, text: str) -> None:
        pass

    def rewind(self, records: int) -> None:
        pass

    def keep_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pass

    def keep_chat(self, shown: str) -> None:
        pass

    @property
    def secret(self) -> None:
        return None  # the leading rank's counts

    @property
    def records(self) -> int:
        return 0  # the leading rank's number counts

    def close(self) -> None:
        pass


def _replace(path: Path, text: str) -> None:
    """The file has its old text or the new one, whatever happens."""
    temporary = path.with_suffix(io.TEMPORARY)
    with enough_disk(path):
        temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def _locked(path: Path) -> Iterator[Lock]:
    """The folder, made if need be, and its lock, which is kept unless something is raised."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path)
    except OSError as error:
        raise ConfigError(f"cannot create run folder {path}: {error.strerror}") from None
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


def _unused(path: Path) -> bool:
    """Whether there is nothing to lose: empty, or left by a run that failed before its first
    record."""
    left = [path / name for name in ("config.yaml", SECRET, CHAT, LOCK, "sglang.log")]
    return all(
        file in left
        or file.parent == path / "tokenizer"
        or (file == path / "metrics.jsonl" and not file.stat().st_size)
        for file in path.rglob("*")
        if not file.is_dir()
    )
