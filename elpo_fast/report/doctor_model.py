"""`elpo doctor MODEL`: whether a model folder or Hub id can be trained here, before its weights are
loaded: tokenizer, chat template, context, and memory for training and for rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from elpo_fast.config import ConfigError, LoraConfig, ModelConfig, RolloutConfig
from elpo_fast.faults import size
from elpo_fast.model.load import check_complete, described, resolve_device, resolve_dtype
from elpo_fast.report.doctor import Part
from elpo_fast.rollout.chat import Chat
from elpo_fast.rollout.local.decoder import SUPPORTED, products_dtype
from elpo_fast.tools.interpreter import PythonSession
from elpo_fast.train.costs import Costs


class Memory(NamedTuple):
    """Bytes of one process, activations apart: of training all weights, with moments in 8 bits, or
    adapters of the default rank; and of the local engine's weights and cache."""

    training: float
    in_8_bits: float
    lora: float
    weights: float
    cache: float

    @staticmethod
    def of(model: PreTrainedModel, dtype: torch.dtype, cache_tokens: int) -> Memory:
        """For `dtype` of computing."""
        costs, number = Costs.of(model), dtype.itemsize
        linear = [m for m in model.base_model.modules() if isinstance(m, nn.Linear)]
        factors = LoraConfig().rank * sum(m.in_features + m.out_features for m in linear)
        base = sum(p.numel() for p in model.parameters())
        product = products_dtype(resolve_device("auto"), dtype).itemsize
        ways = (
            costs.held("adamw", number),
            costs.held("adamw8bit", number),
            replace(costs, trained=factors).held("adamw", number, frozen=base),
        )
        engine = costs.engine(number, product, cache_tokens)
        return Memory(*(sum(each.values()) for each in ways), *engine.values())


def examined(name: str) -> Iterator[Part]:
    """What there is to say of a model."""
    config = ModelConfig(name=name)
    try:
        model, tokenizer = described(config)
        check_complete(name, tokenizer)
    except ConfigError as error:
        yield Part("model", str(error), broken=True)
        return
    kind, count = type(model).__name__, sum(p.numel() for p in model.parameters())
    local = kind in SUPPORTED
    engine = "" if local else "; rollout.engine=local does not compute it, sglang may"
    yield Part("model", f"{kind}, {count / 1e6:,.0f} M parameters{engine}")
    yield _tokenizer(model, tokenizer)
    yield from _template(tokenizer)
    limit, wanted = model.config.max_position_embeddings, RolloutConfig().max_tokens
    shorter = "" if limit >= wanted else f"; set rollout.max_tokens to {limit} or less"
    yield Part("context", f"{limit} positions; rollout.max_tokens is {wanted} by default{shorter}")
    yield from _memory(model, config)


def _tokenizer(model: PreTrainedModel, tokenizer: Any) -> Part:
    text = f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, ends with {tokenizer.eos_token}"
    rows = model.config.vocab_size
    if len(tokenizer) > rows:
        return Part("tokenizer", f"{text}; the model has embeddings of {rows} alone", broken=True)
    return Part("tokenizer", text)


def _template(tokenizer: Any) -> Iterator[Part]:
    try:
        chat = Chat(tokenizer, RolloutConfig().call_format, [PythonSession.schema])
    except ConfigError as error:
        yield Part("chat template", str(error), "model.chat_template=chatml", broken=True)
        return
    for number, note in enumerate(chat.template.notes):
        yield Part("" if number else "chat template", note)


def _memory(model: PreTrainedModel, config: ModelConfig) -> Iterator[Part]:
    device = resolve_device(config.device)
    if device.type == "cuda":
        have, where = torch.cuda.get_device_properties(0).total_memory, "this GPU"
    else:
        have, where = psutil.virtual_memory().total, "this machine"
    dtype, tokens = resolve_dtype(config), RolloutConfig().sizes(device.type).cache_tokens
    need = Memory.of(model, getattr(torch, dtype), tokens)
    yield Part(
        "training",
        f"{size(need.training)} for weights, gradients and moments in {dtype}, "
        f"{size(need.in_8_bits)} with moments in 8 bits, {size(need.lora)} with LoRA; "
        "activations beside (train.micro_batch_tokens)",
    )
    yield Part(
        "rollouts",
        f"{size(need.weights)} for the local engine's weights, {size(need.cache)} for "
        f"rollout.cache_tokens={tokens}",
    )
    room = have - need.weights - need.cache
    ways = {
        f"fits into the {size(have)} of {where}": need.training,
        "fits with train.optimizer=adamw8bit": need.in_8_bits,
        "fits with model.lora={}": need.lora,
    }
    fitting = next((said for said, bytes_ in ways.items() if bytes_ <= room), None)
    said = (
        fitting or f"does not fit into the {size(have)} of {where}, not even with model.lora={{}}"
    )
    brings = None if fitting else "parallel.shard=8, or a smaller model"
    yield Part("memory", said, brings, broken=fitting is None)
