"""Checkpoints: a folder that is either complete or not there, written while training goes on.

    run/checkpoints/step-00000010/     sft-00000010: before all steps, after so many updates of SFT
        state/            trained weights and their moments: every rank's shards, in the format of
                          `torch.distributed.checkpoint`, which any number of ranks can read
        rng-0.pt ...      states of Python's, NumPy's and torch's generators, one file a rank
        collected.npz     trees of the next step, where they were collected during this one
        checkpoint.json   step, weight version, data position, size and SHA-256 of every other file

Invariants
- `save` copies whatever training changes and returns; a thread writes the copy. At most one save is
  under way: the next one, and the run's end, wait for it.
- Everything is written into a hidden folder, forced to disk, and then renamed, so that a killed run
  leaves its last complete checkpoint behind; leftovers go with the next save. Old checkpoints are
  renamed before they are deleted, for the same reason.
- What fails on one rank fails on all of them, with the same sentence.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from elpo_fast.faults import free, size
from elpo_fast.train.parallel import ALONE, Ranks, on_own_gpu
from elpo_fast.train.step import WEIGHTS, PolicyOptimizer
from elpo_fast.tree import io
from elpo_fast.tree.store import Forest
from elpo_fast.types import RunError

MANIFEST = "checkpoint.json"
STATE = "state"
COLLECTED = "collected.npz"
FORMAT = 2
_FOLDER = "checkpoints"
SFT, RL = "sft", "step"
"""The phases of a run, in their order, as the names of their checkpoints begin."""
_NAME = re.compile(rf"({SFT}|{RL})-(\d+)")
_DELETE = "delete this folder to go on from the one before"
TRASH = ".deleting-"
PARTIAL = ".writing-"

_T = TypeVar("_T")

# A process without a process group is what it should be.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class CheckpointError(RunError):
    """A checkpoint that cannot be read or written; the message is one line."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands, apart from its weights and moments."""

    step: int  # of the phase
    weight_version: int
    data_position: int  # index of the next training task
    extra: dict[str, Any] = field(default_factory=dict)  # anything else that JSON can hold
    collected: Forest | None = None  # trees of the next step, if they are there already
    phase: str = RL


class Checkpoints:
    """The checkpoints of a run, of which the last `keep` are kept; every rank has one of these."""

    def __init__(self, run_dir: Path, keep: int, ranks: Ranks = ALONE) -> None:
        self._root, self._keep, self._ranks = run_dir / _FOLDER, keep, ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint", **on_own_gpu(ranks))
        self._writing: Future[None] | None = None

    def save(self, state: TrainState, policy: PolicyOptimizer) -> None:
        """Begin a checkpoint of the present weights, moments and generators.

        Saving a step again replaces it. Raises `CheckpointError` where the save before failed.
        """
        self.wait()
        # Not pinned, not shared, at once: a copy in main memory, as of now.
        staged = DefaultStager(StagingOptions(False, False, False, False)).stage(
            policy.state_dict()
        )
        write = (state, policy.updates, staged, _generator_states())
        self._writing = self._thread.submit(self._write, *write)

    def check(self) -> None:
        """Raise `CheckpointError`, on all ranks at once, if the save under way has failed."""
        done = self._writing is not None and self._writing.done()
        if all(self._ranks.gather(done)):
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises `CheckpointError` where that failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(
        self, state: TrainState, updates: int, staged: Any, generators: Mapping[str, Any]
    ) -> None:
        ranks, root = self._ranks, self._root
        target = root / f"{state.phase}-{state.step:08d}"
        partial = root / f"{PARTIAL}{target.name}"

        def begin() -> None:
            if ranks.leads:
                root.mkdir(parents=True, exist_ok=True)
                for leftover in (*root.glob(f"{PARTIAL}*"), *root.glob(f"{TRASH}*")):
                    shutil.rmtree(leftover)
                (partial / STATE).mkdir(parents=True)

        def write() -> None:
            dcp.save(
                staged,
                storage_writer=dcp.FileSystemWriter(partial / STATE),
                process_group=ranks.checkpoints,
                no_dist=ranks.size == 1,
            )
            torch.save(generators, partial / f"rng-{ranks.rank}.pt")
            if ranks.leads and state.collected is not None:
                io.save(state.collected, partial / COLLECTED)

        def secure() -> dict[str, Any]:
            mine = _files(partial)[ranks.rank :: ranks.size]
            force_to_disk(mine)
            return {str(file.relative_to(partial)): _fingerprint(file) for file in mine}

        def finish() -> None:
            if not ranks.leads:
                return
            manifest = {
                "format": FORMAT,
                "phase": state.phase,
                "step": state.step,
                "weight_version": state.weight_version,
                "data_position": state.data_position,
                "updates": updates,
                "ranks": ranks.size,
                "extra": state.extra,
                "files": dict(sorted(files.items())),
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            force_to_disk([partial / MANIFEST, partial / STATE, partial])
            if target.exists():
                target.rename(root / f"{TRASH}{target.name}")
            partial.rename(target)
            force_to_disk([root])
            for old in _complete(root)[: -self._keep]:
                old.rename(root / f"{TRASH}{old.name}")
            for trash in root.glob(f"{TRASH}*"):
                shutil.rmtree(trash)

        needed = size(sum(value.nbytes for value in staged.values()))

        def everywhere(work: Callable[[], _T]) -> list[_T]:
            what = f"cannot write checkpoint {target} of {needed}"
            return _everywhere(
                work,
                ranks,
                what,
                lambda: (
                    f"{free(root)}; make room, lower train.keep_checkpoints={self._keep} or move "
                    "the run and set run.dir"
                ),
            )

        everywhere(begin)
        everywhere(write)
        files: dict[str, Any] = {}
        for part in everywhere(secure):
            files |= part
        everywhere(finish)


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or `None`."""
    complete = _complete(run_dir / _FOLDER)
    return complete[-1] if complete else None


def checkpoint_of(run_dir: Path, step: int | None = None) -> Path:
    """The checkpoint of `step` of the newest one's phase, by default the newest. Raises
    `LookupError` for one that is not there."""
    newest = latest(run_dir)
    if newest is None:
        raise LookupError(f"{run_dir} has no checkpoint yet")
    if step is None:
        return newest
    phase, _ = _phase(newest)
    found = {s: path for path in _complete(newest.parent) for p, s in [_phase(path)] if p == phase}
    if step not in found:
        known = ", ".join(map(str, found))
        raise LookupError(f"{run_dir} has no checkpoint of step {step}; steps: {known}")
    return found[step]


def load_checkpoint(path: Path, policy: PolicyOptimizer, ranks: Ranks = ALONE) -> TrainState:
    """Verify every file of a checkpoint, give `policy` its weights and moments, set the generators,
    and return where the run stood.

    Generators are set where the number of ranks is what it was. Raises `CheckpointError` for a
    folder that is not a checkpoint or was damaged after writing; `policy` and generators are
    untouched then.
    """
    manifest: dict[str, Any] = {}
    collected: Forest | None = None

    def verify() -> None:
        manifest.update(_manifest(path))
        for name, expected in list(manifest["files"].items())[ranks.rank :: ranks.size]:
            if _fingerprint(path / name) != expected:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} is not what was written; {_DELETE}"
                )

    def read() -> None:
        nonlocal collected
        if COLLECTED in manifest["files"]:
            collected = io.load(path / COLLECTED)
        reader = dcp.FileSystemReader(path / STATE)
        state = policy.make_moments(reader.read_metadata().state_dict_metadata)
        dcp.load(
            state,
            storage_reader=reader,
            process_group=ranks.checkpoints,
            no_dist=ranks.size == 1,
        )
        policy.load_state_dict(state, manifest["updates"])
        if manifest["ranks"] == ranks.size:
            _set_generators(torch.load(path / f"rng-{ranks.rank}.pt", weights_only=True))

    for work in (verify, read):
        _everywhere(work, ranks, f"{path} is not a readable checkpoint", lambda: _DELETE)
    return TrainState(
        step=manifest["step"],
        weight_version=manifest["weight_version"],
        data_position=manifest["data_position"],
        extra=manifest["extra"],
        collected=collected,
        phase=manifest.get("phase", RL),
    )


def read_weights(path: Path, into: Mapping[str, torch.Tensor]) -> None:
    """Fill tensors with the trained weights of these names, in one process. Raises
    `CheckpointError`."""

    def read() -> None:
        _manifest(path)
        named = {f"{WEIGHTS}{name}": tensor for name, tensor in into.items()}
        dcp.load(named, checkpoint_id=path / STATE, no_dist=True)

    _everywhere(read, ALONE, f"{path} is not a readable checkpoint", lambda: _DELETE)


def _manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} is in an older format, which cannot be resumed; "
            f"it is a model folder: start a new run with model.name={path}"
        )
    return manifest


def _everywhere(
    work: Callable[[], _T], ranks: Ranks, what: str, remedy: Callable[[], str]
) -> list[_T]:
    """`work` on every rank, and its results by rank. What goes wrong on any of them is the same
    `CheckpointError` on all."""
    result: Any = None
    fault: CheckpointError | None = None
    try:
        result = work()
    except CheckpointError as error:
        fault = error
    except (Exception, dcp.CheckpointException) as error:  # the latter is no `Exception`
        fault = CheckpointError(f"{what} ({_reason(error)}); {remedy()}")
        fault.__cause__ = error
    gathered = ranks.gather((result, fault), ranks.checkpoints)
    for _, fault in gathered:
        if fault is not None:
            raise fault
    return [result for result, _ in gathered]


def _reason(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"


def _complete(root: Path) -> list[Path]:
    """Checkpoint folders in their order. The manifest is written last: without it, it is none."""
    found = root.iterdir() if root.is_dir() else ()
    complete = [p for p in found if _NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(complete, key=_phase)


def _phase(checkpoint: Path) -> tuple[str, int]:
    """Phase and step that a checkpoint's name says; "sft" comes before "step"."""
    name = _NAME.fullmatch(checkpoint.name)
    assert name is not None
    return name[1], int(name[2])


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def force_to_disk(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _generator_states() -> dict[str, Any]:
    _, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_generators(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    # A run may move to a machine with another number of GPUs; there is nothing to restore then.
    if "cuda" in states and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
