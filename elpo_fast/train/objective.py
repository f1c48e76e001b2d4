"""What an update optimizes beside the clipped ratios of tokens, on packed trees.

Ratios of turns and sequences (GSPO, arXiv 2507.18071) are geometric means over the agent tokens of
a step or of a trajectory, clipped as one and weighing as much as their tokens together:

    r_u = exp(mean over t in u of l_t - old_t),
    J = sum_u (sum over t in u of w_t) min(r_u A, clip(r_u) A).

The penalty for leaving the reference policy is `k3` on every token that the agent wrote, averaged
as the weights say: `kl_coef sum_t w_t (exp(ref_t - l_t) - (ref_t - l_t) - 1)`.

All of these are functions of the log-probs `l` alone. `linearised` computes these once without a
gradient, whatever the split into micro-batches, and from them `g_t = dJ / dl_t`; the gradient of J
then is that of a plain policy gradient with `g` as its coefficients, which batches can express:
ratios are taken against the present policy, where they are 1. Exact, for one more forward pass.

The entropy bonus is `entropy_coef sum_t w_t H_t`, with its own coefficient on every agent token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from elpo_kernels import policy_loss
from numpy.typing import NDArray

from elpo_fast.train.metrics import StepStats
from elpo_fast.train.offpolicy import Floats, log_ratios, node_sum
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.tree import ops
from elpo_fast.tree.pack import PackedBatch, Scored
from elpo_fast.tree.store import Forest


@dataclass(frozen=True)
class ObjectiveStats:
    """Figures of an update before it is made."""

    shift: float  # of the loss, from that of the plain policy gradient
    reference_kl: float  # weighted mean of k3 over the agent's tokens, nats; 0 without a reference
    gap: Floats  # [U] log ratios of tokens, turns or sequences
    stats: dict[str, Any]  # of ratios

    def of(self, update: StepStats) -> StepStats:
        """The update's figures, with these in the place of a plain policy gradient's."""
        return replace(update, loss=update.loss + self.shift, gap=self.gap, **self.stats)


@dataclass(frozen=True)
class _Units:
    """What has a ratio of its own, `[U]` each; `number` of tokens."""

    gap: Floats
    number: NDArray[np.integer]
    pos: Floats
    neg: Floats
    low: Floats
    high: Floats


def linearised(
    policy: PolicyOptimizer,
    forest: Forest,
    scored: Scored,
    batches: Sequence[PackedBatch],
    *,
    ratio: Literal["token", "turn", "sequence"],
    scale: float,
    kl_coef: float = 0.0,
    reference: Sequence[Floats] = (),
) -> tuple[list[PackedBatch], ObjectiveStats]:
    """Batches with the gradient of the objective. `scale` is that of the batches' coefficients,
    `reference` the log-probs `[P]` of each batch under the reference policy."""
    current = [each.astype(np.float64) for each in policy.logprobs(batches)]
    gaps, leaf = log_ratios(batches, current), forest.leaf_node
    by_node = partial(node_sum, forest, batches)

    def by_token(of_node: Floats) -> list[Floats]:
        return [of_node[batch.node] * batch.agent for batch in batches]

    count = by_node([batch.agent for batch in batches]).astype(np.int64)
    bounds = scored.eps_low, np.full(len(forest.parent), scored.eps_high)
    if ratio == "token":
        columns = ("pos_coef", "neg_coef", "eps_low", "eps_high")
        pos, neg, low, high = (
            np.concatenate([getattr(batch, name) for batch in batches]) for name in columns
        )
        units = _Units(np.concatenate(gaps), np.ones(len(pos), np.int64), pos, neg, low, high)
    elif ratio == "turn":
        pos, neg = (by_node([getattr(b, n) for b in batches]) for n in ("pos_coef", "neg_coef"))
        units = _Units(by_node(gaps) / np.maximum(count, 1), count, pos, neg, *bounds)
    else:
        assert scored.of_leaf is not None and scored.weight is not None
        number = ops.path_sum(forest.parent, count)[leaf]
        total = ops.path_sum(forest.parent, by_node(gaps))[leaf]
        chosen = np.isin(forest.tree[leaf], np.concatenate([batch.trees for batch in batches]))
        value = np.where(chosen, scale * scored.weight * number * scored.of_leaf, 0.0)
        low, high = (bound[leaf] for bound in bounds)
        mean = total / np.maximum(number, 1)
        units = _Units(mean, number, np.maximum(value, 0), np.minimum(value, 0), low, high)
    loss, derivative, figures = _surrogate(units, policy.ratio_cap)
    each = derivative / np.maximum(units.number, 1)  # of every token's log-prob
    if ratio == "token":
        gradient = np.split(each, np.cumsum([len(batch) for batch in batches])[:-1])
    else:
        of_node = each if ratio == "turn" else ops.leaf_sum(forest.parent, leaf, each)
        gradient = by_token(of_node)
    divergence = 0.0
    if kl_coef:
        mass = by_token(token_weight(forest, scored) * scale)
        for at, (weight, ours, theirs) in enumerate(zip(mass, current, reference, strict=True)):
            away = np.where(weight > 0, theirs - ours, 0.0)
            divergence += float((weight * (np.expm1(away) - away)).sum())
            gradient[at] = gradient[at] - kl_coef * weight * np.expm1(away)
        loss += kl_coef * divergence
        divergence /= max(sum(float(weight.sum()) for weight in mass), 1e-300)
    changed = [
        _with_gradient(batch, logprob, own)
        for batch, logprob, own in zip(batches, current, gradient, strict=True)
    ]
    live = (units.pos != 0) | (units.neg != 0)
    shift = loss + sum(float((batch.pos_coef + batch.neg_coef).sum()) for batch in changed)
    return changed, ObjectiveStats(shift, divergence, units.gap[live], figures)


def with_entropy(
    forest: Forest, scored: Scored, batches: Sequence[PackedBatch], coef: float
) -> list[PackedBatch]:
    """Batches with the entropy bonus `coef` on the agent's tokens; the batches' scale is in it."""
    mass = token_weight(forest, scored) * coef
    return [
        replace(batch, entropy_coef=(mass[batch.node] * batch.agent).astype(batch.pos_coef.dtype))
        for batch in batches
    ]


def token_weight(forest: Forest, scored: Scored) -> NDArray[np.float64]:
    """Of one token of each node, over all trajectories through it, `[N]`."""
    assert scored.weight is not None
    return ops.leaf_sum(forest.parent, forest.leaf_node, scored.weight)


def _surrogate(units: _Units, ratio_cap: float) -> tuple[float, Floats, dict[str, float]]:
    """The clipped loss, its derivative by each unit's mean log-prob, and the figures of ratios."""
    gap, pos, neg, low, high = (
        torch.from_numpy(np.asarray(getattr(units, name), np.float64))
        for name in ("gap", "pos", "neg", "low", "high")
    )
    gap.requires_grad_()
    out = policy_loss(gap, torch.zeros_like(gap), pos, neg, low, high, ratio_cap=ratio_cap)
    out.loss.backward()
    assert gap.grad is not None
    names = ("ratio_mean", "ratio_max", "clipped_low", "clipped_high", "approx_kl")
    figures = {name: float(getattr(out.stats, name)) for name in names}
    return float(out.loss.detach()), gap.grad.numpy(), figures


def _with_gradient(batch: PackedBatch, logprob: Floats, gradient: Floats) -> PackedBatch:
    """A batch whose loss has this `gradient [P]` by the log-probs, and these as old ones."""
    dtype, free = batch.pos_coef.dtype, np.ones_like(batch.eps_low)
    return replace(
        batch,
        old_logprob=logprob.astype(batch.old_logprob.dtype),
        pos_coef=np.maximum(-gradient, 0.0).astype(dtype),
        neg_coef=np.minimum(-gradient, 0.0).astype(dtype),
        eps_low=free,
        eps_high=free,
    )
