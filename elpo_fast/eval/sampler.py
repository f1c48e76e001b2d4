"""What an evaluation and a training run have in common: a model's engine among tools and tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from elpo_fast.config import Config
from elpo_fast.model.load import LoadedModel
from elpo_fast.model.lora import named_weights
from elpo_fast.rollout.chat import Chat
from elpo_fast.rollout.collector import Collector
from elpo_fast.rollout.engines import NoEngine, make_engine
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import Engine, TaskSource


@asynccontextmanager
async def sampler(
    config: Config,
    toolbox: Toolbox,
    source: TaskSource,
    loaded: LoadedModel,
    *,
    rank: int = 0,
    kind: Callable[..., Collector] = Collector,
    samples: bool = True,
) -> AsyncIterator[Collector]:
    """A collector, of this `kind`, on an engine of its own, which is closed at the end. `rank`: of
    this process, among several. Tasks of a file whose prompts have no room are left out of the
    source, or refused by a `ConfigError`. Without `samples` nothing will be asked of the engine."""
    engine: Engine = NoEngine()
    if samples:
        weights = named_weights(loaded.model)
        engine = make_engine(config, loaded.model, loaded.tokenizer, weights, rank=rank)
    try:
        chat = Chat(
            loaded.tokenizer,
            config.rollout.call_format,
            toolbox.schemas,
            loaded.end_token_ids,
            config.model.chat_template_kwargs,
        )
        if samples and (fit := getattr(source, "fit_prompts", None)) is not None:
            fit(chat.prompt, config.rollout.max_tokens)
        tokens = config.tools.output_tokens
        yield kind(engine, toolbox, chat, source, config.rollout, output_tokens=tokens)
    finally:
        await engine.close()
