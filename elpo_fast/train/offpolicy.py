"""What the sampling policy and the trained one disagree by, and the correction for it.

Rollouts come from the behaviour policy mu: the engine, with its own rounding and, where collecting
overlaps training, with older weights. The clipped ratio pi / pi_old may be taken against mu itself
(`train.old_logprob: rollout`), or against the trainer's own log-probs before the step
(`recompute`). Then the tokens' weights can be corrected by truncated importance sampling,

    token:     w_t = min(c, pi_old(t) / mu(t)),
    sequence:  w_i = min(c, prod_t pi_old(t) / mu(t)) over the agent tokens of trajectory i,

with the cap `c = train.importance_cap`. A token-level weight multiplies the token's coefficients, a
sequence-level one the weight of its trajectory before trajectories are summed over shared tokens,
so that both are exact on trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elpo_fast.config import TrainConfig
from elpo_fast.tree import ops
from elpo_fast.tree.pack import PackedBatch
from elpo_fast.tree.store import Forest

Floats = NDArray[np.floating]


def log_ratios(batches: Sequence[PackedBatch], logprobs: Sequence[Floats]) -> list[Floats]:
    """Of each batch, `log pi_old(t) / mu(t)` in nats, `[P]` in float64, from the trainer's
    log-probs `[P]`; 0 on tokens that are not the agent's."""
    return [
        np.where(batch.agent, new.astype(np.float64) - batch.old_logprob, 0.0)
        for batch, new in zip(batches, logprobs, strict=True)
    ]


def corrected(batch: PackedBatch, logprob: Floats, gap: Floats, config: TrainConfig) -> PackedBatch:
    """A batch with the trainer's log-probs as old ones, and with token-level weights if these are
    configured."""
    batch = replace(batch, old_logprob=logprob)
    if config.importance_sampling != "token":
        return batch
    weight = truncated(gap, config.importance_cap).astype(np.float32)
    return replace(batch, pos_coef=batch.pos_coef * weight, neg_coef=batch.neg_coef * weight)


def mismatch(gap: Floats) -> dict[str, float]:
    """Of log-prob differences `[T]` (nats): mean and largest size, and the effective sample size
    `(sum r)^2 / (T sum r^2)` of the ratios `r = exp(gap)`, as a share in (0, 1]."""
    if not len(gap):
        return {}
    size = np.abs(gap)
    ratio = np.exp(gap.astype(np.float64) - gap.max())
    return {
        "mismatch_mean": float(size.mean()),
        "mismatch_max": float(size.max()),
        "mismatch_ess": float(ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())),
    }


def sequence_weights(
    forest: Forest, batches: Sequence[PackedBatch], gaps: Sequence[Floats], cap: float
) -> NDArray[np.float64]:
    """Truncated product of the ratios along each trajectory, `[L]`; 1 for trees not in a batch."""
    of_node = node_sum(forest, batches, gaps)
    return truncated(ops.path_sum(forest.parent, of_node)[forest.leaf_node], cap)


def node_sum(
    forest: Forest, batches: Sequence[PackedBatch], columns: Sequence[NDArray[Any]]
) -> NDArray[np.float64]:
    """Sums over the tokens of each node, `[N]`, of a column `[P]` of each batch."""
    total = np.zeros(len(forest.parent))
    for batch, column in zip(batches, columns, strict=True):
        total += np.bincount(batch.node, column, minlength=len(total))
    return total


def truncated(gap: Floats, cap: float) -> NDArray[np.float64]:
    """`min(cap, exp(gap))` without overflow."""
    return np.exp(np.minimum(gap, np.log(cap)))
