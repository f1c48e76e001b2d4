"""Figures of one step: what its trees look like and what its updates did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from elpo_kernels import PolicyStats
from numpy.typing import NDArray

from elpo_fast.regions import COMPUTED, REGIONS, Total
from elpo_fast.rollout.collector import Collector
from elpo_fast.train.costs import DEFINED, Costs
from elpo_fast.tree import ops
from elpo_fast.tree.store import Forest
from elpo_fast.types import Engine, valid_text

_FIGURES = 1 + len(PolicyStats._fields)


@dataclass(frozen=True, slots=True)
class StepStats:
    """One update. Means are over the rows of the loss (`tree.pack.LossRows`); ratio and clip
    figures are those before the update, 1 and 0 where there is no ratio (negative
    log-likelihood)."""

    loss: float
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # distinct prefixes, which is what was computed
    trained_tokens: int  # rows of the loss
    ratio_mean: float = 1.0
    ratio_max: float = 1.0
    clipped_low: float = 0.0  # share of tokens held by the lower bound
    clipped_high: float = 0.0
    approx_kl: float = 0.0  # mean of r - 1 - log r
    gap: NDArray[np.float32] = field(  # [trained_tokens] log r, in nats
        default_factory=lambda: np.zeros(0, np.float32), compare=False, repr=False
    )


@dataclass(frozen=True, slots=True)
class Part:
    """What one micro-batch contributed. `values`, the loss, `PolicyStats` and the trained tokens'
    log r, or the loss alone `[1]`, lie on the device until those of a whole update are read."""

    tokens: int
    trained_tokens: int
    values: Any  # tensor or array [1 + 7 + trained_tokens], or [1]

    @property
    def loss(self) -> float:
        """Waits for the device where `values` are there still."""
        return float(self.values[0])

    @property
    def stats(self) -> dict[str, float]:
        """Empty where there are no ratios."""
        return dict(zip(PolicyStats._fields, self.values[1:_FIGURES].tolist(), strict=False))

    @property
    def gap(self) -> Any:
        """`[trained_tokens]` log r, in nats; empty where there are no ratios."""
        return self.values[_FIGURES:]


def combined(parts: Sequence[Part], norm: float, lr: float) -> StepStats:
    """The update that its micro-batches, at least one, make."""
    trained = sum(part.trained_tokens for part in parts)
    stats = [part.stats for part in parts]

    def mean(name: str) -> float:
        pairs = zip(stats, parts, strict=True)
        return sum(each[name] * part.trained_tokens for each, part in pairs) / trained

    means = ("ratio_mean", "clipped_low", "clipped_high", "approx_kl") if stats[0] else ()
    return StepStats(
        loss=sum(part.loss for part in parts),
        grad_norm=norm,
        lr=lr,
        tokens=sum(part.tokens for part in parts),
        trained_tokens=trained,
        gap=np.concatenate([part.gap for part in parts]),
        ratio_max=max(each.get("ratio_max", 1.0) for each in stats),
        **{name: mean(name) for name in means},
    )


def tree_metrics(forest: Forest) -> dict[str, Any]:
    """Success, localization and token sharing of a forest; shares are in [0, 1].

    `sharing` is the number of tokens of all trajectories over that of the trees' nodes.
    """
    leaves = forest.leaf_node
    correct = forest.correct[leaves] == 1
    successes = np.add.reduceat(correct, forest.leaf_start[:-1], dtype=np.int64)
    mixed = (successes > 0) & (successes < np.diff(forest.leaf_start))
    path_tokens = trajectory_tokens(forest)
    calls = ops.path_sum(forest.parent, forest.tool_call.astype(np.int64))[leaves]
    agent = forest.agent.astype(bool)
    unique = len(forest.token_ids)
    return {
        "success": float(correct.mean()),
        "reward": float(forest.reward[leaves].mean()),
        "trajectories": len(leaves),
        "trees_mixed": float(mixed.mean()),
        "searches": len(forest.critical_node),
        "failures": int((~correct).sum()),
        "failures_localized": failures_localized(forest),
        "tool_calls": float(calls.mean()),
        "entropy": float(forest.entropy[agent].mean()) if agent.any() else 0.0,
        "unique_tokens": unique,
        "agent_tokens": int(agent.sum()),
        "sharing": float(path_tokens.sum() / max(unique, 1)),
        **{f"end_{end}": n / len(leaves) for end, n in sorted(Counter(forest.ends).items())},
    }


def sample_texts(forest: Forest, decode: Callable[[NDArray[np.int32]], str]) -> dict[str, str]:
    """The first correct and the first failed trajectory of a forest, if it has them: task, verdict
    and the whole text as the model saw and wrote it."""
    correct = forest.correct[forest.leaf_node] == 1
    texts = {}
    for name, wanted in (("correct", correct), ("failed", ~correct)):
        if not wanted.any():
            continue
        leaf = int(wanted.argmax())
        node, parts = int(forest.leaf_node[leaf]), []
        tree = int(np.searchsorted(forest.leaf_start, leaf, side="right")) - 1
        reward = forest.reward[node]
        while node >= 0:
            parts.append(forest.token_ids[forest.token_start[node] : forest.token_start[node + 1]])
            node = int(forest.parent[node])
        verdict = f"reward {reward:g}, ended by {forest.ends[leaf]}: {forest.reasons[leaf]}"
        chat = decode(np.concatenate(parts[::-1]))
        texts[name] = valid_text(f"{forest.task_ids[tree]}\n{verdict}\n\n{chat}")
    return texts


def trajectory_tokens(forest: Forest) -> NDArray[np.int64]:
    """Tokens of each trajectory `[L]`, prompt included."""
    return ops.path_sum(forest.parent, np.diff(forest.token_start))[forest.leaf_node]


def failures_localized(forest: Forest) -> float:
    """Share of the failed trajectories that pass through a localized first irrecoverable step."""
    marked = np.zeros(len(forest.parent), np.int64)
    marked[forest.critical_node[forest.critical_localized]] = 1
    passes = ops.path_sum(forest.parent, marked)[forest.leaf_node] > 0
    failed = forest.correct[forest.leaf_node] == 0
    return float(passes[failed].mean()) if failed.any() else 0.0


class Counts:
    """What engine and tools did since creation: prompt tokens asked for, taken from the cache and
    computed, tool and template tokens, calls, trajectories, faults and seconds."""

    def __init__(self, engine: Engine, collector: Collector) -> None:
        self._engine, self._collector = engine, collector
        self._before = self._now()

    def difference(self) -> dict[str, float]:
        now = self._now()
        return {name: now[name] - before for name, before in self._before.items()}

    def _now(self) -> dict[str, float]:
        engine, tools = self._engine.stats(), self._collector.stats
        return {
            "prompt_tokens": engine.prompt_tokens,
            "prompt_tokens_cached": engine.cached_tokens,
            "prompt_tokens_computed": engine.computed_tokens,
            "generated_tokens": engine.generated_tokens,
            "tool_tokens": tools.tool_tokens,
            "tool_runs": tools.tool_calls,
            "rollouts": tools.trajectories,
            "tool_errors": tools.tool_errors,
            "malformed_calls": tools.malformed_calls,
            "faults": tools.faults,
            "tool_seconds": tools.tool_seconds,
        }


def totals(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The counts of all ranks as one."""
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def mean_stats(updates: Sequence[StepStats]) -> dict[str, float]:
    """Mean of every figure over a step's updates (`ratio_max`: the maximum); empty for none."""
    values: dict[str, float] = {"updates": len(updates)}
    for name in (each.name for each in fields(StepStats) if each.name != "gap"):
        column = [getattr(update, name) for update in updates]
        if column:
            values[name] = float(max(column) if name == "ratio_max" else np.mean(column))
    return values


def region_metrics(
    seconds: float, totals: Mapping[str, Total], costs: Costs, width: int, peak: float
) -> dict[str, float]:
    """Where a step of `seconds` spent its time: seconds of every region, which with `time/other`
    add up to `time/step`, tokens, operations and bytes where they are defined, and the wall time of
    tools that decoding hid. `width`: bytes of the engine's numbers; `peak`: operations a second of
    this process's device."""
    none = Total()
    all_of = {name: totals.get(name, none) for name in REGIONS}
    named = sum(total.seconds for total in totals.values())
    values = {
        "time/step": seconds,
        **{f"time/{name}": total.seconds for name, total in all_of.items()},
        "time/other": seconds - named,
        "time/tool_hidden": all_of["tool"].covered - all_of["tool"].seconds,
        **{f"tokens/{name}": all_of[name].tokens for name in DEFINED["tokens"]},
        **{f"flops/{name}": costs.flops(name, all_of[name]) for name in DEFINED["flops"]},
        **{f"bytes/{name}": costs.bytes(name, all_of[name], width) for name in DEFINED["bytes"]},
    }
    if trained := sum(all_of[name].seconds for name in COMPUTED):
        values["mfu"] = costs.trained_flops(totals) / (trained * peak)
    return values


def device_idle(seconds: float, totals: Mapping[str, Total]) -> float:
    """Share of a step in which nobody gave a device work: neither trainer nor engine computed."""
    working = (*COMPUTED, "prefill", "decode", "sampling", "weight_sync")
    return 1 - sum(totals[name].seconds for name in working if name in totals) / seconds


def staleness(forest: Forest, weight_version: int) -> dict[str, float]:
    """By how many weight pushes the trajectories' oldest steps lag behind `weight_version`."""
    # Versions only grow along a path, so the first step after the prompt is the oldest.
    first = (forest.parent >= 0) & (forest.parent[forest.parent] < 0)
    oldest = ops.path_sum(forest.parent, np.where(first, forest.weight_version, 0))
    lag = weight_version - oldest[forest.leaf_node]
    return {"staleness_mean": float(lag.mean()), "staleness_max": int(lag.max())}
