"""The local engine on random models of Qwen2.5's shapes: tokens a second beside the floor that
memory sets (weights and every row's keys and values, read once a step)."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import numpy as np
import torch

from bench.gpu.part import Part
from bench.gpu.shapes import HEADS, SIZES, make_model
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.types import Sampling

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 1000, 64


def run(part: Part) -> None:
    bandwidth = 1e9 if part.tiny else measured_bandwidth(part)
    for name in SIZES:
        for rows in (16,) if part.tiny else (64, 256):
            part.attempt(f"{name} {rows}", partial(decode, part, name, rows, bandwidth))


def measured_bandwidth(part: Part) -> float:
    """Bytes a second of a large read and write."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    for _ in range(3):
        milliseconds = part.clock(lambda: target.copy_(source))
    return 2e3 * source.nbytes / milliseconds


def decode(part: Part, name: str, rows: int, bandwidth: float) -> None:
    model = make_model(part, name, part.dtype)
    length, new = (20, 4) if part.tiny else (PROMPT_TOKENS, NEW_TOKENS)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (PROMPTS, length)).astype(np.int32)
    sampling = Sampling(max_tokens=new)

    async def work() -> tuple[float, float]:
        """Seconds with empty caches, and again when the prompts are known."""
        engine = LocalEngine(model, None, max_batch=rows, cache_tokens=(length + 16 * new) * 64)
        try:
            seconds = []
            for _ in range(2):
                began = time.perf_counter()
                asked = [engine.generate(p, rows // PROMPTS, sampling) for p in prompts]
                await asyncio.gather(*asked)
                seconds.append(time.perf_counter() - began)
        finally:
            await engine.close()
        return seconds[0], seconds[1]

    cold, warm = asyncio.run(work())
    _, kv_heads, dim = HEADS[name]
    cached = 4 * kv_heads * dim * model.config.num_hidden_layers * rows * (length + new / 2)
    weights = 2 * sum(p.numel() for p in model.parameters())
    floor = rows * bandwidth / (weights + cached)
    rate = rows * new / warm
    line = (
        f"{name} {rows} branches: {rate:.0f} tokens/s ({rows * new / cold:.0f} with prefill and "
        f"start), floor {floor:.0f}"
    )
    part.row(line, model=name, branches=rows, tokens_per_s=rate, floor=floor, cold_s=cold)
