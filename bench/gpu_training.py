"""Tree attention and tree-packed training on one GPU, every backend beside the others.

    python -m bench.gpu_training --out results.json

Needs torch, triton, transformers, numba and pydantic; in a checkout that is not installed,
PYTHONPATH=kernels/src. Ends within 8 minutes on a Hopper card, and is written after every part.

Correctness first: output and gradients of each attention in bfloat16 against float64, judged by
what dense SDPA makes of the same inputs, and trees against rows through a whole model. Then
attention alone at 8K to 32K packed tokens, and forward plus backward of random models of Qwen2.5's
shapes, trees under each attention beside rows without sharing (`varlen`). Variants are interleaved,
times medians. Goals on a Hopper card: `triton` no slower than FlexAttention, which is also compiled
for one number of tokens; training faster than rows by 0.85 of the ratio of their tokens or more.
`--tune` instead times other tiles of the Triton kernels, and goes on where its file ends; `--tiny`
runs the code on a CPU, under TRITON_INTERPRET=1 the Triton kernels too.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import triton
from elpo_kernels import _triton_attention
from elpo_kernels.testing import error, make_forest, true_attention
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.forests import Shape, as_rows, as_trees, grow
from elpo_fast.model.attention import BACKENDS, attention_name
from elpo_fast.model.flex_attention import flex_tree_attention
from elpo_fast.model.tree_mask import TreeMask
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.tree.pack import PackedBatch

GIB = 1 << 30
PEAK = {(8, 0): 312e12, (9, 0): 989e12, (10, 0): 2250e12}  # dense bfloat16 operations a second
HEADS = {"0.5b": (14, 2, 64), "1.5b": (12, 2, 128), "7b": (28, 4, 128)}
SIZES = {  # hidden, intermediate, layers, tied, recompute activations
    "0.5b": (896, 4864, 24, True, False),
    "1.5b": (1536, 8960, 28, True, False),
    "7b": (3584, 18944, 28, False, True),
}
VOCABULARY = 151_936
LEAST_ROUNDS = 3
MODEL_SECONDS = 45.0  # a model's timing, unless `LEAST_ROUNDS` take longer
QUEUE_CYCLES = 20_000_000  # about 10 ms: longer than the host takes to launch an attention
TREES = Shape(trajectories=16, from_root=3, steps=12, step_tokens=(100, 180), prompt=600)
TINY = Shape(trajectories=4, from_root=2, steps=2, step_tokens=(4, 8), prompt=9)


class Run:
    """Where and how large; `tiny` is for machines without a GPU. `results` are written to `out`
    after every part, and none begins when `seconds` are up."""

    def __init__(self, tiny: bool, out: Path, seconds: float) -> None:
        self.tiny = tiny
        self.device = "cpu" if tiny else "cuda"
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.backends = ["sdpa", "path"] if tiny else ["sdpa", "triton", "flex", "varlen"]
        if tiny and os.environ.get("TRITON_INTERPRET") == "1":
            self.backends.append("triton")
        self.tokens = [48] if tiny else [8192, 16384, 32768]
        self.rounds = 1 if tiny else 7
        self.shape = TINY if tiny else TREES
        self.out, self.began = out, time.perf_counter()
        self.deadline = self.began + seconds
        self.failures: list[str] = []
        self.results: dict[str, Any] = {
            "device": "cpu" if tiny else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        }

    def keep(self, section: str, rows: list[Any]) -> None:
        """Add rows to a section of the results, and write them all."""
        self.results.setdefault(section, []).extend(rows)
        seconds = time.perf_counter() - self.began
        self.results.update(seconds=seconds, failures=self.failures)
        part = self.out.with_name(self.out.name + ".part")
        part.write_text(json.dumps(self.results, indent=1))
        part.replace(self.out)

    def attempt(self, what: str, do: Callable[[], Any]) -> Any:
        """A fault of one variant is noted and the others go on: device time is short."""
        try:
            return do()
        except Exception as fault:
            self.failures.append(f"{what}: {type(fault).__name__}: {str(fault)[:300]}")
            print("FAILED", self.failures[-1], flush=True)
            return None

    def part(self, section: str, what: str, do: Callable[[], list[Any]]) -> None:
        """Attempt one part of a section, and keep its rows."""
        if time.perf_counter() > self.deadline:
            self.failures.append(f"{section} {what}: not begun, time was up; see --only, --seconds")
            rows = None
        else:
            rows = self.attempt(f"{section} {what}", do)
        self.keep(section, rows or [])

    def clock(self, do: Callable[[], Any], *, queued: bool = False) -> float:
        """Milliseconds. `queued`: without the host's time, which launches while the GPU waits."""
        if self.tiny:
            began = time.perf_counter()
            do()
            return 1e3 * (time.perf_counter() - began)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if queued:
            torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        do()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    def interleaved(
        self,
        what: str,
        variants: dict[str, Callable[[], Any]],
        *,
        warmup: int,
        seconds: float = math.inf,
        queued: bool = False,
    ) -> dict[str, list[float]]:
        """Milliseconds of each variant that runs, by round. No round begins when `seconds` are up
        and there are `LEAST_ROUNDS`, or the run's are and there is one."""
        live = dict(variants)
        times: dict[str, list[float]] = {name: [] for name in variants}
        until = time.perf_counter() + seconds
        for number in range(-warmup, self.rounds):
            now = time.perf_counter()
            if (number >= LEAST_ROUNDS and now > until) or (number >= 1 and now > self.deadline):
                break
            for name in list(live):
                do = partial(self.clock, live[name], queued=queued)
                took = self.attempt(f"{what} {name}", do)
                if took is None:
                    del live[name]
                elif number >= 0:
                    times[name].append(took)
        return {name: times[name] for name in live}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def operands(
    run: Run, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> list[Tensor]:
    """Query, key, value as `[heads, N, D]` views of token-major memory, and a gradient."""
    generator = torch.Generator(run.device).manual_seed(0)
    query, shared, dim = heads
    return [
        torch.randn(tokens, count, dim, generator=generator, device=run.device, dtype=dtype)
        .transpose(0, 1)
        .requires_grad_(number < 3)
        for number, count in enumerate((query, shared, shared, query))
    ]


def on(run: Run, trees: int, tokens: int, branching: float) -> TreeMask:
    plan = make_forest(trees, tokens, branching=branching)
    assert plan.position is not None
    return TreeMask(plan.end.to(run.device), plan.position.to(run.device))


def check(run: Run) -> None:
    """Errors of output and gradients of each attention."""
    cases = [(heads, None) for heads in [*HEADS.values(), (8, 8, 96)]]
    cases += [((8, 2, 128), 33), ((8, 2, 256), 100)]
    forests = [(3, 211, 0.03), (1, 700, 0.0), (40, 9, 0.2)]
    if run.tiny:
        cases, forests = [((3, 1, 16), None), ((2, 2, 16), 5)], [(2, 40, 0.05)]
    for (heads, window), forest in itertools.product(cases, forests):
        what = f"heads={heads} window={window} forest={forest[0]}x{forest[1]}"
        run.part("check", what, partial(check_case, run, what, heads, window, forest))


def check_case(
    run: Run,
    what: str,
    heads: tuple[int, int, int],
    window: int | None,
    forest: tuple[int, int, float],
) -> list[str]:
    """A line for each attention. Without `sdpa`'s errors there is nothing to judge others by."""
    lines, allowed = [], None
    trees, tokens, branching = forest
    mask = on(run, trees, tokens, branching)
    *inputs, above = operands(run, trees * tokens, heads, run.dtype)
    by_token = [x.transpose(0, 1) for x in (*inputs, above)]
    scale = heads[2] ** -0.5
    true = true_attention(*by_token, mask, window=window, scale=scale)

    def errors(backend: str) -> list[float]:
        out = BACKENDS[backend](*inputs, mask, scale, window)
        found = [out, *torch.autograd.grad(out, inputs, above)]
        return [error(f.detach().transpose(0, 1), t) for f, t in zip(found, true, strict=True)]

    for backend in run.backends:
        found = run.attempt(f"{backend} {what}", partial(errors, backend))
        if found is None:
            continue
        lines.append(f"{backend} {what}: " + " ".join(f"{e:.1e}" for e in found))
        print(lines[-1], flush=True)
        if backend == "sdpa":
            allowed = [1.5 * e + (1e-5 if run.tiny else 2**-9) for e in found]
        if allowed and not all(e <= a for e, a in zip(found, allowed, strict=True)):
            run.failures.append(f"too large: {lines[-1]}")
    return lines


def packed(run: Run, tokens: int) -> tuple[TreeMask, int]:
    """Trees of `TREES`' shape up to about `tokens` tokens, and their allowed pairs."""
    rng, trees = np.random.default_rng(0), []
    while sum(len(part) for tree in trees for part in tree.token_ids) < tokens:
        trees.append(grow(rng, run.shape, VOCABULARY))
    (batch,) = as_trees(trees, 10 * tokens)
    end = torch.from_numpy(np.minimum(batch.end, tokens)[:tokens]).to(run.device)
    position = torch.from_numpy(batch.position[:tokens]).to(run.device)
    return TreeMask(end, position), int(batch.position[:tokens].astype(np.int64).sum()) + tokens


def attention_alone(run: Run) -> None:
    shapes = [(2, 1, 16)] if run.tiny else [HEADS["0.5b"], HEADS["7b"]]
    for heads, tokens in itertools.product(shapes, run.tokens):
        part = partial(attention_case, run, heads, tokens)
        run.part("attention", f"heads={heads} tokens={tokens}", part)


def attention_case(run: Run, heads: tuple[int, int, int], tokens: int) -> list[dict[str, Any]]:
    """A row for the forward, which keeps what a backward needs, and one for both."""
    mask, pairs = packed(run, tokens)
    *inputs, above = operands(run, tokens, heads, run.dtype)
    scale = heads[2] ** -0.5
    attend: dict[str, Any] = {name: BACKENDS[name] for name in run.backends if name != "sdpa"}
    if "flex" in attend:  # compiled for this very number of tokens
        attend["flex-static"] = partial(flex_tree_attention, dynamic=False)

    def forward(name: str) -> Tensor:
        return attend[name](*inputs, mask, scale, None)

    def both(name: str) -> None:
        torch.autograd.grad(forward(name), inputs, above)

    rows = []
    for direction, do, products in (("forward", forward, 2), ("both", both, 7)):
        variants = {name: partial(do, name) for name in attend}
        what = f"heads={heads} tokens={tokens} {direction}"
        rounds = run.interleaved(what, variants, warmup=0 if run.tiny else 2, queued=True)
        times = medians(rounds)
        flops = 2 * products * pairs * heads[0] * heads[2]
        row = {"tokens": tokens, "heads": heads, "direction": direction, "ms": times}
        row["rounds_ms"] = rounds
        row["tflops"] = {name: flops / ms / 1e9 for name, ms in times.items()}
        flex = [ms for name, ms in times.items() if name.startswith("flex")]
        if flex and "triton" in times:
            row["triton_over_flex"] = min(flex) / times["triton"]
        rows.append(row)
        print("attention", json.dumps(row), flush=True)
    return rows


def make_model(run: Run, name: str) -> PolicyOptimizer:
    hidden, intermediate, layers, tied, recompute = SIZES[name]
    heads, kv_heads, _ = HEADS[name]
    vocabulary = VOCABULARY
    if run.tiny:
        hidden, intermediate, layers, heads, kv_heads, vocabulary = 32, 48, 2, 2, 1, 512
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = attention_name("sdpa")
    gc.collect()  # a model before this one
    if not run.tiny:
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    torch.set_default_dtype(run.dtype)
    try:
        with torch.device(run.device):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return PolicyOptimizer(model, lr=0.0, dtype=run.dtype, gradient_checkpointing=recompute)


def model_flops(policy: PolicyOptimizer, batches: list[PackedBatch]) -> float:
    """Forward and backward of the unique tokens: products with weights, and allowed pairs."""
    config = policy.model.config
    body = sum(p.numel() for p in policy.model.base_model.layers.parameters())
    head = config.vocab_size * config.hidden_size
    pairs = sum(int(b.position.astype(np.int64).sum()) + len(b) for b in batches)
    chosen = sum(int(((b.pos_coef != 0) | (b.neg_coef != 0)).sum()) for b in batches)
    attention = 12 * pairs * config.hidden_size * config.num_hidden_layers
    return 6.0 * (body * sum(map(len, batches)) + head * chosen) + attention


def backward(
    run: Run, policy: PolicyOptimizer, attention: str, batches: list[PackedBatch]
) -> float:
    """Loss, with gradients left in place."""
    policy.compute.set_attn_implementation(attention_name(attention))
    policy.compute.zero_grad(set_to_none=True)
    parts = [part for batch in batches if (part := policy.policy_backward(batch))]
    return sum(part.loss for part in parts)


Layouts = dict[str, tuple[str, list[PackedBatch]]]
"""By variant: its attention, and what it trains on."""


def training(run: Run, name: str) -> list[dict[str, Any]]:
    policy = make_model(run, name)
    rng = np.random.default_rng(0)
    vocabulary = policy.model.config.vocab_size
    grown = [grow(rng, run.shape, vocabulary) for _ in range(2)]
    trees, rows = as_trees(grown, 16384), as_rows(grown, 16384)
    plain = "path" if run.tiny else "varlen"
    names = [n for n in run.backends if n != "sdpa"]
    layouts: Layouts = {f"trees-{n}": (n, trees) for n in names}
    layouts |= {f"rows-{n}": (n, rows) for n in names if n in (plain, "triton")}
    agreement = agreement_with_rows(run, name, policy, layouts)
    peaks: dict[str, float] = {}

    def once(variant: str) -> None:
        if not run.tiny:
            torch.cuda.reset_peak_memory_stats()
        backward(run, policy, *layouts[variant])
        if not run.tiny:
            peaks[variant] = torch.cuda.max_memory_allocated() / GIB

    # The agreement has compiled everything and run it once.
    variants = {v: partial(once, v) for v in agreement}
    rounds = run.interleaved(name, variants, warmup=0, seconds=MODEL_SECONDS)
    times = medians(rounds)
    unique, computed = sum(map(len, trees)), sum(map(len, rows))
    flops = model_flops(policy, trees)
    row: dict[str, Any] = {
        "model": name,
        "unique_tokens": unique,
        "trajectory_tokens": computed,
        "agreement_with_rows": agreement,
        "ms": times,
        "rounds_ms": rounds,
        "unique_tokens_per_s": {v: 1e3 * unique / ms for v, ms in times.items()},
        "peak_gib": peaks,
    }
    peak = None if run.tiny else PEAK.get(torch.cuda.get_device_capability())
    if peak:
        row["mfu_of_unique_tokens"] = {v: 1e3 * flops / ms / peak for v, ms in times.items()}
    plain_times = [ms for variant, ms in times.items() if variant.startswith("rows")]
    if plain_times:
        row["speed_up_over_token_ratio"] = {
            v: min(plain_times) / ms / (computed / unique) for v, ms in times.items()
        }
    print("training", json.dumps(row), flush=True)
    return [row]


def agreement_with_rows(
    run: Run, name: str, policy: PolicyOptimizer, layouts: Layouts
) -> dict[str, tuple[float, float] | None]:
    """How far loss and a gradient of each variant that runs are from those of rows; `None` where
    no variant with rows runs.

    Clip bounds are out of reach: rounding would move ratios across them, and with them gradients.
    """
    found = {}
    for variant, (attention, batches) in layouts.items():
        far = [
            replace(
                batch,
                eps_low=np.ones_like(batch.eps_low),
                eps_high=np.full_like(batch.eps_high, 1e6),
            )
            for batch in batches
        ]
        do = partial(backward, run, policy, attention, far)
        loss = run.attempt(f"{name} {variant}", do)
        if loss is not None:
            weight = policy.model.base_model.layers[0].mlp.down_proj.weight
            assert weight.grad is not None
            found[variant] = loss, weight.grad.float().clone()
    truth = next((result for v, result in found.items() if v.startswith("rows")), None)
    if truth is None:
        run.failures.append(f"{name}: no rows to compare with")
        return dict.fromkeys(found)
    agreement = {
        v: (abs(loss - truth[0]), error(grad, truth[1])) for v, (loss, grad) in found.items()
    }
    for variant, (_, apart) in agreement.items():
        if not apart <= (1e-4 if run.tiny else 0.05):
            run.failures.append(f"{name} {variant}: gradient differs from rows' by {apart:.2e}")
    return dict(agreement)


def tune(run: Run, models: list[str]) -> None:
    """Time of forward and backward under other tiles, one kernel's changed at a time. What is in
    `out` already is kept and not timed again."""
    if run.out.exists():
        old = json.loads(run.out.read_text())
        same = all(old.get(key) == run.results[key] for key in ("device", "torch", "triton"))
        if not same or "tune" not in old:
            raise SystemExit(f"{run.out} holds other results; move it, or give another --out")
        run.results["tune"] = old["tune"]
    run.keep("tune", [])
    tiles = [
        _triton_attention.Tile(rows, columns, warps, stages)
        for rows, columns in itertools.product((32, 64, 128), repeat=2)
        for warps, stages in ((4, 2), (4, 3), (8, 2), (8, 3))
    ]
    if run.tiny:
        tiles = tiles[:2]
    left = 0
    for heads in [(2, 1, 16)] if run.tiny else [HEADS[name] for name in models]:
        mask, _ = packed(run, 48 if run.tiny else 16384)
        *inputs, above = operands(run, len(mask.end), heads, run.dtype)

        def both() -> None:
            out = BACKENDS["triton"](*inputs, mask, inputs[0].shape[-1] ** -0.5, None)  # noqa: B023
            torch.autograd.grad(out, inputs, above)  # noqa: B023

        for kernel, tile in itertools.product(("forward", "query", "key"), tiles):
            what = f"{kernel} {tile}"
            timed = ((tuple(row["heads"]), row["what"]) for row in run.results["tune"])
            if (heads, what) in timed:
                continue
            if time.perf_counter() > run.deadline:
                left += 1
                continue
            run.part("tune", what, partial(tune_case, run, heads, kernel, tile, what, both))
        ran = (r for r in run.results["tune"] if tuple(r["heads"]) == heads and r["ms"])
        best = sorted(ran, key=lambda row: row["ms"])
        print(*(json.dumps(row) for row in best[:12]), sep="\n", flush=True)
    if left:
        print(f"{left} tiles are left: run the same command again", flush=True)


def tune_case(
    run: Run,
    heads: tuple[int, int, int],
    kernel: str,
    tile: _triton_attention.Tile,
    what: str,
    both: Callable[[], None],
) -> list[dict[str, Any]]:
    """`ms` is `None` for a tile that does not fit the chip."""
    shipped_of = _triton_attention.TILES[_triton_attention.chip(torch.device(run.device))]
    key = run.dtype.itemsize, max(64, heads[2])
    shipped = shipped_of[key]
    shipped_of[key] = replace(shipped, **{kernel: tile})
    try:
        both()  # compiles
        times = run.interleaved("tune", {what: both}, warmup=0 if run.tiny else 1, queued=True)
    except triton.OutOfResources as fault:
        return [{"heads": heads, "what": what, "ms": None, "why": str(fault)}]
    finally:
        shipped_of[key] = shipped
    return [{"heads": heads, "what": w, "ms": ms} for w, ms in medians(times).items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_training.json"))
    parser.add_argument("--only", choices=["check", "attention", "training"])
    parser.add_argument("--models", nargs="+", choices=SIZES)
    parser.add_argument("--seconds", type=float, default=420, help="after which nothing begins")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("bench.gpu_training needs a GPU; --tiny runs its code on a CPU")
    logging.basicConfig(level=logging.WARNING)
    run = Run(options.tiny, options.out, options.seconds)
    if options.tune:
        tune(run, options.models or ["0.5b", "7b"])  # 1.5b's tiles are 7b's
    else:
        if options.only in (None, "check"):
            check(run)
        if options.only in (None, "attention"):
            attention_alone(run)
        for name in options.models or SIZES if options.only in (None, "training") else ():
            run.part("training", name, partial(training, run, name))
    print(f"written to {options.out} after {run.results['seconds']:.0f} s", flush=True)
    if run.failures:
        raise SystemExit("\n".join(run.failures))


if __name__ == "__main__":
    main()
