"""Tree attention on a CPU, forward and backward, of one packed micro-batch, one layer's heads.

The forests of `bench_step`, with SmolLM2's heads: `sdpa` has a dense mask for each tree, `path`
computes allowed pairs only. `GFLOP/s` counts allowed pairs: 14 D operations for each and each head.

    pytest bench/bench_attention.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch
from elpo_kernels import TreePlan, tree_attention
from pytest_benchmark.fixture import BenchmarkFixture

import elpo_fast.model.attention  # noqa: F401, registers `path`
from bench.bench_step import DTYPES, batches, forest

HEADS, KV_HEADS, SIZE = 9, 3, 64


@pytest.mark.parametrize("backend", ["sdpa", "path"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["recorded", "star"])
def test_attention(benchmark: BenchmarkFixture, name: str, dtype: str, backend: str) -> None:
    batch = batches("trees", forest(name))[0]
    tree = TreePlan(torch.from_numpy(batch.end), torch.from_numpy(batch.position))
    generator = torch.Generator().manual_seed(0)

    def numbers(heads: int) -> torch.Tensor:
        shape = len(batch), heads, SIZE
        x = torch.randn(shape, generator=generator).to(DTYPES[dtype])
        return x.requires_grad_()

    inputs = numbers(HEADS), numbers(KV_HEADS), numbers(KV_HEADS)
    above = numbers(HEADS).detach()

    def attend() -> None:
        output = tree_attention(*inputs, tree, backend=backend)
        torch.autograd.grad(output, inputs, above)

    benchmark.group = f"{name} {dtype}"
    benchmark.pedantic(attend, rounds=20, warmup_rounds=2)
    pairs = int((batch.position + 1).sum()) * HEADS
    benchmark.extra_info |= {"tokens": len(batch), "pairs": pairs}
    if benchmark.stats is not None:  # else --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["GFLOP/s"] = round(14 * SIZE * pairs / seconds / 1e9, 1)
