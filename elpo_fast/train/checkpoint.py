"""Checkpoints: a folder that is either complete or not there.

    run/checkpoints/step-00000010/
        config.json model.safetensors ...   Hugging Face layout: `from_pretrained` loads the folder
        trainer.pt        optimizer moments, states of Python's, NumPy's and torch's generators
        collected.npz     trees of the next step, where they were collected during this one
        checkpoint.json   step, weight version, data position, size and SHA-256 of every other file

Everything is written into a hidden folder, forced to disk, and then renamed, so that a killed run
leaves its last complete checkpoint behind; leftovers go with the next save. Old checkpoints are
renamed before they are deleted, for the same reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elpo_fast.model.load import quiet
from elpo_fast.tree import io
from elpo_fast.tree.store import Forest
from elpo_fast.types import RunError

MANIFEST = "checkpoint.json"
TRAINER = "trainer.pt"
COLLECTED = "collected.npz"
_NAME = re.compile(r"step-(\d+)")
_TRASH = ".deleting-"
_PARTIAL = ".writing-"


class CheckpointError(RunError):
    """A checkpoint that cannot be read or written; the message is one line."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands, apart from its weights."""

    step: int
    weight_version: int
    data_position: int  # index of the next training task
    optimizer: dict[str, Any]  # `PolicyOptimizer.state_dict()`
    extra: dict[str, Any] = field(default_factory=dict)  # anything else that JSON can hold
    collected: Forest | None = None  # trees of the next step, if they are there already


def save_checkpoint(
    run_dir: Path,
    state: TrainState,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep: int,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write one checkpoint with the present generator states, then delete all but the last `keep`.

    `weights` are written in place of the model's own, for a model that is sharded.

    Saving a step again replaces it. Raises `CheckpointError` when the disk refuses.
    """
    root = run_dir / "checkpoints"
    target = root / f"step-{state.step:08d}"
    partial = root / f"{_PARTIAL}{target.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in (*root.glob(f"{_PARTIAL}*"), *root.glob(f"{_TRASH}*")):
            shutil.rmtree(leftover)
        partial.mkdir()
        with quiet():
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
        torch.save({"optimizer": state.optimizer, "rng": _generator_states()}, partial / TRAINER)
        if state.collected is not None:
            io.save(state.collected, partial / COLLECTED)
        manifest = {
            "step": state.step,
            "weight_version": state.weight_version,
            "data_position": state.data_position,
            "extra": state.extra,
            "files": {file.name: _fingerprint(file) for file in sorted(partial.iterdir())},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _force_to_disk([*partial.iterdir(), partial])
        if target.exists():
            target.rename(root / f"{_TRASH}{target.name}")
        partial.rename(target)
        _force_to_disk([root])
        for old in _complete(root)[:-keep]:
            old.rename(root / f"{_TRASH}{old.name}")
        for trash in root.glob(f"{_TRASH}*"):
            shutil.rmtree(trash)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's own is a RuntimeError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(
            f"cannot write checkpoint {target}: {reason}; free or change the disk"
        ) from error
    return target


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or `None`."""
    complete = _complete(run_dir / "checkpoints")
    return complete[-1] if complete else None


def load_checkpoint(path: Path) -> TrainState:
    """Verify every file of a checkpoint, set the generators, and return where the run stood.

    The weights come from `from_pretrained(path)`. Raises `CheckpointError` for a folder that is
    not a checkpoint or was damaged after writing; the generators are untouched then.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            if _fingerprint(path / name) != expected:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} is not what was written; "
                    "delete this folder to go on from the one before"
                )
        trainer = torch.load(path / TRAINER, map_location="cpu", weights_only=True)
        state = TrainState(
            step=manifest["step"],
            weight_version=manifest["weight_version"],
            data_position=manifest["data_position"],
            optimizer=trainer["optimizer"],
            extra=manifest["extra"],
            collected=io.load(path / COLLECTED) if COLLECTED in manifest["files"] else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({type(error).__name__}: {error}); "
            "delete this folder to go on from the one before"
        ) from error
    _set_generators(trainer["rng"])
    return state


def _complete(root: Path) -> list[Path]:
    """Checkpoint folders by step. The manifest is written last: without it, it is not one."""
    found = [
        (int(match[1]), path)
        for path in (root.iterdir() if root.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _force_to_disk(paths: Iterable[Path]) -> None:
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
