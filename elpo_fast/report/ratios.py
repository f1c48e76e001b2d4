"""How much training moved each token: the policy of a checkpoint against the one that sampled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elpo_fast.config import load_config
from elpo_fast.train.export import run_subject
from elpo_fast.train.parts import settled
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.tree import ops
from elpo_fast.tree.pack import Scored, micro_batches
from elpo_fast.tree.store import Forest

Ratios = Callable[[Forest, Scored], NDArray[np.float64]]
"""Importance ratios of a forest's tokens, 0 on those that are not the agent's."""


def ratios_of(run: Path) -> Ratios:
    """Ratios to a run's latest checkpoint. Raises `LookupError` where it has none."""
    subject = run_subject(run, settled(load_config(run / "config.yaml")))
    config = subject.config
    policy = PolicyOptimizer(
        subject.load([]).model,
        lr=0.0,
        temperature=config.rollout.temperature,
        dtype=getattr(torch, config.model.dtype),
    )

    def ratios(forest: Forest, scored: Scored) -> NDArray[np.float64]:
        found = np.zeros(len(forest.token_ids))
        count = forest.token_count
        before = ops.path_sum(forest.parent, count) - count  # tokens above each node
        budget = config.train.micro_batch_tokens
        batches = micro_batches(forest, scored, range(len(forest)), budget)
        for batch, logprob in zip(batches, policy.logprobs(batches), strict=True):
            own = np.flatnonzero(batch.agent)
            node = batch.node[own]
            place = forest.token_start[node] + batch.position[own] - before[node]
            found[place] = np.exp(logprob[own].astype(np.float64) - forest.logprob[place])
        return found

    return ratios
