"""A whole update of random models of Qwen2.5's shapes: float32 masters, bfloat16 copy, fused AdamW;
trees beside rows without sharing, eager and with compiled blocks."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from bench.forests import as_rows, as_trees, grow
from bench.gpu.part import Part, judged, medians
from bench.gpu.shapes import make_model, shape
from elpo_fast.model.compiled import compile_blocks
from elpo_fast.train.step import PolicyOptimizer

PEAK = {(8, 0): 312e12, (9, 0): 989e12, (10, 0): 2250e12}  # dense bfloat16 operations a second
BUDGET = {"0.5b": 16384, "1.5b": 8192}  # tokens of a micro-batch
RATIO_GOAL, MFU_GOAL = 0.85, 0.30


def run(part: Part) -> None:
    for name in BUDGET:
        part.attempt(name, partial(one_model, part, name))


def one_model(part: Part, name: str) -> None:
    model = make_model(part, name, torch.float32)
    policy = PolicyOptimizer(model, lr=1e-7, dtype=part.dtype)
    rng, size = np.random.default_rng(0), model.config.vocab_size
    grown = [grow(rng, shape(part), size) for _ in range(1 if part.ahead else 2)]
    budget = 64 if part.tiny else BUDGET[name]
    trees, rows = as_trees(grown, budget), as_rows(grown, budget)
    unique, computed = (sum(len(batch.trie) for batch in part) for part in (trees, rows))
    pairs = sum(float(np.sum(batch.trie.position + 1.0)) for batch in trees)
    chosen = sum(len(batch.loss_rows) for batch in trees)
    flops = 3 * (policy.costs.forward(unique, pairs) + policy.costs.head(chosen))
    peak = None if part.tiny else PEAK.get(torch.cuda.get_device_capability())
    for blocks in ("eager", "compiled"):
        if blocks == "compiled":
            if part.tiny:  # a CPU needs a compiler for it, and half a minute
                break
            compile_blocks(policy.compute)
        calls = {"trees": partial(policy.update, trees), "rows": partial(policy.update, rows)}
        what = f"{name} {blocks}"
        rounds = part.interleaved(what, calls, warmup=1, rounds=5, seconds=12)
        times = medians(rounds)
        if "trees" not in times:
            continue
        memory = part.peak(calls["trees"])
        line = (
            f"{what}: trees {times['trees']:.0f} ms, {1e3 * unique / times['trees']:.0f} tokens/s"
        )
        values = {"memory_gib": memory, "unique_tokens": unique, "trajectory_tokens": computed}
        if peak:
            values["mfu"] = 1e3 * flops / times["trees"] / peak
            goal = {"least": True}
            shown = judged(values["mfu"], MFU_GOAL, **goal) if name == "1.5b" else values["mfu"]
            line += f", MFU {shown if isinstance(shown, str) else format(shown, '.2f')}"
        if "rows" in times:
            faster = times["rows"] / times["trees"] / (computed / unique)
            values["speed_up_over_token_ratio"] = faster
            line += f"; rows {times['rows']:.0f} ms, "
            line += f"{judged(faster, RATIO_GOAL, least=True)} of the ratio of their tokens"
        line += f"; {memory:.1f} GiB"
        part.row(line, model=name, blocks=blocks, ms=times, rounds_ms=rounds, **values)
    if not part.ahead:
        part.attempt(f"{name} profile", partial(part.profiled, name, calls["trees"]))
