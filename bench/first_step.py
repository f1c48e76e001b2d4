"""How far the first step of reinforcement learning moves a policy: python -m bench.first_step RUN

RUN is the folder of `elpo sft`. Trees of the first step's tasks are sampled by binary search and as
stars, several times, and each algorithm makes one step of updates on them in several orders, always
from the weights of RUN. What is compared is the KL, k3 in nats a token, from the policy before to
the one after on tokens of other tasks, the same for all. A step's own `approx_kl` and `ratio_max`
are those of its mini-batches, which few tokens decide.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elpo_fast.algo import make_planner, score
from elpo_fast.config import AlgoConfig, Config, load_config
from elpo_fast.model.lora import named_weights
from elpo_fast.train.checkpoint import latest, load_checkpoint
from elpo_fast.train.parts import Parts, assembled, settled
from elpo_fast.train.step import warmup_constant
from elpo_fast.tree.pack import active, micro_batches
from elpo_fast.tree.store import Forest

GROUP: dict[str, Any] = {"advantage": "group", "clip": {"eps_elc": 0.0}}
VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {  # planner, algo, warm-up
    "GRPO": ("star", GROUP, 0),
    "ELPO": ("bel", {}, 0),
    "ELPO's trees, GRPO's advantage": ("bel", GROUP, 0),
    "ELPO, advantage_eps 0.3": ("bel", {"advantage_eps": 0.3}, 0),
    "ELPO, child_value": ("bel", {**GROUP, "advantage": "child_value"}, 0),
    "GRPO, dual clip 3": ("star", {**GROUP, "clip": {"eps_elc": 0.0, "dual": 3.0}}, 0),
    "ELPO, dual clip 3": ("bel", {"clip": {"dual": 3.0}}, 0),
    "GRPO, warm-up 8": ("star", GROUP, 8),
    "ELPO, warm-up 8": ("bel", {}, 8),
}


async def collected(parts: Parts, algo: AlgoConfig, first: int, tasks: int, seed: int) -> Forest:
    chosen = [parts.source.train(first + index) for index in range(tasks)]
    trees = await parts.collector.collect(chosen, lambda: make_planner(algo), seed=seed)
    return Forest.from_trees(trees)


async def main(run: Path, config: Config, samples: int, orders: int, names: list[str]) -> None:
    train, tokens = config.train, config.train.micro_batch_tokens

    def algo(**changed: Any) -> AlgoConfig:
        data = config.algo.model_dump()
        clip = {**data["clip"], **changed.pop("clip", {})}
        return AlgoConfig.model_validate({**data, **changed, "clip": clip})

    async with assembled(config) as parts:
        policy, checkpoint = parts.policy, latest(run)
        assert checkpoint is not None
        load_checkpoint(checkpoint, policy, parts.ranks)
        before = [parameter.detach().clone() for _, parameter in policy.trained()]
        await parts.engine.update_weights(named_weights(parts.loaded.model), 1)
        first = config.sft.demonstrations
        other = algo(planner="star", n_total=4)
        probe = await collected(parts, other, first + 5000, train.tasks_per_step, 99)
        probes = micro_batches(probe, score(probe, other), range(len(probe)), tokens)
        forests = {
            (planner, n): await collected(
                parts, algo(planner=planner), first, train.tasks_per_step, n
            )
            for n in range(samples)
            for planner in ("bel", "star")
        }

        def moved() -> float:
            pairs = zip(probes, policy.logprobs(probes), strict=True)
            gap = np.concatenate([(now - b.old_logprob)[b.agent == 1] for b, now in pairs])
            return float((np.expm1(gap) - gap).mean())

        def step(forest: Forest, chosen: AlgoConfig, warmup: int, order: int) -> dict[str, float]:
            with torch.no_grad():
                for (_, parameter), value in zip(policy.trained(), before, strict=True):
                    parameter.copy_(value)
            policy.refresh()
            policy.restart(lr=train.lr, schedule=warmup_constant(warmup))
            policy.ratio_cap = chosen.clip.dual or math.inf
            scored = score(forest, chosen)
            useful, made = active(forest, scored), []
            shuffled = np.random.default_rng(order).permutation(len(forest))
            for share in np.array_split(shuffled, train.updates_per_step):
                trees, scale = share[useful[share]], 1 / len(share)
                made.append(
                    policy.update(micro_batches(forest, scored, trees, tokens, scale=scale))
                )
            return {
                "KL": moved(),
                "approx_kl": float(np.mean([update.approx_kl for update in made])),
                "ratio_max": max(update.ratio_max for update in made),
                "grad_norm max": max(update.grad_norm for update in made),
            }

        for name in names:
            planner, changed, warmup = VARIANTS[name]
            steps = [
                step(forests[planner, n], algo(planner=planner, **changed), warmup, order)
                for n in range(samples)
                for order in range(orders)
            ]
            for figure in steps[0]:
                each = [values[figure] for values in steps]
                said = " ".join(f"{value:.4g}" for value in each)
                print(f"{name:32s} {figure:14s} mean {np.mean(each):.4f}  each {said}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=3, help="times that the tasks are sampled")
    parser.add_argument("--orders", type=int, default=2, help="of the updates, for each of them")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    given = parser.parse_args()
    found = settled(load_config(given.run / "config.yaml"))
    asyncio.run(main(given.run, found, given.samples, given.orders, given.only))
