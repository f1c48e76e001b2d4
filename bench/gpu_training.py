"""Tree attention and tree-packed training on one GPU, every backend beside the others.

    python -m bench.gpu_training --out results.json

Correctness first: output and gradients of each attention in bfloat16 against float64, judged by
what dense SDPA makes of the same inputs, and trees against rows through a whole model. Then
attention alone at 8K to 32K packed tokens, and forward plus backward of random models of Qwen2.5's
shapes, trees under each attention beside rows without sharing (`varlen`). Variants are interleaved,
times medians. Goals on a Hopper card: `triton` no slower than FlexAttention; training faster than
rows by 0.85 of the ratio of their tokens or more. Needs torch, triton, transformers and numba only.
`--tune` instead times other tiles of the Triton kernels; `--tiny` runs the code on a CPU, under
TRITON_INTERPRET=1 the Triton kernels too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
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
TREES = Shape(trajectories=16, from_root=3, steps=12, step_tokens=(100, 180), prompt=600)
TINY = Shape(trajectories=4, from_root=2, steps=2, step_tokens=(4, 8), prompt=9)


class Run:
    """Where and how large; `tiny` is for machines without a GPU."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = "cpu" if tiny else "cuda"
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.backends = ["sdpa", "path"] if tiny else ["sdpa", "triton", "flex", "varlen"]
        if tiny and os.environ.get("TRITON_INTERPRET") == "1":
            self.backends.append("triton")
        self.tokens = [48] if tiny else [8192, 16384, 32768]
        self.warmup, self.rounds = (0, 1) if tiny else (2, 7)
        self.shape = TINY if tiny else TREES
        self.failures: list[str] = []

    def attempt(self, what: str, do: Callable[[], Any]) -> Any:
        """A fault of one variant is noted and the others go on: device time is short."""
        try:
            return do()
        except Exception as fault:
            self.failures.append(f"{what}: {type(fault).__name__}: {str(fault)[:300]}")
            print("FAILED", self.failures[-1], flush=True)
            return None

    def clock(self, do: Callable[[], Any]) -> float:
        """Milliseconds."""
        if self.tiny:
            began = time.perf_counter()
            do()
            return 1e3 * (time.perf_counter() - began)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        do()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    def interleaved(self, variants: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median milliseconds of each variant that runs."""
        live = dict(variants)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(self.warmup + self.rounds):
            for name in list(live):
                took = self.attempt(name, lambda name=name: self.clock(live[name]))
                if took is None:
                    del live[name]
                elif number >= self.warmup:
                    times[name].append(took)
        return {name: statistics.median(times[name]) for name in live}


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


def check(run: Run) -> list[str]:
    """Errors of output and gradients of each attention."""
    lines = []
    cases = [(heads, None) for heads in [*HEADS.values(), (8, 8, 96)]]
    cases += [((8, 2, 128), 33), ((8, 2, 256), 100)]
    forests = [(3, 211, 0.03), (1, 700, 0.0), (40, 9, 0.2)]
    if run.tiny:
        cases, forests = [((3, 1, 16), None), ((2, 2, 16), 5)], [(2, 40, 0.05)]
    for heads, window in cases:
        for trees, tokens, branching in forests:
            mask = on(run, trees, tokens, branching)
            *inputs, above = operands(run, trees * tokens, heads, run.dtype)
            by_token = [x.transpose(0, 1) for x in (*inputs, above)]
            scale = heads[2] ** -0.5
            true = true_attention(*by_token, mask, window=window, scale=scale)
            allowed: list[float] = []
            for backend in run.backends:
                name = f"{backend} heads={heads} window={window} forest={trees}x{tokens}"

                def errors(backend: str = backend) -> list[float]:
                    out = BACKENDS[backend](*inputs, mask, scale, window)  # noqa: B023
                    found = [out, *torch.autograd.grad(out, inputs, above)]  # noqa: B023
                    pairs = zip(found, true, strict=True)  # noqa: B023
                    return [error(f.detach().transpose(0, 1), t) for f, t in pairs]

                found = run.attempt(name, errors)
                if found is None:
                    continue
                lines.append(f"{name}: " + " ".join(f"{e:.1e}" for e in found))
                if backend == "sdpa":
                    allowed = [1.5 * e + (1e-5 if run.tiny else 2**-9) for e in found]
                if not all(e <= a for e, a in zip(found, allowed, strict=True)):
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


def attention_alone(run: Run) -> list[dict[str, Any]]:
    rows = []
    shapes = [(2, 1, 16)] if run.tiny else [HEADS["0.5b"], HEADS["7b"]]
    for heads in shapes:
        for tokens in run.tokens:
            mask, pairs = packed(run, tokens)
            *inputs, above = operands(run, tokens, heads, run.dtype)
            scale = heads[2] ** -0.5
            names = [name for name in run.backends if name != "sdpa"]

            def forward(name: str) -> Tensor:
                return BACKENDS[name](*inputs, mask, scale, None)  # noqa: B023

            def both(name: str) -> None:
                torch.autograd.grad(forward(name), inputs, above)  # noqa: B023

            for direction, do, products in (("forward", forward, 2), ("both", both, 7)):
                with torch.set_grad_enabled(direction == "both"):
                    times = run.interleaved({n: lambda n=n, do=do: do(n) for n in names})
                flops = 2 * products * pairs * heads[0] * heads[2]
                row = {"tokens": tokens, "heads": heads, "direction": direction, "ms": times}
                row["tflops"] = {name: flops / ms / 1e9 for name, ms in times.items()}
                if {"triton", "flex"} <= times.keys():
                    row["triton_over_flex"] = times["flex"] / times["triton"]
                rows.append(row)
                print("attention", json.dumps(row), flush=True)
    return rows


def make_model(run: Run, name: str) -> Any:
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


def training(run: Run, name: str) -> dict[str, Any]:
    policy = make_model(run, name)
    rng = np.random.default_rng(0)
    vocabulary = policy.model.config.vocab_size
    grown = [grow(rng, run.shape, vocabulary) for _ in range(2)]
    trees, rows = as_trees(grown, 16384), as_rows(grown, 16384)
    plain = "path" if run.tiny else "varlen"
    names = [n for n in run.backends if n != "sdpa"]
    layouts = {f"trees-{n}": (n, trees) for n in names}
    layouts |= {f"rows-{n}": (n, rows) for n in names if n in (plain, "triton")}
    found = {}
    for variant, (attention, batches) in layouts.items():
        loss = run.attempt(variant, lambda a=attention, b=batches: backward(run, policy, a, b))
        if loss is not None:
            weight = policy.model.base_model.layers[0].mlp.down_proj.weight
            assert weight.grad is not None
            found[variant] = loss, weight.grad.float().clone()
    truth = next(result for variant, result in found.items() if variant.startswith("rows"))
    agreement = {
        v: (abs(loss - truth[0]), error(grad, truth[1])) for v, (loss, grad) in found.items()
    }
    for variant, (_, apart) in agreement.items():
        if not apart <= (1e-4 if run.tiny else 0.05):
            run.failures.append(f"{name} {variant}: gradient differs from rows' by {apart:.2e}")
    times = run.interleaved(
        {v: lambda a=a, b=b: backward(run, policy, a, b) for v, (a, b) in layouts.items()}
    )
    unique, computed = sum(map(len, trees)), sum(map(len, rows))
    flops = model_flops(policy, trees)
    row: dict[str, Any] = {
        "model": name,
        "unique_tokens": unique,
        "trajectory_tokens": computed,
        "agreement_with_rows": agreement,
        "ms": times,
        "unique_tokens_per_s": {v: 1e3 * unique / ms for v, ms in times.items()},
    }
    if not run.tiny:
        peak = PEAK.get(torch.cuda.get_device_capability())
        if peak:
            row["mfu_of_unique_tokens"] = {v: 1e3 * flops / ms / peak for v, ms in times.items()}
        row["peak_gib"] = {}
        for variant, (attention, batches) in layouts.items():
            if variant in times:
                torch.cuda.reset_peak_memory_stats()
                backward(run, policy, attention, batches)
                row["peak_gib"][variant] = torch.cuda.max_memory_allocated() / GIB
    fastest = min(ms for variant, ms in times.items() if variant.startswith("rows"))
    row["speed_up_over_token_ratio"] = {
        v: fastest / ms / (computed / unique) for v, ms in times.items()
    }
    print("training", json.dumps(row), flush=True)
    return row


def tune(run: Run) -> list[dict[str, Any]]:
    """Time of forward and backward under other tiles, one kernel's changed at a time."""
    chip = _triton_attention.chip(torch.device(run.device))
    rows = []
    for heads in (HEADS["0.5b"], HEADS["7b"]):
        key = 2, heads[2]
        shipped = _triton_attention.TILES[chip][key]
        mask, _ = packed(run, 16384)
        *inputs, above = operands(run, 16384, heads, run.dtype)
        for kernel in ("forward", "query", "key"):
            for r, c in itertools.product((32, 64, 128), repeat=2):
                for warps, stages in ((4, 2), (4, 3), (8, 2), (8, 3)):
                    tile = _triton_attention.Tile(r, c, warps, stages)
                    changed = replace(shipped, **{kernel: tile})
                    _triton_attention.TILES[chip][key] = changed

                    def both() -> None:
                        out = BACKENDS["triton"](*inputs, mask, heads[2] ** -0.5, None)  # noqa: B023
                        torch.autograd.grad(out, inputs, above)  # noqa: B023

                    times = run.interleaved({f"{kernel} {tile}": both})
                    rows += [{"heads": heads, "what": w, "ms": ms} for w, ms in times.items()]
        _triton_attention.TILES[chip][key] = shipped
        best = sorted((r for r in rows if r["heads"] == heads), key=lambda r: r["ms"])
        print(*(json.dumps(row) for row in best[:12]), sep="\n", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_training.json"))
    parser.add_argument("--only", choices=["check", "attention", "training"])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("bench.gpu_training needs a GPU; --tiny runs its code on a CPU")
    logging.basicConfig(level=logging.WARNING)
    run, began = Run(options.tiny), time.perf_counter()
    results: dict[str, Any] = {
        "device": "cpu" if run.tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }

    def section(name: str, do: Callable[[], Any]) -> None:
        if options.only in (None, name):
            results[name] = run.attempt(name, do)
        results.update(seconds=time.perf_counter() - began, failures=run.failures)
        options.out.write_text(json.dumps(results, indent=1))

    if options.tune:
        section("tune", lambda: tune(run))
    else:
        section("check", lambda: check(run))
        section("attention", lambda: attention_alone(run))
        section("training", lambda: [training(run, name) for name in options.models])
        if results.get("check"):
            print(*results["check"], sep="\n")
    print(f"written to {options.out} after {results['seconds']:.0f} s")
    if run.failures:
        raise SystemExit("\n".join(run.failures))


if __name__ == "__main__":
    main()
