"""Decoding speed of the local engine: SmolLM2-135M, 64 branches of 16 prompts, 128 new tokens each.

`make bench` times the engine. Side by side with `transformers.generate` on the same batch,
interleaved, correctness first:

    OMP_WAIT_POLICY=passive python bench/bench_engine.py --rounds 3

Tokens per CPU-second, all threads together, say the same on a machine that others use too. How far
a step is from what the machine allows, `elpo profile` says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from elpo_fast.config import ModelConfig
from elpo_fast.model.load import load_model
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.train.profile import machine
from elpo_fast.types import Completion, Sampling

PROMPTS, BRANCHES, PROMPT_TOKENS, NEW_TOKENS = 16, 4, 80, 128
ROWS = PROMPTS * BRANCHES
TEXT = (
    "Keep a ledger. Start with 40 coins, give a third of them away and find 12 more on the road. "
)


@cache
def exact_model() -> PreTrainedModel:
    loaded = load_model(ModelConfig(name="smollm2-135m", device="cpu"), seed=0)
    texts = [f"Day {day}. {TEXT * 8}" for day in range(PROMPTS)]
    ids = [loaded.tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]
    loaded.model.prompts = np.array(ids)
    return loaded.model


@cache
def rounded_model() -> PreTrainedModel:
    """transformers' own bfloat16 model with its default attention."""
    exact = exact_model()
    model = AutoModelForCausalLM.from_config(exact.config, attn_implementation="sdpa")
    model.load_state_dict(exact.state_dict())
    return model.to(torch.bfloat16).eval()


async def decode(engine: LocalEngine) -> list[list[Completion]]:
    sampling = Sampling(max_tokens=NEW_TOKENS)
    asked = [engine.generate(p, BRANCHES, sampling) for p in exact_model().prompts]
    return await asyncio.gather(*asked)


class Clock:
    """Tokens of the whole batch per second and per CPU-second of a `with` block."""

    def __enter__(self) -> Clock:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu

    def rates(self, name: str) -> dict[str, float]:
        tokens = ROWS * NEW_TOKENS
        return {f"{name}_per_s": tokens / self.wall, f"{name}_per_cpu_s": tokens / self.cpu}


async def decode_fresh(engine: LocalEngine) -> Clock:
    """The whole batch, prompts included, with an empty cache."""
    await engine.update_weights(exact_model().named_parameters(), engine.weight_version + 1)
    with Clock() as clock:
        await decode(engine)
    return clock


def generate() -> Clock:
    """`transformers.generate` for the same batch."""
    prompts = torch.from_numpy(exact_model().prompts.repeat(BRANCHES, 0))
    with Clock() as clock:
        out = rounded_model().generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
    assert out.shape == (ROWS, PROMPT_TOKENS + NEW_TOKENS)
    return clock


def check(completions: list[list[Completion]]) -> dict[str, float]:
    """Mean distance of log-probs from an fp32 forward: the engine's, and transformers' bfloat16."""
    errors: dict[str, list[float]] = {"engine": [], "transformers": []}
    for prompt, (completion, *_) in zip(exact_model().prompts, completions, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids]))[None]
        with torch.inference_mode():
            exact, rounded = (
                model(ids).logits[0, PROMPT_TOKENS - 1 : -1].float().log_softmax(-1)
                for model in (exact_model(), rounded_model())
            )
        chosen = ids[0, PROMPT_TOKENS:, None]
        expected = exact.gather(-1, chosen)[:, 0]
        engine = torch.from_numpy(completion.logprobs)
        errors["engine"].append(float((engine - expected).abs().mean()))
        other = rounded.gather(-1, chosen)[:, 0]
        errors["transformers"].append(float((other - expected).abs().mean()))
    means = {name: statistics.mean(values) for name, values in errors.items()}
    assert means["engine"] <= 1.05 * means["transformers"], means
    return means


def with_engine(work: Callable[[LocalEngine], Coroutine[Any, Any, Any]]) -> Any:
    async def whole() -> Any:
        engine = LocalEngine(exact_model(), None, dtype=torch.bfloat16)
        try:
            await decode(engine)  # compiles the kernels
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(whole())


def test_decode(benchmark) -> None:
    async def work(engine: LocalEngine) -> None:
        loop = asyncio.get_running_loop()

        def once() -> None:
            asyncio.run_coroutine_threadsafe(decode_fresh(engine), loop).result()

        await asyncio.to_thread(benchmark.pedantic, once, rounds=3)

    with_engine(work)
    benchmark.extra_info["tokens"] = ROWS * NEW_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-transformers", action="store_true", help="skip the slow half")
    options = parser.parse_args()
    rounds: list[dict[str, float]] = []

    async def work(engine: LocalEngine) -> None:
        if not options.no_transformers:
            print(json.dumps({"logprob_error": check(await decode(engine))}))
        for _ in range(options.rounds):
            one = {"load": os.getloadavg()[0]}
            one |= (await decode_fresh(engine)).rates("engine")
            if not options.no_transformers:
                one |= generate().rates("transformers")
            print(json.dumps({k: round(v, 4) for k, v in one.items()}), flush=True)
            rounds.append(one)

    with_engine(work)
    print("tokens of the batch, median (lowest-highest) of the rounds:")
    for name in rounds[0]:
        values = sorted(one[name] for one in rounds)
        print(f"{name}: {statistics.median(values):.1f} ({values[0]:.1f}-{values[-1]:.1f})")
    print(json.dumps(machine(torch.device("cpu")) | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
