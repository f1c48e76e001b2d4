"""Decoding speed of the local engine: SmolLM2-135M, 64 branches of 16 prompts, 128 new tokens each.

`make bench` times the engine and, under it, the matrix products of its steps alone. Side by side
with `transformers.generate` on the same batch, interleaved, correctness first:

    OMP_WAIT_POLICY=passive python bench/bench_engine.py --rounds 3

The floor of a step is the larger of weight bytes (bfloat16) over memory bandwidth and FLOPs over
GEMM rate, both measured in the same round; the rate is the best of bfloat16 and fp32, with plain
and with prepacked weights and with the engine's own product. Tokens per CPU-second, all threads
together, say the same on a machine that others use too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Coroutine
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from elpo_fast.config import ModelConfig
from elpo_fast.cpu.decoder import as_numpy, packed, packed_product
from elpo_fast.cpu.decoder_products import multiplies
from elpo_fast.cpu.decoder_step import COUNTER, multiply
from elpo_fast.cpu.vectors import TILE_ROWS
from elpo_fast.model.load import load_model
from elpo_fast.rollout.local.decoder import products_dtype
from elpo_fast.rollout.local.engine import LocalEngine
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


def products(engine: LocalEngine) -> Callable[[], object]:
    """The matrix products of one step with `ROWS` rows, on the engine's own weights."""
    decoder = engine._decoder
    config = exact_model().config
    widths = config.hidden_size, decoder.heads * decoder.width, config.intermediate_size
    inputs = [torch.randn(ROWS, width).to(decoder.products) for width in widths]
    if decoder._fused is None:
        hidden, mixed, inner = inputs

        def run() -> None:
            for layer in decoder.layers:
                for linear, x in zip(layer.linears, (hidden, mixed, hidden, inner), strict=True):
                    linear(x)
            decoder.head(hidden)

        return run
    weights = decoder._fused._weights
    threads = numba.get_num_threads()
    outputs = [np.zeros((ROWS, len(bias)), "f4") for bias in weights.qkv_bias[:1]]
    outputs += [np.zeros((ROWS, n), "f4") for n in (widths[0], widths[2], decoder.vocab_size)]
    size = (4 * len(weights.qkv) + 1) * COUNTER
    spare = TILE_ROWS  # rows that a product may read
    hidden, mixed, inner = (as_numpy(F.pad(x, (0, 0, 0, spare))) for x in inputs)
    return lambda: _fused_products(
        threads, np.zeros(size, np.int64), weights, hidden, mixed, inner, *outputs
    )


def own_product(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], None]:
    """`x @ weight.T` as a fused step multiplies."""
    threads, rows = numba.get_num_threads(), len(x)
    arrays = as_numpy(F.pad(x, (0, 0, 0, TILE_ROWS))), packed(weight)
    bias, out = np.zeros(len(weight), "f4"), np.zeros((rows, len(weight)), "f4")
    return lambda: _one_product(threads, np.zeros(COUNTER, np.int64), *arrays, bias, out, rows)


@numba.njit(parallel=True, nogil=True, fastmath=True, error_model="numpy")
def _one_product(threads, counters, x, weight, bias, out, rows):
    for _ in numba.prange(threads):
        multiply(counters, 0, 8 * threads, x, rows, weight, bias, out, 0)


@numba.njit(parallel=True, nogil=True, fastmath=True, error_model="numpy")
def _fused_products(threads, counters, w, hidden, mixed, inner, qkv, residual, gated, logits):
    """The products of `decoder_step.forward`, and nothing between them."""
    share = 8 * threads
    for _ in numba.prange(threads):
        n = 0
        for i in range(len(w.qkv)):
            multiply(counters, n, share, hidden, ROWS, w.qkv[i], w.qkv_bias[i], qkv, 0)
            multiply(counters, n + 1, share, mixed, ROWS, w.out[i], w.out_bias[i], residual, 1)
            bias = w.gate_up_bias[i]
            multiply(counters, n + 2, share, hidden, ROWS, w.gate_up[i], bias, gated, 2)
            multiply(counters, n + 3, share, inner, ROWS, w.down[i], w.down_bias[i], residual, 1)
            n += 4
        multiply(counters, n, share, hidden, ROWS, w.head, w.head_bias, logits, 0)


def best_of(run: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@torch.inference_mode()
def gemm_rates() -> dict[str, float]:
    """GFLOP/s of `ROWS` rows by a square matrix."""
    rates = {}
    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        x, weight = torch.randn(ROWS, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        ways = {
            "plain": partial(F.linear, x, weight),
            "prepacked": partial(packed_product(weight, None), x),
        }
        if multiplies(dtype):
            ways["own"] = own_product(x, weight)
        for way, run in ways.items():
            rates[f"{name}_{way}"] = 2e-9 * ROWS * 2048**2 / best_of(run, 50)
    return rates


def floor() -> dict[str, float]:
    """Seconds of one step from measured bandwidth and GEMM rate, and how they came about."""
    parameters = sum(p.numel() for n, p in exact_model().named_parameters() if p.ndim == 2)
    flops, weight_bytes = 2 * parameters * ROWS, 2 * parameters
    block = torch.zeros(64 << 20, dtype=torch.float32)
    bandwidth = block.nbytes / best_of(block.sum, 5)
    rates = gemm_rates()
    rate = 1e9 * max(rates.values())
    return {
        "step": max(weight_bytes / bandwidth, flops / rate),
        "gigaflops": flops / 1e9,
        "weight_megabytes": weight_bytes / 1e6,
        "gigaflops_per_second": rate / 1e9,
        "gigabytes_per_second": bandwidth / 1e9,
        **rates,
    }


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


def test_matrix_products_of_a_step(benchmark) -> None:
    engine = LocalEngine(exact_model(), None, dtype=torch.bfloat16)
    with torch.inference_mode():
        benchmark(products(engine))
    asyncio.run(engine.close())


def cpu_name() -> str:
    with contextlib.suppress(OSError):  # Linux alone has it
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-transformers", action="store_true", help="skip the slow half")
    options = parser.parse_args()
    rounds: list[dict[str, float]] = []

    async def work(engine: LocalEngine) -> None:
        step = products(engine)
        if not options.no_transformers:
            print(json.dumps({"logprob_error": check(await decode(engine))}))
        for _ in range(options.rounds):
            one = {"load": os.getloadavg()[0]}
            one |= (await decode_fresh(engine)).rates("engine")
            measured = floor()
            one["floor_per_s"] = ROWS / measured["step"]
            with torch.inference_mode():
                one["products_per_s"] = ROWS / best_of(step, 20)
            if not options.no_transformers:
                one |= generate().rates("transformers")
            print(json.dumps({k: round(v, 4) for k, v in (one | measured).items()}), flush=True)
            rounds.append(one)

    with_engine(work)
    print("tokens of the batch, median (lowest-highest) of the rounds:")
    for name in rounds[0]:
        values = sorted(one[name] for one in rounds)
        print(f"{name}: {statistics.median(values):.1f} ({values[0]:.1f}-{values[-1]:.1f})")
    print(
        json.dumps(
            {
                "cpu": cpu_name(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "products": str(products_dtype(torch.device("cpu"), torch.bfloat16)),
                "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numba": numba.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
