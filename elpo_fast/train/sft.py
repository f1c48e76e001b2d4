"""Cold start: supervised fine-tuning on the task source's own demonstrations.

A demonstration is a one-branch rollout tree whose tools really ran, so it goes through the same
packed forward as reinforcement learning; its loss is the mean negative log-likelihood over the
agent tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from elpo_fast.config import Config, ConfigError
from elpo_fast.rollout.collector import Collector
from elpo_fast.train.step import PolicyOptimizer, StepStats, micro_batches
from elpo_fast.tree.pack import Scored
from elpo_fast.tree.store import Forest


def sft_tasks(config: Config) -> int:
    """Training tasks used up by the cold start; reinforcement learning begins after them."""
    return config.sft.steps * config.sft.batch


async def cold_start(
    config: Config,
    collector: Collector,
    optimizer: PolicyOptimizer,
    on_step: Callable[[int, StepStats], None],
) -> None:
    """Train for `config.sft.steps` steps of `config.sft.batch` demonstrations each."""
    for step in range(config.sft.steps):
        trees = []
        for index in range(step * config.sft.batch, (step + 1) * config.sft.batch):
            tree = await collector.demonstrate(collector.source.train(index))
            if tree is None:
                raise ConfigError(
                    f"task source {collector.source.name} has no solver to demonstrate with; "
                    "set sft.steps=0 or start from a model that knows the tool format"
                )
            trees.append(tree)
        forest = Forest.from_trees(trees)
        batches = micro_batches(
            forest,
            imitation(forest),
            range(len(trees)),
            budget_tokens=config.train.micro_batch_tokens,
        )
        on_step(step, optimizer.nll_update(batches))


def imitation(forest: Forest) -> Scored:
    """Weights of the mean over all agent tokens, in the form that trees are packed with."""
    zero = np.zeros(len(forest.parent))
    pos = zero + 1.0 / max(int(forest.agent.sum()), 1)
    return Scored(zero, zero, zero, zero, pos=pos, neg=zero, eps_low=zero, eps_high=0.0)
