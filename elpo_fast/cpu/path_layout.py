"""Attention along paths by `path_kernels`: layout, threads, and packing."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from elpo_kernels import TreePlan

from elpo_fast.cpu import path_kernels
from elpo_fast.cpu.path_kernels import Layout
from elpo_fast.cpu.path_products import BLOCK
from elpo_fast.cpu.threads import on_threads
from elpo_fast.cpu.vectors import PANEL

_SHARES = 2  # of the backward, for each thread
_ALL = 1 << 40  # a window that hides nothing


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreePlan,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[heads, N, D]`, `[kv_heads, N, D]` -> `[heads, N, D]`, and what `backward` needs of it."""
    heads, tokens, size = query.shape
    threads = torch.get_num_threads()
    layout, longest = _layout(tree, heads // len(key), len(key), threads, window)
    parts = -(-size // PANEL)
    key_columns, _ = _packed(threads, layout, key, columns=True)
    _, values = _packed(threads, layout, value, panels=True)
    output = torch.empty(tokens, heads, size)
    statistics = torch.empty(2, tokens, heads)
    work = (
        _empty(threads, longest, BLOCK, PANEL),
        _zeros(threads, parts, BLOCK, PANEL),
        _empty(threads, parts, BLOCK, PANEL),
    )
    on_threads(
        threads,
        path_kernels.forward,
        layout,
        _by_token(query),
        key_columns,
        values,
        np.float32(scale),
        _ALL if window is None else window,
        work,
        output.numpy(),
        statistics.numpy(),
    )
    return output.transpose(0, 1).to(query.dtype), statistics


def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreePlan,
    scale: float,
    window: int | None,
    output: torch.Tensor,
    statistics: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value."""
    heads, tokens, size = query.shape
    kv_heads = len(key)
    threads = torch.get_num_threads()
    layout, longest = _layout(tree, heads // kv_heads, kv_heads, threads, window)
    parts = -(-size // PANEL)
    key_columns, keys = _packed(threads, layout, key, columns=True, panels=True)
    value_columns, _ = _packed(threads, layout, value, columns=True)
    query_grad = torch.empty(tokens, heads, size)
    sums = [torch.empty(kv_heads, parts, PANEL * int(layout.offsets[-1]), PANEL) for _ in range(2)]
    work = (
        *(_empty(threads, longest, BLOCK, PANEL) for _ in range(2)),
        *(_zeros(threads, parts, BLOCK, PANEL) for _ in range(2)),
        _empty(threads, parts, BLOCK, PANEL),
    )
    on_threads(
        threads,
        path_kernels.backward,
        layout,
        _by_token(query),
        key_columns,
        value_columns,
        keys,
        np.float32(scale),
        _ALL if window is None else window,
        work,
        _by_token(output),
        statistics.numpy(),
        _by_token(grad),
        query_grad.numpy(),
        *(x.numpy() for x in sums),
    )
    grads = query_grad, *(torch.empty(tokens, kv_heads, size) for _ in sums)
    for total, part in zip(grads[1:], sums, strict=True):
        on_threads(threads, path_kernels.collect, layout, part.numpy(), total.numpy())
    query_grad, key_grad, value_grad = (x.transpose(0, 1).to(query.dtype) for x in grads)
    return query_grad, key_grad, value_grad


def _layout(
    tree: TreePlan, group: int, kv_heads: int, threads: int, window: int | None
) -> tuple[Layout, int]:
    """The layout, and the panels of its longest path."""
    # Threads have equally many equal shares, and some to spare if one of them is slower.
    least = threads // math.gcd(kv_heads, threads)
    shares = least * max(1, round(_SHARES * threads / kv_heads / least)) if threads > 1 else 1
    key = ("layout", group, shares, window)
    return tree.kept(key, lambda: make_layout(tree, group, shares, window))


def make_layout(tree: TreePlan, group: int, shares: int, window: int | None) -> tuple[Layout, int]:
    """`Layout` for `group` query heads a key head and up to `shares` shares of about equal work."""
    slots = np.empty(len(tree.end), np.int64)
    slices: list[tuple[int, int, int]] = []
    first, longest, panels = [0], 0, 0
    home: dict[int, int] = {}  # panel of each run, by its first token; a path's slices begin runs
    blocks, costs, reach = [], [], []
    roots = iter(tree.spans)
    root_stop = 0
    for index, chain in enumerate(tree.chains):
        count = chain.stop - chain.start
        home[chain.start] = panels
        if chain.start >= root_stop:
            root_stop, root = next(roots)[1], panels
        slots[chain.start : chain.stop] = PANEL * panels + np.arange(count)
        panels += -(-count // PANEL)
        place = 0
        for part in chain.path:
            slices.append((home[part.start], place, part.stop - part.start))
            place += part.stop - part.start
        longest = max(longest, sum(-(-length // PANEL) for *_, length in slices[first[-1] :]))
        first.append(len(slices))
        for start in range(0, count * group, BLOCK):
            stop = min(start + BLOCK, count * group)
            blocks.append((index, chain.start, place - count, start, stop))
            seen = place - count + -(-stop // group)
            costs.append((stop - start) * min(seen, window or seen))
            reach.append((root, panels))
    work = np.cumsum(costs)
    inner = np.searchsorted(work, work[-1] * np.arange(1, shares) / shares)
    bounds = np.unique([0, *inner, len(blocks)])
    spans = np.array([(reach[a][0], reach[b - 1][1]) for a, b in pairwise(bounds)])
    offsets = [0, *np.cumsum(np.diff(spans))]
    arrays = slots, slices, first, blocks, bounds, spans, offsets
    return Layout(*(np.asarray(array, np.int64) for array in arrays)), longest


def _by_token(x: torch.Tensor) -> np.ndarray:
    """`[heads, N, D]` -> float32 `[N, heads, D]`."""
    return x.transpose(0, 1).float().contiguous().numpy()


def _packed(
    threads: int, layout: Layout, x: torch.Tensor, *, columns: bool = False, panels: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`[kv_heads, N, D]` in slots, as `path_kernels.pack` stores it."""
    kv_heads, _, size = x.shape
    count = int(layout.reach[:, 1].max())
    parts = -(-size // PANEL)
    by_column = _zeros(kv_heads, count if columns else 0, parts * PANEL, PANEL)
    by_panel = _zeros(kv_heads, parts, PANEL * count if panels else 0, PANEL)
    on_threads(threads, path_kernels.pack, layout, _by_token(x), by_column, by_panel)
    return by_column, by_panel


def _empty(*shape: int) -> np.ndarray:
    return torch.empty(shape).numpy()  # torch aligns its memory to cache lines


def _zeros(*shape: int) -> np.ndarray:
    return torch.zeros(shape).numpy()
