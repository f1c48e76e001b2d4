"""Which engine a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from elpo_fast.config import Config, ConfigError
from elpo_fast.faults import enough_memory
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.types import Engine, EngineStats


def make_engine(
    config: Config,
    model: PreTrainedModel,
    tokenizer: Any,
    weights: Iterable[tuple[str, Any]] | None = None,
    *,
    rank: int = 0,
) -> Engine:
    """The engine of `rollout.engine`, holding `weights` as version 0; `None`: `model`'s own.
    `rank`: of this process, among several that have an engine each."""
    rollout = config.rollout
    dtype = getattr(torch, rollout.dtype or config.model.dtype)
    if rollout.engine == "sglang":
        from elpo_fast.rollout.sglang.engine import SGLangEngine

        log = config.run_dir / (f"sglang-{rank}.log" if rank else "sglang.log")
        return SGLangEngine(
            rollout, model, tokenizer, dtype=dtype, log=log, seed=config.run.seed, weights=weights
        )
    sizes = rollout.sizes(model.device.type)
    with enough_memory(
        "making room for the engine",
        f"lower rollout.cache_tokens={sizes.cache_tokens}, or set rollout.dtype=bfloat16",
    ):
        engine = LocalEngine(
            model,
            tokenizer,
            max_batch=sizes.max_batch,
            cache_tokens=sizes.cache_tokens,
            seed=config.run.seed,
            dtype=dtype,
            weights=weights,
        )
    if rollout.max_tokens > engine.context:
        raise ConfigError(
            f"rollout.max_tokens={rollout.max_tokens} exceeds the {engine.context} tokens that the "
            f"model's context and rollout.cache_tokens={sizes.cache_tokens} hold; lower it"
        )
    return engine


class NoEngine:
    """Of a run that samples nothing."""

    weight_version = 0

    async def generate(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("this run samples nothing")

    score = update_weights = generate

    async def release(self) -> None:
        return None

    close = release

    def stats(self) -> EngineStats:
        return EngineStats()
