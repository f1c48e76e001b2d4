"""The parts of a run, built from its configuration: what samples, what judges, what learns.

The loop trains with them; benchmarks and people who write a loop of their own do too.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from elpo_fast.algo import check
from elpo_fast.config import Config, Sizes, load_config
from elpo_fast.eval.sampler import sampler
from elpo_fast.faults import enough_memory
from elpo_fast.model.load import (
    LoadedModel,
    load_model,
    resolve_compile,
    resolve_device,
    resolve_dtype,
    resolve_template,
)
from elpo_fast.rollout.collector import Collector
from elpo_fast.tasks import make_source, tokenizer_texts
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.train.parallel import ALONE, Ranks, SharedCollector
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.types import Engine, TaskSource


@dataclass(frozen=True)
class Parts:
    """`engine` samples with the weights it was last given, `policy` owns the present ones."""

    toolbox: Toolbox
    source: TaskSource
    loaded: LoadedModel
    policy: PolicyOptimizer
    engine: Engine
    collector: Collector
    ranks: Ranks


def settled(config: Config, *, goes_on: bool = False) -> Config:
    """`config` with all decided that it leaves to the machine: as in the run folder if the run
    `goes_on`, else for this machine."""
    saved = config.run_dir / "config.yaml"
    if goes_on and saved.is_file():
        config = _filled(config, load_config(saved))
    model, sizes = config.model, config.rollout.sizes(resolve_device(config.model.device).type)
    found = {
        "dtype": resolve_dtype(model),
        "compile": resolve_compile(model),
        "chat_template": resolve_template(model),  # its text, that a run has all it needs
    }
    return config.model_copy(
        update={
            "model": model.model_copy(update=found),
            "rollout": config.rollout.model_copy(update=sizes._asdict()),
        }
    )


def _filled(config: Config, other: Config) -> Config:
    """`config` with what it leaves to the machine as in `other`."""
    sections = {}
    for section, names in (("model", ("dtype", "compile")), ("rollout", Sizes._fields)):
        ours, theirs = getattr(config, section), getattr(other, section)
        left = [name for name in names if getattr(ours, name) in ("auto", None)]
        sections[section] = ours.model_copy(update={name: getattr(theirs, name) for name in left})
    return config.model_copy(update=sections)


@asynccontextmanager
async def assembled(
    config: Config,
    ranks: Ranks = ALONE,
    *,
    secret: str | None = None,
    samples: bool = True,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
) -> AsyncIterator[Parts]:
    """Everything a run needs, as it is at its start; closed at the end. `secret`, the same on all
    ranks: see `make_source`. Without `samples` there is no engine. `model`, with its `tokenizer`,
    takes the place of `model.name`.

    Raises `ConfigError` for a task source, model or tool that cannot be had.
    """
    config = settled(config)
    check(config.algo)
    toolbox = Toolbox(config.tools)
    try:
        drawn = config.task, config.run.seed, toolbox.run_function
        source = make_source(*drawn, secret, apart=toolbox.apart)
        toolbox.offer(source.tools)
        loaded = load_model(
            config.model,
            seed=config.run.seed,
            tokenizer_texts=tokenizer_texts(source, *drawn),
            tokenizer=tokenizer,
            shard=ranks.shard(getattr(torch, config.model.dtype)),
            model=model,
        )
        kind = partial(SharedCollector, ranks)
        mine = ranks.engine_of(config)
        async with sampler(
            mine, toolbox, source, loaded, rank=ranks.rank, kind=kind, samples=samples
        ) as collector:
            with enough_memory(
                "making room for training",
                "take a smaller model, or set parallel.shard, model.lora or train.optimizer",
            ):
                policy = PolicyOptimizer(
                    loaded.model,
                    lr=config.train.lr,
                    betas=config.train.betas,
                    optimizer=config.train.optimizer,
                    weight_decay=config.train.weight_decay,
                    grad_clip=config.train.grad_clip,
                    temperature=config.rollout.temperature,
                    ratio_cap=config.algo.clip.dual or math.inf,
                    dtype=getattr(torch, config.model.dtype),
                    gradient_checkpointing=config.model.gradient_checkpointing,
                    compiled=config.model.compile is True,
                    ranks=ranks,
                    root=loaded.root,
                )
            yield Parts(toolbox, source, loaded, policy, collector.engine, collector, ranks)
    finally:
        await toolbox.close()
