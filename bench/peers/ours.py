"""Our side: GRPO on stars, or ELPO on trees of as many trajectories.

    python -m bench.peers.ours JOB grpo|elpo

Completions of a tree are `TURNS` steps of equal length, which count as tool calls that answer
nothing. Whether a trajectory is right is drawn, the less likely the later it branched off: the
tokens of such a model decide nothing. Products and attention are kept for the backward pass and the
rest computed again (`gradient_checkpointing: selective`), while TRL keeps everything; and as in a
run the engine gives its memory to the update.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch

from bench.peers.job import Job, reward, say, settled
from elpo_fast.algo import make_planner, score
from elpo_fast.algo.planners import Request, trajectory_of
from elpo_fast.config import AlgoConfig, ClipConfig, ModelConfig
from elpo_fast.model.load import load_model, resolve_compile
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.train.update import release_memory
from elpo_fast.tree.pack import PackedBatch, micro_batches
from elpo_fast.tree.store import Forest, Tree
from elpo_fast.types import Completion, Sampling

TURNS = 8


class Side:
    """A policy, its engine and one algorithm."""

    def __init__(self, job: Job, name: str) -> None:
        self.job, self.rng = job, np.random.default_rng(0)
        clip = ClipConfig(eps_low=job.clip, eps_high=job.clip, eps_elc=0)
        if name == "grpo":
            choices: dict[str, Any] = {"planner": "star", "advantage": "group_unnormalised"}
        else:
            choices = {"planner": "bel", "advantage": "hierarchical"}
        self.algo = AlgoConfig(**choices, clip=clip, n_total=job.rollouts)
        self.turns = 1 if name == "grpo" else TURNS
        config = ModelConfig(name=job.model, dtype=job.dtype, device=job.device)
        loaded = load_model(config, seed=0)
        self.prompts = [np.array(loaded.tokenizer.encode(text), np.int32) for text in job.texts]
        assert all(len(prompt) == job.prompt for prompt in self.prompts)
        self.policy = PolicyOptimizer(
            loaded.model,
            lr=job.learning_rate,
            betas=job.betas,
            weight_decay=job.weight_decay,
            grad_clip=job.grad_clip,
            dtype=getattr(torch, job.dtype),
            gradient_checkpointing="selective",
            compiled=resolve_compile(config),
        )
        rows = len(job.texts) * job.rollouts
        self.engine = LocalEngine(
            self.policy.compute,
            loaded.tokenizer,
            max_batch=rows,
            cache_tokens=rows * (job.prompt + job.tokens),
        )

    async def warm_up(self) -> float:
        """Norm of the gradient of TRL's own completions, of which a short update is made."""
        probe = json.loads(Path(self.job.probe).read_text(encoding="utf-8"))
        trees: dict[tuple[int, ...], Tree] = {}
        for prompt, ids in zip(probe["prompt"], probe["completion"], strict=True):
            tree = trees.setdefault(tuple(prompt), Tree(prompt))
            zeros = np.zeros(len(ids))
            node = tree.add_step(0, ids, zeros + 1, zeros, zeros, tool_call=False)
            tree.finish(node, reward=reward(ids), correct=False, end="answer")
        algo = self.algo.model_copy(update={"advantage": "group_unnormalised"})
        batches = self._batches([*trees.values()], algo)
        present = self.policy.logprobs(batches)  # ratios are 1, as TRL takes them to be
        batches = [
            replace(b, old_logprob=p.astype(b.old_logprob.dtype))
            for b, p in zip(batches, present, strict=True)
        ]
        norm = self.policy.update(batches).grad_norm
        release_memory()
        await self._sample(self.prompts[0], self.job.rollouts, self.job.probe_tokens)
        return norm

    async def step(self) -> dict[str, float]:
        """Collect, update, give the engine the new weights."""
        device = self.job.device
        before = self.engine.stats().generated_tokens
        began, cpu = settled(device, perf_counter), process_time()
        trees = await asyncio.gather(*map(self._grow, self.prompts))
        collected = settled(device, perf_counter)
        await self.engine.release()
        stats = self.policy.update(self._batches(trees, self.algo))
        release_memory()
        weights = self.policy.compute.named_parameters()
        await self.engine.update_weights(weights, self.engine.weight_version + 1)
        ended = settled(device, perf_counter)
        whole = sum(tree.path_length(leaf) for tree in trees for leaf in tree.leaves)
        return {
            "seconds": ended - began,
            "cpu": process_time() - cpu,
            "rollout": collected - began,
            "sampled": self.engine.stats().generated_tokens - before,
            "computed": stats.tokens,
            "sharing": whole / stats.tokens,
        }

    def _batches(self, trees: Sequence[Tree], algo: AlgoConfig) -> list[PackedBatch]:
        """As many tokens in one as TRL has."""
        forest, job = Forest.from_trees(trees), self.job
        budget = job.rollouts * (job.prompt + job.tokens)
        every = range(len(trees))
        return micro_batches(forest, score(forest, algo), every, budget, scale=1 / len(trees))

    async def _grow(self, prompt: np.ndarray) -> Tree:
        tree, planner = Tree(prompt), make_planner(self.algo)
        while not planner.done:
            asked = (self._extend(tree, request) for request in planner.requests())
            for leaves in await asyncio.gather(*asked):
                for leaf in leaves:
                    planner.observe(trajectory_of(tree, leaf))
        for critical in planner.critical:
            tree.mark_critical(critical.node, critical.leaf, critical.localized)
        return tree

    async def _extend(self, tree: Tree, request: Request) -> list[int]:
        """Trajectories below a node; their ordinals."""
        tokens = self.job.tokens // self.turns
        depth = tree.depth[request.node]
        first = await self._sample(tree.path_tokens(request.node), request.count, tokens)

        async def finish(completion: Completion) -> int:
            node = request.node
            while True:
                size = len(completion.token_ids)
                last = tree.depth[node] + 1 == self.turns
                arrays = (completion.token_ids, np.ones(size), completion.logprobs)
                node = tree.add_step(node, *arrays, completion.entropies, tool_call=not last)
                if last:
                    break
                (completion,) = await self._sample(tree.path_tokens(node), 1, tokens)
            value = reward(tree.path_tokens(node)[self.job.prompt :].tolist())
            correct = bool(self.rng.random() < 0.5 * (1 - depth / self.turns))
            if self.turns > 1:
                value = float(correct)
            return tree.finish(node, reward=value, correct=correct, end="answer")

        return await asyncio.gather(*map(finish, first))

    async def _sample(self, prefix: np.ndarray, n: int, tokens: int) -> list[Completion]:
        return await self.engine.generate(prefix, n, Sampling(max_tokens=tokens))


async def main() -> None:
    job, name = Job.read(sys.argv[1]), sys.argv[2]
    side = Side(job, name)
    norm = await side.warm_up()
    steps = [await side.step() for _ in range(job.steps)]
    await side.engine.close()
    versions = {package: version(package) for package in ("torch", "transformers", "numba")}
    say(job.device, steps, grad_norm=norm, versions=versions)


if __name__ == "__main__":
    asyncio.run(main())
