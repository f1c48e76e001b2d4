"""A model that is spread over processes before it has weights: each process reads its own rows.

Parameters are made on the meta device, where they take no memory, and sharded there; then every
process reads the rows of its shards out of the safetensors files. So a process holds at most its
shards and the rows of one tensor, whatever the model's size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

_FILE = "model.safetensors"
_INDEX = f"{_FILE}.index.json"
STORED = (_INDEX, "model*.safetensors")
"""The files that `StoredWeights` reads."""


class StoredWeights:
    """The tensors of a folder in Hugging Face layout, read in part and on demand."""

    def __init__(self, folder: Path) -> None:
        """A folder without safetensors files has no weights."""
        self._file_of: Mapping[str, Path] = {}
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            self._file_of = {name: folder / file for name, file in index.items()}
        elif (folder / _FILE).is_file():
            with safe_open(folder / _FILE, "pt") as file:
                self._file_of = dict.fromkeys(file.keys(), folder / _FILE)
        self._open = cache(lambda path: safe_open(path, "pt"))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor, in the dtype of the file."""
        read: torch.Tensor = self._open(self._file_of[name]).get_slice(name)[rows]
        return read


def empty_model(folder: Path, **options: Any) -> PreTrainedModel:
    """The causal language model of a folder, its parameters on the meta device, its buffers real.
    `options` are those of `AutoModelForCausalLM.from_config`."""
    with _weightless():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def empty_like(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same kind as it is without adapters, its parameters float32 and on the meta
    device."""
    with _weightless():
        empty = type(model)(copy.deepcopy(model.config))
    empty.generation_config = model.generation_config
    return empty


def holds(stored: StoredWeights, model: PreTrainedModel) -> bool:
    """Whether the files have every weight of the model under the model's own name and shape."""
    parameters = dict(model.named_parameters())
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    return not buffers and all(
        name in stored and stored.shape(name) == parameter.shape
        for name, parameter in parameters.items()
    )


def fill(
    model: PreTrainedModel, root: nn.Module, device: torch.device, stored: StoredWeights
) -> None:
    """Give the sharded `model`, whose parameters are on the meta device, memory and weights; all
    but those of adapters. `root` is the module that holds it for FSDP."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    root.to_empty(device=device)
    model.tie_weights()  # which `to_empty` forgets
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if plain in stored:
            put(parameter, partial(stored.rows, plain))


@torch.no_grad()
def put(parameter: torch.Tensor, read: Callable[[slice], torch.Tensor]) -> None:
    """Set a parameter, or this process's shard of it, to what `read` gives for its rows."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(read(slice(None)))
        return
    local, rows = parameter.to_local(), slice(0, parameter.shape[0])
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0
            size = -(-parameter.shape[0] // parameter.device_mesh.size(dim))
            first = parameter.device_mesh.get_local_rank(dim) * size
            rows = slice(first, first + len(local))
        else:
            assert placement.is_replicate()
    if len(local):
        local.copy_(read(rows))


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters that modules make are on the meta device."""

    def to_meta(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is: it may be tied
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
