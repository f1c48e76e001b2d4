"""The CPU's kernels of attention along paths against float64, and who computes what."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from elpo_kernels import TreePlan
from llvmlite.binding import get_host_cpu_features

from elpo_fast.cpu import path_layout
from elpo_fast.cpu.path_attention import path_attention
from elpo_fast.cpu.path_products import BLOCK
from elpo_fast.cpu.vectors import PANEL

SCALE = 0.2


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """More than there are cores, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def trees(seed: int, count: int, tokens: int, branches: float = 0.03) -> TreePlan:
    """Random trees in preorder, which branch anywhere on the path."""
    rng = np.random.default_rng(seed)
    depth = []
    for _ in range(count):
        place = 0
        for token in range(tokens):
            if token and rng.random() < branches:
                place = int(rng.integers(1, place + 1))
            depth.append(place)
            place += 1
    position = np.array(depth)
    later = [np.flatnonzero(position[t + 1 :] <= position[t]) for t in range(len(position))]
    end = [t + 1 + int(at[0]) if len(at) else len(position) for t, at in enumerate(later)]
    return TreePlan(torch.tensor(end), torch.from_numpy(position))


def results(
    tree: TreePlan,
    dtype: torch.dtype,
    heads: int = 6,
    kv_heads: int = 2,
    size: int = 8,
    window: int | None = None,
    scale: float = SCALE,
) -> list[torch.Tensor]:
    """Attention and its gradients, in float64 of numbers that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(len(tree.end))
    shapes = [(len(tree.end), count, size) for count in (heads, kv_heads, kv_heads, heads)]
    numbers = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    query, key, value, above = (x.requires_grad_() for x in numbers)
    output = path_attention(query, key, value, tree, scale, window)
    found = [output, *torch.autograd.grad(output, [query, key, value], above.detach())]
    assert all(x.dtype == dtype for x in found)
    return [x.detach().double() for x in found]


def check(tree: TreePlan, dtype: torch.dtype, **options: object) -> None:
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    expected = results(tree, torch.float64, **options)  # type: ignore[arg-type]
    actual = results(tree, dtype, **options)  # type: ignore[arg-type]
    for ours, best in zip(actual, expected, strict=True):
        assert (ours - best).norm() <= tolerance * best.norm()


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2), (9, 3), (16, 2)])
@pytest.mark.parametrize("count, tokens", [(1, 1), (1, PANEL), (1, 2 * BLOCK + 1), (5, 70)])
def test_equals_float64(heads: int, kv_heads: int, count: int, tokens: int, threads: int) -> None:
    check(trees(tokens, count, tokens), torch.float32, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("size", [8, 20, PANEL, 64, 80, 96, 128, 256])
def test_heads_of_any_size(size: int) -> None:
    check(trees(1, 2, 150), torch.float32, size=size)


@pytest.mark.parametrize("window", [1, 7, PANEL, PANEL + 1, 100, 10_000])
def test_windows(window: int, threads: int) -> None:
    check(trees(2, 2, 300), torch.float32, window=window)


@pytest.mark.parametrize("branches", [0.0, 0.5, 1.0])
def test_chains_and_bushes(branches: float) -> None:
    check(trees(3, 3, 200, branches), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(trees(4, 2, 200), dtype)


def test_scores_of_thousands() -> None:
    """Weights of 0 and 1, and no infinities."""
    tree = trees(5, 2, 200)
    actual = results(tree, torch.float32, scale=1e4)
    assert all(x.isfinite().all() for x in actual)
    expected = results(tree, torch.float64, scale=1e4)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", range(3))
def test_a_nan_is_seen_by_what_sees_it(which: int) -> None:
    tree = trees(6, 2, 100)
    inputs = [torch.randn(200, 2, 16) for _ in range(3)]
    inputs[which][120] = torch.nan
    query, key, value = inputs
    output = path_attention(query, key, value, tree, SCALE)
    sees = tree.allowed()[:, 120] if which else torch.arange(200) == 120
    assert output[sees].isnan().all()
    assert output[:100].isfinite().all()  # the other tree


def test_again_gives_the_same_bits(threads: int) -> None:
    first, second = (results(trees(7, 2, 400), torch.float32) for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def test_callers_do_not_disturb_each_other() -> None:
    forest = [trees(seed, 1, 300) for seed in range(4)]
    alone = [results(tree, torch.float32) for tree in forest]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = pool.map(lambda tree: results(tree, torch.float32), forest)
            for ours, theirs in zip(together, alone, strict=True):
                assert all(map(torch.equal, ours, theirs))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """Ours are not copied; torch's own would hang, so it is asked for nothing that wakes them."""
    tree, number = trees(8, 1, 60), torch.ones(60, 1, 8)
    expected = path_attention(number, number, number, tree, SCALE)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def attend() -> None:
        send.send(path_attention(number, number, number, tree, SCALE).tolist())

    child = context.Process(target=attend)
    child.start()
    assert receive.poll(60), "the forked process hangs"
    assert receive.recv() == expected.tolist()
    child.join()


def test_the_other_tile_of_products(tmp_path: Path) -> None:
    """What processors with other vectors than this one's compute."""
    flag = not get_host_cpu_features().get("avx512f")
    code = f"""
import sys
from unittest.mock import patch
import numba, torch
numba.njit(lambda: 0)()  # Numba itself is told the truth
with patch("llvmlite.binding.get_host_cpu_features", lambda: {{"avx512f": {flag}}}):
    from elpo_fast.cpu.vectors import TILE_ROWS
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_path_fused import BLOCK, check, trees
assert TILE_ROWS == {14 if flag else 6}
check(trees(9, 3, 2 * BLOCK + 1), torch.float32, size=40)
check(trees(9, 3, 100), torch.float32, window=20)
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}  # it does not know of our lie
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("shares", [1, 4, 1000])
def test_layout(shares: int, window: int | None) -> None:
    tree, group = trees(10, 3, 700), 3
    layout, longest = path_layout.make_layout(tree, group, shares, window)
    assert longest == max(
        sum(-(-(part.stop - part.start) // PANEL) for part in chain.path) for chain in tree.chains
    )
    assert len(np.unique(layout.slots)) == len(tree.end)
    rows: list[int] = []  # every query, once and in order
    for _, start, _, first, stop in layout.blocks:
        assert 0 < stop - first <= BLOCK
        rows += range(start * group + first, start * group + stop)
    assert rows == list(range(len(tree.end) * group))
    # Every block is in one share, which holds what it sees.
    assert (layout.bounds[0], layout.bounds[-1]) == (0, len(layout.blocks))
    assert (np.diff(layout.bounds) > 0).all() and len(layout.bounds) <= shares + 1
    work = np.zeros(len(layout.reach))
    for share, (low, high) in enumerate(layout.reach):
        for run, _, place, first, stop in layout.blocks[slice(*layout.bounds[share : share + 2])]:
            for panel, _, length in layout.slices[layout.first[run] : layout.first[run + 1]]:
                assert low <= panel and panel + -(-length // PANEL) <= high
            seen = place + stop // group
            work[share] += (stop - first) * min(seen, window or seen)
    if shares == 4:
        assert len(work) == 4 and work.max() <= 1.1 * work.mean()
