"""A BEL collection by the product's own parts, half of its cold start behind it so that calls and
failures are real: how much of its prompts the server has to compute."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path

from bench.gpu.part import Part
from bench.gpu_sglang.served import sglang
from elpo_fast.algo import make_planner
from elpo_fast.config import Config, load_config
from elpo_fast.train.parts import assembled
from elpo_fast.train.sft import cold_start

CONFIG = Path(__file__).parents[2] / "configs" / "sglang.yaml"
# Heads as wide as SGLang's own operators know them.
WIDE = ["hidden_size=512", "layers=6", "heads=8", "kv_heads=4", "intermediate_size=1024"]


def run(part: Part) -> None:
    part.attempt("collection", lambda: asyncio.run(collect(part)))


async def collect(part: Part) -> None:
    tasks = 4 if part.tiny else 64
    with tempfile.TemporaryDirectory() as folder:
        options = [f"run.dir={folder}", f"rollout.sglang={json.dumps(sglang(part))}"]
        if part.tiny:
            options += ["model.device=cpu", "sft.demonstrations=32", "sft.epochs=1"]
        else:
            options += ["model.dtype=bfloat16", "sft.demonstrations=512"]
            options += [f"model.scratch.{option}" for option in WIDE]
        config = load_config(CONFIG, options)
        try:
            await collect_with(part, config, tasks)
        finally:
            for log in Path(folder).glob("sglang*.log"):
                part.out.with_suffix(".server.log").write_bytes(log.read_bytes())


async def collect_with(part: Part, config: Config, tasks: int) -> None:
    async with assembled(config) as parts:
        began = time.perf_counter()
        await cold_start(config, parts.collector, parts.policy, seed=0)
        part.row(f"cold start in {time.perf_counter() - began:.1f} s")
        for number in range(2):  # the first one compiles for the batches it meets
            weights = parts.loaded.model.named_parameters()
            await parts.engine.update_weights(weights, parts.engine.weight_version + 1)
            before, began = parts.engine.stats(), time.perf_counter()
            trees = await parts.collector.collect(
                [parts.source.train(1000 + index) for index in range(tasks)],
                lambda: make_planner(config.algo),
                seed=number,
            )
            seconds = time.perf_counter() - began
            after = parts.engine.stats()
            asked = after.prompt_tokens - before.prompt_tokens
            share = (after.cached_tokens - before.cached_tokens) / asked
            new = after.generated_tokens - before.generated_tokens
            leaves = sum(len(tree.leaves) for tree in trees)
            line = (
                f"{leaves} trajectories of {tasks} tasks in {seconds:.1f} s: "
                f"{share:.3f} of {asked} prompt tokens from cache, {new / seconds:.0f} tokens/s"
            )
            part.row(line, cached_share=share, prompt_tokens=asked, tokens_per_s=new / seconds)
            if leaves != tasks * config.algo.n_total:
                part.fault(f"{leaves} trajectories instead of {tasks * config.algo.n_total}")
            if share == 0:
                part.fault("no prompt token came from the cache")
