"""Cold start: supervised fine-tuning on the task source's own demonstrations.

A demonstration is a one-branch rollout tree whose tools really ran, so it goes through the same
packed forward as reinforcement learning; the loss is the mean negative log-likelihood over the
agent tokens of the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from elpo_fast.config import Config, ConfigError
from elpo_fast.rollout.collector import Collector
from elpo_fast.train.metrics import StepStats
from elpo_fast.train.step import PolicyOptimizer, micro_batches, warmup_cosine
from elpo_fast.tree.pack import Scored
from elpo_fast.tree.store import Forest

WINDOW = 8  # updates over which the loss is averaged for `sft.target_loss`


async def cold_start(
    config: Config,
    collector: Collector,
    optimizer: PolicyOptimizer,
    on_step: Callable[[StepStats], None] = lambda _: None,
    *,
    guard: Callable[[Forest], AbstractContextManager[None]] = lambda _: nullcontext(),
    seed: int,
) -> None:
    """Train on the first `sft.demonstrations` training tasks for `sft.epochs`, in random order.

    The optimizer starts afresh with the cold start's learning rate and a warm-up and cosine of it.
    `guard` is entered around each update of a forest. Stops when the mean loss of the last `WINDOW`
    updates is at or below `sft.target_loss`. Raises `ConfigError` where the task source has no
    solver.
    """
    source, sft = collector.source, config.sft
    optimizer.restart(lr=sft.lr, schedule=warmup_cosine(sft.warmup, sft.steps))
    demonstrated = await collector.demonstrations(
        [source.train(index) for index in range(sft.demonstrations)]
    )
    trees = [tree for tree in demonstrated if tree is not None]
    if len(trees) < len(demonstrated):
        raise ConfigError(
            f"task source {source.name} has no solver to demonstrate with; "
            "set sft.demonstrations=0 and start from a model that knows the tool format"
        )
    rng = np.random.default_rng(seed)
    recent: deque[float] = deque(maxlen=WINDOW)
    for _ in range(sft.epochs):
        order = rng.permutation(len(trees))
        for first in range(0, len(trees), sft.batch):
            forest = Forest.from_trees([trees[i] for i in order[first : first + sft.batch]])
            batches = micro_batches(
                forest,
                imitation(forest),
                range(len(forest)),
                budget_tokens=config.train.micro_batch_tokens,
            )
            with guard(forest):
                stats = optimizer.nll_update(batches)
            on_step(stats)
            recent.append(stats.loss)
            if len(recent) == WINDOW and sum(recent) / WINDOW <= sft.target_loss:
                return


def imitation(forest: Forest) -> Scored:
    """Weights of the mean over all agent tokens, in the form that trees are packed with."""
    zero = np.zeros(len(forest.parent))
    pos = zero + 1.0 / max(int(forest.agent.sum()), 1)
    return Scored(zero, zero, zero, zero, pos=pos, neg=zero, eps_low=zero, eps_high=0.0)
