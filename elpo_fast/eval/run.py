"""Evaluation on held-out tasks: the collector with a star planner, graded by the task's verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from elpo_fast.algo.star import StarPlanner
from elpo_fast.config import EvalConfig
from elpo_fast.eval.metrics import wilson_interval
from elpo_fast.rollout.collector import Collector
from elpo_fast.tree.store import Tree


@dataclass(frozen=True)
class EvalResult:
    """Success on held-out tasks. `correct` is bool [tasks, samples]; the same seed and
    configuration give the same tasks, so two results can be compared pairwise."""

    correct: np.ndarray

    @property
    def tasks(self) -> int:
        return int(self.correct.shape[0])

    @property
    def success(self) -> float:
        """Mean over tasks and samples (Mean@samples)."""
        return float(self.correct.mean()) if self.correct.size else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `success`; with several samples a task it counts tasks, not
        samples, and is therefore conservative."""
        return wilson_interval(self.success * self.tasks, self.tasks)


async def evaluate(
    collector: Collector,
    config: EvalConfig,
    *,
    seed: int,
    on_tree: Callable[[Tree], None] | None = None,
) -> EvalResult:
    """Sample `config.samples` trajectories for each of the first `config.tasks` held-out tasks."""
    source = collector.source
    count = (
        config.tasks if source.held_out_size is None else min(config.tasks, source.held_out_size)
    )
    tasks = [source.held_out(index) for index in range(count)]
    trees = await collector.collect(
        tasks,
        lambda: StarPlanner(config.samples),
        seed=seed,
        temperature=config.temperature,
        on_tree=on_tree,
    )
    correct = [[tree.correct[leaf] == 1 for leaf in tree.leaves] for tree in trees]
    return EvalResult(np.array(correct, dtype=bool).reshape(count, config.samples))
