"""Low-rank adapters (LoRA) through peft: the base is frozen, two small factors a layer are trained.

A layer of weight W computes x (W + scale B A)ᵀ with A `[r, in]`, B `[out, r]`, scale = alpha / r.

Invariants: the base lies in the compute dtype, once, and nobody writes to it; adapters are float32
master weights; B starts at 0, so that a fresh policy is the base model; A follows from the seed.
Engines know nothing of adapters: `named_weights` gives them the base model's names, and merges one
weight when it is read.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from elpo_kernels import LoRA
from torch import nn
from transformers import PreTrainedModel

from elpo_fast.config import ConfigError, LoraConfig
from elpo_fast.model.sharded import put
from elpo_fast.types import whole

_ADAPTER = "default"
_FACTORS = ("lora_A", "lora_B")


class Merged:
    """The weight W + scale B A of an adapted layer, computed when `full_tensor` is called.

    Where the three are sharded over processes, all processes have to call it.
    """

    def __init__(self, base: torch.Tensor, lora: LoRA) -> None:
        self.shape = base.shape
        self._base, self._lora = base, lora

    def detach(self) -> Merged:
        return self

    @torch.no_grad()
    def full_tensor(self) -> torch.Tensor:
        """`[out, in]`, float32 unless a part is more precise; a new tensor."""
        base, a, b = (whole(tensor) for tensor in (self._base, *self._lora[:2]))
        return base + self._lora.scale * (b @ a)


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze `model` and give its layers adapters, in place; `initialise` must follow.
    Raises `ConfigError` where peft is missing or too old, or the targets do not fit."""
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "model.lora needs peft, which is not installed; run `pip install 'elpo-fast[lora]'`"
        ) from None
    targets = config.targets
    if not isinstance(targets, str):
        _check_targets(model, targets)
    described = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,  # an importance ratio compares one policy with itself
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # peft fills them at random, before we do
        try:
            model.add_adapter(described, _ADAPTER)
        except ValueError as error:  # transformers asks for a newer peft
            raise ConfigError(f"model.lora: {error}") from error
    for parameter in adapters(model).values():
        parameter.data = parameter.data.float()


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Fresh adapters: A uniform as peft's, each from a generator of its own, and B zero."""
    for name, parameter in adapters(model).items():
        values = torch.zeros(parameter.shape)
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        put(parameter, values.__getitem__)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all adapters by name; none of a model without."""
    return {name: p for name, p in model.named_parameters() if _factor(name)}


def lora_of(layer: nn.Module) -> LoRA | None:
    """The adapter of a layer; `None` of one without."""
    if not hasattr(layer, "lora_A"):
        return None
    a, b = (getattr(layer, factor)[_ADAPTER].weight for factor in _FACTORS)
    scaling: Any = layer.scaling
    return LoRA(a, b, scaling[_ADAPTER])


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """What the model computes with, by the names that it has without adapters: its own parameters,
    and a `Merged` for every adapted weight."""
    for name, parameter in model.named_parameters():
        if _factor(name):
            continue
        layer, base, rest = name.partition(".base_layer.")
        lora = lora_of(model.get_submodule(layer)) if base and rest == "weight" else None
        plain = f"{layer}.{rest}" if base else name
        yield plain, parameter if lora is None else Merged(parameter, lora)


def _factor(name: str) -> bool:
    return any(f".{factor}." in name for factor in _FACTORS)


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """Every target is a linear layer, and one whose merged weight is nobody else's."""
    linear: Mapping[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"model.lora.targets: this model has no linear layer {target!r}; "
                f"known: {', '.join(known)}"
            )
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight and any(
        module is head and f".{name}".endswith(f".{target}")
        for name, module in linear.items()
        for target in targets
    ):
        raise ConfigError(
            "model.lora.targets: this model's head is its embedding, which an adapter of the head "
            "would change as well; leave the head out"
        )
