"""Evaluation on held-out tasks: the collector with a star planner, graded by the task's verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from elpo_fast.algo.star import StarPlanner
from elpo_fast.config import ConfigError, EvalConfig
from elpo_fast.eval.metrics import wilson_interval
from elpo_fast.rollout.collector import Collector
from elpo_fast.tree.store import Tree
from elpo_fast.types import Task, TaskSource


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


def held_out_tasks(source: TaskSource, config: EvalConfig) -> list[Task]:
    """The first `config.tasks` held-out tasks, or all that there are. Raises `ConfigError` where
    that has no end."""
    sizes = [size for size in (config.tasks, source.held_out_size) if size is not None]
    if not sizes:
        raise ConfigError(
            f"eval.tasks: null asks for all held-out tasks, and those of {source.name} have no "
            "end; give a number"
        )
    return [source.held_out(index) for index in range(min(sizes))]


async def evaluate(
    collector: Collector,
    config: EvalConfig,
    *,
    seed: int,
    tasks: list[Task] | None = None,
    on_tree: Callable[[Tree], None] | None = None,
) -> EvalResult:
    """Sample `config.samples` trajectories for each of `tasks`, by default `held_out_tasks`; their
    trees have no branches, so as many of them grow at once as fill a batch of the engine."""
    if tasks is None:
        tasks = held_out_tasks(collector.source, config)
    sizes = collector.config.sizes()
    trees = await collector.collect(
        tasks,
        lambda: StarPlanner(config.samples),
        seed=seed,
        temperature=config.temperature,
        in_flight=max(sizes.trees_in_flight, sizes.max_batch // config.samples),
        on_tree=on_tree,
    )
    correct = [[tree.correct[leaf] == 1 for leaf in tree.leaves] for tree in trees]
    return EvalResult(np.array(correct, dtype=bool).reshape(len(tasks), config.samples))
