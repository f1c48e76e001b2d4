"""Analyses that sample: trees of a run's policy on held-out tasks, and more in them to judge by."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from elpo_fast.algo import make_planner, score
from elpo_fast.algo.bel import BelPlanner
from elpo_fast.algo.further import (
    REPLACED,
    FlowPlanner,
    agreement_flow,
    branches,
    ranking_flow,
    recovery_flow,
)
from elpo_fast.algo.planners import Planner, trajectory_of
from elpo_fast.config import AlgoConfig, run_config
from elpo_fast.eval.metrics import kendall_tau, pairwise_accuracy, wilson_interval
from elpo_fast.eval.run import held_out_tasks
from elpo_fast.eval.sampler import sampler
from elpo_fast.report.analyse import Analysis
from elpo_fast.report.plots import new_figure
from elpo_fast.tasks import make_source
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.train.export import run_subject
from elpo_fast.train.parts import settled
from elpo_fast.tree.store import Forest, Tree

Collect = Callable[[Callable[[], Planner]], Awaitable[list[Tree]]]
"""A tree of each task, by a planner of its own."""


def sampled(
    kind: str, run: Path, step: int | None, overrides: Sequence[str], samples: int
) -> Analysis:
    """The analysis called `kind` of the checkpoint of `step`, by default the latest, on the first
    `eval.tasks` held-out tasks. Raises `LookupError` where there is no such run or checkpoint."""
    overrides = ["train.old_logprob=recompute", *overrides]  # nothing is trained
    subject = run_subject(run, settled(run_config(run, overrides)), step)
    config = subject.config

    async def main() -> Analysis:
        toolbox = Toolbox(config.tools)
        try:
            source = make_source(
                config.task, config.run.seed, toolbox.run_function, subject.secret,
                apart=toolbox.apart,
            )  # fmt: skip
            toolbox.offer(source.tools)
            loaded = subject.load([])
            async with sampler(config, toolbox, source, loaded) as collector:
                tasks = held_out_tasks(source, config.eval)

                async def collect(make: Callable[[], Planner]) -> list[Tree]:
                    return await collector.collect(tasks, make, seed=config.run.seed)

                return await SAMPLED[kind](collect, config.algo, samples)
        finally:
            await toolbox.close()

    return asyncio.run(main())


async def ranking(collect: Collect, algo: AlgoConfig, samples: int) -> Analysis:
    """How well advantages order the children of branching prefixes, planner by planner."""
    rows: list[dict[str, Any]] = []
    for planner in ("bel", "bel_bayes", "random", "entropy"):
        config = _with(algo, planner)
        trees = await collect(partial(_judged, config, samples))
        rows.append({"planner": planner, **_ranked(trees, config)})
    figure = new_figure(6, 4)
    panel = figure.subplots()
    for at, row in enumerate(rows):
        panel.plot([at, at], [row["low"], row["high"]], "C0")
        panel.plot(at, row["accuracy"], "C0o")
    panel.axhline(0.5, color="grey", linewidth=0.8)
    panel.set_xticks(range(len(rows)), [row["planner"] for row in rows])
    panel.set(ylabel="pairwise accuracy, 95 % interval", ylim=(0, 1))
    return Analysis(
        f"Ranking at branching prefixes against Mean@{samples}",
        rows,
        figure,
        f"At every prefix with several children, their advantages ({algo.advantage}) against the "
        f"success of {samples} fresh trajectories from each child: share of pairs in the right "
        "order (a tie counts half; interval by bootstrap over tasks) and mean Kendall's tau-b of "
        f"prefixes. Each planner has {algo.n_total} rollouts a task; `pairs` differ in Mean@"
        f"{samples}.",
    )


def _with(algo: AlgoConfig, planner: str) -> AlgoConfig:
    """The same budget and advantage with another planner, whose start fits into the budget."""
    return algo.model_copy(
        update={
            "planner": planner,
            "random": algo.random.model_copy(
                update={"trees": min(algo.random.trees, algo.n_total)}
            ),
            "entropy": algo.entropy.model_copy(
                update={"initial": min(algo.entropy.initial, algo.n_total // 2 or 1)}
            ),
        }
    )


def _judged(algo: AlgoConfig, samples: int) -> Planner:
    planner = make_planner(algo)
    return FlowPlanner(planner, ranking_flow(planner, samples))


def _ranked(trees: Sequence[Tree], algo: AlgoConfig) -> dict[str, Any]:
    """Figures over the branching prefixes of the planner's trees, their first trajectories."""
    right, pairs, taus = [], [], []
    for tree in trees:
        first = first_trajectories(tree, algo.n_total)
        advantage = score(Forest.from_trees([first]), algo).advantage
        fresh = _fresh(tree, len(first), algo.n_total)
        mine: list[float] = []
        count = 0
        trajectories = [trajectory_of(first, leaf) for leaf in range(algo.n_total)]
        for children in branches(trajectories):
            # What ended there is known: nothing more can come of it.
            truth = [float(np.mean(fresh.get(c, [first.correct[c] == 1]))) for c in children]
            scores = [advantage[child] for child in children]
            differ = sum(one != other for one, other in combinations(truth, 2))
            if differ:
                mine.append(differ * pairwise_accuracy(scores, truth))
                count += differ
                if not np.isnan(tau := kendall_tau(scores, truth)):
                    taus.append(tau)
        right.append(sum(mine))
        pairs.append(count)
    low, high = _bootstrap(np.array(right), np.array(pairs))
    total = sum(pairs)
    return {
        "trees": len(trees),
        "pairs": total,
        "accuracy": sum(right) / total if total else float("nan"),
        "low": low,
        "high": high,
        "tau": float(np.mean(taus)) if taus else float("nan"),
    }


def _bootstrap(right: np.ndarray, pairs: np.ndarray) -> tuple[float, float]:
    """95 % interval of `sum(right) / sum(pairs)` over resampled tasks; NaN without pairs."""
    drawn = np.random.default_rng(0).integers(len(pairs), size=(2000, len(pairs)))
    totals = pairs[drawn].sum(1)
    shares = right[drawn].sum(1)[totals > 0] / totals[totals > 0]
    if not len(shares):
        return float("nan"), float("nan")
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


def first_trajectories(tree: Tree, count: int) -> Tree:
    """The tree as it was after so many trajectories, with its searches."""
    kept = Tree(tree.token_ids[0], task_id=tree.task_id, info=tree.info)
    for node in range(1, max(tree.leaves[:count]) + 1):
        kept.add_step(
            tree.parent[node],
            tree.token_ids[node],
            tree.agent[node],
            tree.logprob[node],
            tree.entropy[node],
            tool_call=tree.tool_call[node],
            weight_version=tree.weight_version[node],
        )
    for ordinal in range(count):
        node = tree.leaves[ordinal]
        kept.finish(
            node,
            reward=tree.reward[node],
            correct=tree.correct[node] == 1,
            end=tree.ends[ordinal],
            reason=tree.reasons[ordinal],
        )
    marks = zip(tree.critical_node, tree.critical_leaf, tree.critical_localized, strict=True)
    for node, leaf, localized in marks:
        kept.mark_critical(node, leaf, localized)
    return kept


def _fresh(tree: Tree, nodes: int, count: int) -> dict[int, list[bool]]:
    """What the trajectories after the first `count` came to, by which of the first `nodes` nodes
    they were sampled from."""
    found: dict[int, list[bool]] = defaultdict(list)
    for leaf in tree.leaves[count:]:
        node = leaf
        while node >= nodes:
            node = tree.parent[node]
        found[node].append(tree.correct[leaf] == 1)
    return found


async def recovery(collect: Collect, algo: AlgoConfig, samples: int) -> Analysis:
    """Whether failures recover if one of their steps is replaced, step by step."""
    came: dict[str, list[bool]] = {kind: [] for kind in REPLACED}

    def make() -> Planner:
        planner = make_planner(algo.model_copy(update={"planner": "bel"}))
        flow = recovery_flow(planner, samples, lambda kind, yes: came[kind].append(yes))
        return FlowPlanner(planner, flow)

    await collect(make)
    rows: list[dict[str, Any]] = []
    for kind, outcomes in came.items():
        low, high = wilson_interval(sum(outcomes), len(outcomes))
        share = float(np.mean(outcomes)) if outcomes else float("nan")
        rows.append(
            {"replaced": kind, "searches": len(outcomes), "recovered": share}
            | {"low": low, "high": high}
        )
    figure = new_figure(6, 4)
    panel = figure.subplots()
    for at, row in enumerate(rows):
        panel.bar(at, row["recovered"], color="C0")
        panel.plot([at, at], [row["low"], row["high"]], "k")
    panel.set_xticks(range(len(rows)), [row["replaced"] for row in rows])
    panel.set(ylabel=f"recovered, Pass@{samples}", ylim=(0, 1))
    return Analysis(
        "Recovery after replacing a step",
        rows,
        figure,
        f"Of failed trajectories whose search ended: a step is sampled again, {samples} times, and "
        "the trajectory goes on from there; recovered if any of them succeeds. Intervals: Wilson, "
        "95 %.",
    )


async def agreement(collect: Collect, algo: AlgoConfig, samples: int) -> Analysis:
    """How often searches of the same failure find the same step."""
    found: dict[int, list[list[int]]] = defaultdict(list)

    def make() -> Planner:
        planner = make_planner(algo.model_copy(update={"planner": "bel"}))
        assert isinstance(planner, BelPlanner)
        flow = agreement_flow(planner, samples, lambda calls, steps: found[calls].append(steps))
        return FlowPlanner(planner, flow)

    await collect(make)
    if not found:
        raise LookupError("no search ended within its budget; raise algo.n_total or eval.tasks")
    rows: list[dict[str, Any]] = []
    for calls in sorted(found):
        pairs = [pair for steps in found[calls] for pair in combinations(steps, 2)]
        rows.append(
            {
                "calls": calls,
                "trajectories": len(found[calls]),
                "agreement": float(np.mean([one == other for one, other in pairs])),
                "calls apart": float(np.mean([abs(one - other) for one, other in pairs])),
            }
        )
    figure = new_figure(6, 4)
    panel = figure.subplots()
    panel.plot([row["calls"] for row in rows], [row["agreement"] for row in rows], ".-")
    panel.set(xlabel="tool calls of the trajectory", ylabel="agreement", ylim=(0, 1.02))
    panel.grid(alpha=0.3)
    return Analysis(
        "Agreement of repeated searches",
        rows,
        figure,
        f"Share of pairs of {samples + 1} searches of the same failed trajectory that find the "
        "same step, and by how many calls they differ.",
    )


SAMPLED: dict[str, Callable[[Collect, AlgoConfig, int], Awaitable[Analysis]]] = {
    "ranking": ranking,
    "recovery": recovery,
    "repeat": agreement,
}
