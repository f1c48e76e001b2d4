"""The CPU's attention along paths against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from elpo_kernels import TreePlan

from elpo_fast.cpu.path_attention import TILE, _parts, path_attention

SCALE = 0.2


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


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreePlan,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """The definition, with all scores at once."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = scale * torch.einsum("qhd,khd->hqk", query, key)
    weights = scores.masked_fill(~tree.allowed(window or 0), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def results(
    tree: TreePlan,
    dtype: torch.dtype,
    heads: int = 6,
    kv_heads: int = 2,
    size: int = 8,
    window: int | None = None,
    scale: float = SCALE,
    attention: Callable[..., torch.Tensor] = path_attention,
) -> list[torch.Tensor]:
    """Attention and its gradients, in float64 of numbers that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(len(tree.end))
    shapes = [(len(tree.end), count, size) for count in (heads, kv_heads, kv_heads, heads)]
    numbers = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    query, key, value, above = (x.requires_grad_() for x in numbers)
    output = attention(query, key, value, tree, scale, window)
    found = [output, *torch.autograd.grad(output, [query, key, value], above.detach())]
    assert all(x.dtype == dtype for x in found)
    return [x.detach().double() for x in found]


def check(tree: TreePlan, dtype: torch.dtype, **options: object) -> None:
    """A gradient that is zero, as under a window of 1, may come out as rounding."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    expected = results(tree, torch.float64, attention=dense, **options)  # type: ignore[arg-type]
    actual = results(tree, dtype, **options)  # type: ignore[arg-type]
    for ours, best in zip(actual, expected, strict=True):
        if best.any():
            assert (ours - best).norm() <= tolerance * best.norm()
        else:
            assert ours.abs().max() <= tolerance


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (9, 3), (16, 2)])
@pytest.mark.parametrize("count, tokens", [(1, 1), (1, 32), (2, 513), (5, 70)])
def test_equals_float64(heads: int, kv_heads: int, count: int, tokens: int) -> None:
    check(trees(tokens, count, tokens), torch.float32, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("size", [1, 20, 64, 80, 256])
def test_heads_of_any_size(size: int) -> None:
    check(trees(1, 2, 150), torch.float32, size=size)


@pytest.mark.parametrize("window", [1, 7, 100, TILE, 10_000])
def test_windows(window: int) -> None:
    check(trees(2, 2, 300), torch.float32, window=window)


@pytest.mark.parametrize("branches", [0.0, 0.5, 1.0])
def test_chains_and_bushes(branches: float) -> None:
    check(trees(3, 3, 60, branches), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(trees(4, 2, 200), dtype)


def test_scores_of_thousands() -> None:
    """Weights of 0 and 1, and no infinities."""
    tree = trees(5, 2, 200)
    actual = results(tree, torch.float32, scale=1e4)
    assert all(x.isfinite().all() for x in actual)
    expected = results(tree, torch.float64, scale=1e4, attention=dense)
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


@pytest.mark.parametrize("window", [None, 30])
def test_memory_order_does_not_matter(window: int | None) -> None:
    """Of the inputs, nor of a gradient that is one number, seen everywhere."""
    tree = trees(11, 2, 150)
    inputs = [torch.randn(300, count, 16) for count in (6, 2, 2)]
    turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in inputs]
    found = []
    for tensors in (inputs, turned):
        for x in tensors:
            x.requires_grad_()
        output = path_attention(*tensors, tree, SCALE, window)
        found.append([output, *torch.autograd.grad(output.sum(), tensors)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("window", [None, 30, 10_000])
def test_parts_cover_each_allowed_pair_once(window: int | None) -> None:
    """A mask has a tile's rows, and as many columns as these see: none under a window that hides
    nothing, so that memory is linear in the row."""
    tree = trees(10, 3, 700)
    pairs = torch.zeros(2100, 2100, dtype=torch.int)
    for queries, path, causal, mask in _parts(tree, window, torch.float32):
        keys = torch.cat([torch.arange(part.start, part.stop) for part in path])
        seen = torch.ones(queries.stop - queries.start, len(keys), dtype=torch.int)
        if causal:
            assert queries.stop - queries.start == len(keys)
            seen.tril_()
        if mask is not None:
            assert window is not None and mask.shape == seen.shape
            assert len(keys) < TILE + window < 700
            seen *= mask == 0
        pairs[queries, keys] += seen
    assert torch.equal(pairs, tree.allowed(window or 0).int())


def test_again_gives_the_same_bits() -> None:
    first, second = (results(trees(7, 2, 400), torch.float32) for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def test_callers_do_not_disturb_each_other() -> None:
    forest = [trees(seed, 1, 300) for seed in range(4)]
    alone = [results(tree, torch.float32) for tree in forest]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            together = pool.map(lambda tree: results(tree, torch.float32), forest)
            for ours, theirs in zip(together, alone, strict=True):
                assert all(map(torch.equal, ours, theirs))
