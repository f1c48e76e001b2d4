"""SGLang on the models and prompts of `bench.gpu.engine`, at several `top_logprobs`."""

from __future__ import annotations

import asyncio
import statistics
import time

import numpy as np

from bench.gpu.engine import NEW_TOKENS, PROMPT_TOKENS, PROMPTS
from bench.gpu.part import Part
from bench.gpu.shapes import SIZES, make_model
from bench.gpu_sglang.served import serving
from elpo_fast.rollout.sglang.engine import SGLangEngine
from elpo_fast.types import Sampling

TOP = (0, 5, 16)
LEAST, MOST = 2, 5  # rounds


def run(part: Part) -> None:
    for name in SIZES:
        part.attempt(name, lambda name=name: asyncio.run(one_model(part, name)))


async def one_model(part: Part, name: str) -> None:
    model = make_model(part, name, part.dtype)
    length, new = (20, 4) if part.tiny else (PROMPT_TOKENS, NEW_TOKENS)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (PROMPTS, length)).astype(np.int32)

    async def work(engine: SGLangEngine, rows: int) -> float:
        """Seconds."""
        began = time.perf_counter()
        sampling = Sampling(max_tokens=new)
        await asyncio.gather(*(engine.generate(p, rows // PROMPTS, sampling) for p in prompts))
        return time.perf_counter() - began

    async with serving(part, model) as engine:
        began = time.perf_counter()
        await work(engine, PROMPTS)
        part.row(f"{name} started in {time.perf_counter() - began:.1f} s")
        for rows in (16,) if part.tiny else (64, 256):
            times: dict[int, list[float]] = {top: [] for top in TOP}
            for number in range(-1, 1 if part.tiny else MOST):
                if number >= LEAST and part.left < 60:
                    break
                for top in TOP:
                    engine._sglang = engine._sglang.model_copy(update={"top_logprobs": top})
                    seconds = await work(engine, rows)
                    if number >= 0:
                        times[top].append(seconds)
            rates = {top: rows * new / statistics.median(times[top]) for top in TOP}
            spread = {top: [rows * new / t for t in times[top]] for top in TOP}
            found = ", ".join(f"{rates[top]:.0f} at {top}" for top in TOP)
            line = f"{name} {rows} branches, tokens/s by top_logprobs: {found}"
            part.row(line, model=name, branches=rows, tokens_per_s=rates, rounds=spread)
