"""Tree attention in Triton: flash attention that visits the blocks of `TreePlan`'s lists only.

A program of the forward and of the queries' gradient holds a block of rows (queries) and walks its
column blocks (keys); a program of the keys' gradient holds columns and walks rows. Partial blocks
come first, full ones after them without a mask. Sums are float32, in a fixed order and without
atomics. Scores are kept in base 2: `lse` is log2 of the sum of `2^(score · log2 e)`.

Few key heads make few and long programs where every query sees the same prompt. Then the query
heads of a group are split over several programs, whose gradients are added afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elpo_kernels._tree_blocks import NO_WINDOW, BlockLists

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
KEY_PROGRAMS = 16  # programs for each column block that are worth the memory of their sums


@dataclass(frozen=True, slots=True)
class Tile:
    """Block of the attention matrix of one program, and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """One tile for each kernel."""

    forward: Tile
    query: Tile
    key: Tile


# float32 is for checks: small tiles that compile without spills everywhere.
EXACT = {
    (4, 64): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    (4, 128): Tiles(*[Tile(16, 16, 4, 1)] * 3),
}
# Those that run: by chip, then by bytes of an element and head dimension; `aot` compiles every one.
TILES: dict[str, dict[tuple[int, int], Tiles]] = {
    "sm_80": {  # within the 99 KiB that the smaller cards of its kind have
        (2, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2)),
        (2, 128): Tiles(Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        (2, 256): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 2)),
        **EXACT,
    },
    "sm_90": {
        (2, 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        (2, 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        (2, 256): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        **EXACT,
    },
    "sm_100": {
        (2, 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        (2, 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
        (2, 256): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 2)),
        **EXACT,
    },
    "gfx942": {
        (2, 64): Tiles(Tile(128, 64, 4, 1), Tile(128, 64, 4, 1), Tile(64, 64, 4, 1)),
        (2, 128): Tiles(Tile(128, 64, 8, 1), Tile(128, 32, 8, 1), Tile(32, 64, 4, 1)),
        (2, 256): Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        **EXACT,
    },
}


# What a measurement decides between, for two-byte elements: by chip, head dimension and kernel.
# What `TILES` has is among them. All fit the shared memory; a larger tile may be worth some spills.
CANDIDATES: dict[str, dict[int, dict[str, tuple[Tile, ...]]]] = {
    "sm_80": {
        64: {
            "forward": (Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2)),
            "query": (Tile(128, 32, 8, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
            "key": (Tile(32, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 128, 8, 2)),
        },
        128: {
            "forward": (Tile(128, 32, 8, 3), Tile(128, 64, 8, 2)),
            "query": (Tile(64, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 32, 8, 2)),
            "key": (Tile(32, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
        },
        256: {"key": (Tile(32, 32, 8, 2), Tile(16, 64, 8, 2))},
    },
    "sm_90": {
        64: {
            "forward": (Tile(128, 64, 4, 3), Tile(128, 128, 4, 3), Tile(128, 128, 8, 3)),
            "query": (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
            "key": (Tile(64, 128, 8, 3), Tile(64, 64, 4, 3), Tile(128, 128, 8, 2)),
        },
        128: {
            "forward": (Tile(128, 64, 8, 3), Tile(128, 128, 8, 2)),
            "query": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
            "key": (Tile(32, 128, 8, 2), Tile(64, 128, 8, 3), Tile(64, 64, 4, 2)),
        },
        256: {
            "forward": (Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
            "key": (Tile(32, 32, 8, 2), Tile(16, 64, 8, 2)),
        },
    },
    "sm_100": {
        64: {
            "forward": (Tile(128, 64, 4, 3), Tile(128, 128, 8, 3)),
            "query": (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
            "key": (Tile(64, 128, 8, 3), Tile(64, 64, 4, 3)),
        },
        128: {
            "forward": (Tile(128, 64, 8, 3), Tile(128, 128, 8, 2)),
            "query": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3)),
            "key": (Tile(64, 64, 8, 1), Tile(32, 128, 8, 2), Tile(64, 128, 8, 3)),
        },
    },
    "gfx942": {
        64: {
            "forward": (Tile(128, 64, 4, 1), Tile(128, 64, 4, 2), Tile(128, 128, 4, 1)),
            "query": (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), Tile(128, 64, 8, 1)),
            "key": (Tile(64, 64, 4, 1), Tile(64, 128, 4, 1)),
        },
        128: {
            "forward": (Tile(128, 64, 8, 1), Tile(128, 64, 4, 1)),
            "query": (Tile(128, 32, 8, 1), Tile(64, 64, 4, 1)),
            "key": (Tile(32, 64, 4, 1), Tile(64, 64, 4, 1)),
        },
    },
}


def tiles(device: torch.device, dtype: torch.dtype, dim: int) -> Tiles:
    """The tiles for a head dimension; `ValueError` where none are shipped."""
    found = TILES[chip(device)].get((dtype.itemsize, _padded(dim)))
    if found is None:
        most = 128 if dtype == torch.float32 else 256
        raise ValueError(
            f"backend 'triton' takes {dtype} head dimensions up to {most}, got {dim}; use 'torch'"
        )
    return found


def candidates(device: torch.device, dim: int) -> list[tuple[str, Tile]]:
    """Kernels (fields of `Tiles`) and tiles worth timing here for a head dimension."""
    found = CANDIDATES[chip(device)].get(_padded(dim), {})
    return [(kernel, tile) for kernel, some in found.items() for tile in some]


@contextmanager
def trial(
    device: torch.device, dtype: torch.dtype, dim: int, kernel: str, tile: Tile
) -> Iterator[None]:
    """Within the block a kernel takes another tile than that of `TILES`."""
    of_chip, key = TILES[chip(device)], (dtype.itemsize, _padded(dim))
    own = of_chip[key]
    of_chip[key] = replace(own, **{kernel: tile})
    try:
        yield
    finally:
        of_chip[key] = own


def _padded(dim: int) -> int:
    return max(64, triton.next_power_of_2(dim))


def chip(device: torch.device) -> str:
    """Name of the row of `TILES`. Chips without one of their own take the smallest tiles."""
    if device.type != "cuda":  # the interpreter
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    own = {9: "sm_90", 10: "sm_100"}
    return own.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def precision(chip: str) -> str:
    """Three products of TF32 halves come close to float32 and run on tensor cores."""
    return "ieee" if chip == "gfx942" else "tf32x3"


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    source, first, stride, size, ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Rows `first` and on of one head, `[ROWS, DIM]`, 0 beyond `size` rows and `D` columns."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, DIM)[None, :]
    at = source + first.to(tl.int64) * stride + (row * stride + column)
    if CHECK or D != DIM:
        return tl.load(at, mask=(first + row < size) & (column < D), other=0.0)
    return tl.load(at)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    target, values, first, stride, size, ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr
):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, DIM)[None, :]
    at = target + first.to(tl.int64) * stride + (row * stride + column)
    tl.store(at, values.to(target.dtype.element_ty), mask=(first + row < size) & (column < D))


@triton.jit
def _visible(  # type: ignore[no-untyped-def]
    row, column, end, position, size, window, WINDOWED: tl.constexpr
):
    """`allowed` for indices that broadcast against each other; nothing beyond `size` is."""
    seen = (column <= row) & (row < tl.load(end + column, mask=column < size, other=0))
    if WINDOWED:
        above = tl.load(position + column, mask=column < size, other=0)
        seen = seen & (tl.load(position + row, mask=row < size, other=0) - above < window)
    return seen


@triton.jit(do_not_specialize=["blocks", "window"])
def forward_kernel(  # type: ignore[no-untyped-def]
    query,  # [T, Hq, D]
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, D]
    end,  # [T]
    position,  # [T], read where WINDOWED
    index,  # [row blocks, blocks]
    counts,  # [row blocks, 2]
    order,  # [row blocks]
    out,  # [T, Hq, D] out
    lse,  # [Hq, T] out
    size,
    blocks,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    out_stride,
    scale,  # of the scores, times log2 e
    window,
    GROUP: tl.constexpr,  # query heads a key head
    D: tl.constexpr,
    DIM: tl.constexpr,  # D, rounded up to a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products
):
    block = tl.load(order + tl.program_id(0))
    head = tl.program_id(1).to(tl.int64)
    first = block * ROWS
    row = first + tl.arange(0, ROWS)
    q = _load(query + head * query_head, first, query_stride, size, ROWS, D, DIM, True)
    key += head // GROUP * key_head
    value += head // GROUP * value_head
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    index += block.to(tl.int64) * blocks
    start, stop = 0, tl.load(counts + 2 * block)
    for full in tl.static_range(2):
        other = tl.load(index + start, mask=start < stop, other=0)
        for n in range(start, stop):
            k_first = other * COLUMNS
            other = tl.load(index + n + 1, mask=n + 1 < stop, other=0)  # early: addresses need it
            k = _load(key, k_first, key_stride, size, COLUMNS, D, DIM, not full)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if not full:
                column = k_first + tl.arange(0, COLUMNS)[None, :]
                seen = _visible(row[:, None], column, end, position, size, window, WINDOWED)
                s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1) * scale)
            origin = higher if full else tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(s * scale - origin[:, None])
            fade = tl.exp2(top - origin)
            total = total * fade + tl.sum(p, 1)
            v = _load(value, k_first, value_stride, size, COLUMNS, D, DIM, not full)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
            top = higher
        start, stop = stop, stop + tl.load(counts + 2 * block + 1)
    empty = total == 0  # a row that sees nothing, not even itself
    total = tl.where(empty, 1.0, total)
    _store(out + head * D, acc / total[:, None], first, out_stride, size, ROWS, D, DIM)
    level = tl.where(empty, 0.0, top + tl.log2(total))
    tl.store(lse + head * size + row, level, mask=row < size)


@triton.jit(do_not_specialize=["blocks", "window"])
def query_gradient_kernel(  # type: ignore[no-untyped-def]
    query,  # [T, Hq, D]
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, D]
    end,  # [T]
    position,  # [T]
    index,  # [row blocks, blocks]
    counts,  # [row blocks, 2]
    order,  # [row blocks]
    out,  # [T, Hq, D]
    lse,  # [Hq, T]
    grad,  # [T, Hq, D] of `out`
    delta,  # [Hq, T] out: Σ_d grad · out
    query_grad,  # [T, Hq, D] out
    size,
    blocks,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    out_stride,
    scale,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.load(order + tl.program_id(0))
    head = tl.program_id(1).to(tl.int64)
    first = block * ROWS
    row = first + tl.arange(0, ROWS)
    above = _load(grad + head * D, first, out_stride, size, ROWS, D, DIM, True)
    o = _load(out + head * D, first, out_stride, size, ROWS, D, DIM, True)
    correction = tl.sum(above.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + head * size + row, correction, mask=row < size)
    q = _load(query + head * query_head, first, query_stride, size, ROWS, D, DIM, True)
    level = tl.load(lse + head * size + row, mask=row < size, other=0.0)
    key += head // GROUP * key_head
    value += head // GROUP * value_head
    acc = tl.zeros([ROWS, DIM], tl.float32)
    index += block.to(tl.int64) * blocks
    start, stop = 0, tl.load(counts + 2 * block)
    for full in tl.static_range(2):
        other = tl.load(index + start, mask=start < stop, other=0)
        for n in range(start, stop):
            k_first = other * COLUMNS
            other = tl.load(index + n + 1, mask=n + 1 < stop, other=0)
            k = _load(key, k_first, key_stride, size, COLUMNS, D, DIM, not full)
            p = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.exp2(p * scale - level[:, None])
            if not full:
                column = k_first + tl.arange(0, COLUMNS)[None, :]
                seen = _visible(row[:, None], column, end, position, size, window, WINDOWED)
                p = tl.where(seen, p, 0.0)
            v = _load(value, k_first, value_stride, size, COLUMNS, D, DIM, not full)
            slope = tl.dot(above, tl.trans(v), input_precision=PRECISION)
            slope = p * (slope - correction[:, None])
            acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION)
        start, stop = stop, stop + tl.load(counts + 2 * block + 1)
    acc *= scale * LN2
    _store(query_grad + head * D, acc, first, out_stride, size, ROWS, D, DIM)


@triton.jit(do_not_specialize=["blocks", "window"])
def key_gradient_kernel(  # type: ignore[no-untyped-def]
    query,  # [T, Hq, D]
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, D]
    end,  # [T]
    position,  # [T]
    index,  # [column blocks, blocks]
    counts,  # [column blocks, 2]
    order,  # [column blocks]
    lse,  # [Hq, T]
    grad,  # [T, Hq, D]
    delta,  # [Hq, T]
    key_sums,  # [SPLITS, T, Hkv, D] out, float32
    value_sums,  # [SPLITS, T, Hkv, D] out
    size,
    blocks,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    out_stride,
    sums_stride,  # Hkv · D
    scale,
    window,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.load(order + tl.program_id(0))
    kv_head = (tl.program_id(1) // SPLITS).to(tl.int64)
    split = tl.program_id(1) % SPLITS
    first = block * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    k = _load(key + kv_head * key_head, first, key_stride, size, COLUMNS, D, DIM, True)
    v = _load(value + kv_head * value_head, first, value_stride, size, COLUMNS, D, DIM, True)
    k_acc = tl.zeros([COLUMNS, DIM], tl.float32)
    v_acc = tl.zeros([COLUMNS, DIM], tl.float32)
    index += block.to(tl.int64) * blocks
    partial, last = tl.load(counts + 2 * block), tl.load(counts + 2 * block + 1)
    for member in range(split * GROUP // SPLITS, (split + 1) * GROUP // SPLITS):
        head = kv_head * GROUP + member
        q_base, above_base = query + head * query_head, grad + head * D
        start, stop = 0, partial
        for full in tl.static_range(2):
            other = tl.load(index + start, mask=start < stop, other=0)
            for n in range(start, stop):
                q_first = other * ROWS
                other = tl.load(index + n + 1, mask=n + 1 < stop, other=0)
                row = q_first + tl.arange(0, ROWS)
                q = _load(q_base, q_first, query_stride, size, ROWS, D, DIM, True)
                level = tl.load(lse + head * size + row, mask=row < size, other=0.0)
                p = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                p = tl.exp2(p * scale - level[None, :])
                if not full:
                    at = row[None, :], column[:, None]
                    seen = _visible(at[0], at[1], end, position, size, window, WINDOWED)
                    p = tl.where(seen, p, 0.0)
                above = _load(above_base, q_first, out_stride, size, ROWS, D, DIM, True)
                correction = tl.load(delta + head * size + row, mask=row < size, other=0.0)
                v_acc = tl.dot(p.to(above.dtype), above, v_acc, input_precision=PRECISION)
                slope = tl.dot(v, tl.trans(above), input_precision=PRECISION)
                slope = p * (slope - correction[None, :])
                k_acc = tl.dot(slope.to(q.dtype), q, k_acc, input_precision=PRECISION)
            start, stop = stop, stop + last
    base = split.to(tl.int64) * size * sums_stride + kv_head * D
    k_acc *= scale * LN2
    _store(key_sums + base, k_acc, first, sums_stride, size, COLUMNS, D, DIM)
    _store(value_sums + base, v_acc, first, sums_stride, size, COLUMNS, D, DIM)


def forward(
    query: Tensor, key: Tensor, value: Tensor, end: Tensor, position: Tensor | None,
    lists: BlockLists, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `[T, Hq, D]` and `lse` `[Hq, T]` for the row lists of `tiles().forward`."""
    size, heads, dim = query.shape
    out = torch.empty((size, heads, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((heads, size), dtype=torch.float32, device=query.device)
    _launch(
        forward_kernel, tiles(query.device, query.dtype, dim).forward, heads,
        query, key, value, end, position, lists, (out, lse), (), window, scale,
    )  # fmt: skip
    return out, lse


def backward(
    query: Tensor, key: Tensor, value: Tensor, end: Tensor, position: Tensor | None,
    by_row: BlockLists, by_column: BlockLists, window: int, scale: float,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, contiguous."""
    size, heads, dim = query.shape
    kv_heads = key.shape[1]
    shipped = tiles(query.device, query.dtype, dim)
    grad = grad.contiguous()
    query_grad = torch.empty((size, heads, dim), dtype=query.dtype, device=query.device)
    delta = torch.empty_like(lse)
    _launch(
        query_gradient_kernel, shipped.query, heads, query, key, value, end, position, by_row,
        (out, lse, grad, delta, query_grad), (), window, scale,
    )  # fmt: skip
    splits = max(1, min(heads // kv_heads, KEY_PROGRAMS // kv_heads))
    shape = splits, size, kv_heads, dim
    sums = [torch.empty(shape, dtype=torch.float32, device=key.device) for _ in range(2)]
    _launch(
        key_gradient_kernel, shipped.key, kv_heads * splits, query, key, value, end, position,
        by_column, (lse, grad, delta, *sums), (kv_heads * dim,), window, scale, SPLITS=splits,
    )  # fmt: skip
    key_grad, value_grad = (part.sum(0).to(key.dtype) for part in sums)
    return query_grad, key_grad, value_grad


def _launch(
    kernel: Any, tile: Tile, programs: int, query: Tensor, key: Tensor, value: Tensor, end: Tensor,
    position: Tensor | None, lists: BlockLists, tensors: tuple[Tensor, ...],
    more_strides: tuple[int, ...], window: int, scale: float, **constants: int,
) -> None:  # fmt: skip
    """One program for each list and head; nothing for no tokens."""
    size, heads, dim = query.shape
    if size == 0:
        return
    strides = tuple(stride for x in (query, key, value) for stride in x.stride()[:2])
    with torch.cuda.device_of(query):
        kernel[(len(lists.order), programs)](
            query, key, value, end, end if position is None else position, *lists, *tensors,
            size, lists.blocks.shape[1], *strides, heads * dim, *more_strides,
            scale * LOG2E, window, GROUP=heads // key.shape[1], D=dim,
            DIM=max(16, triton.next_power_of_2(dim)),
            ROWS=tile.rows, COLUMNS=tile.columns, WINDOWED=window != NO_WINDOW,
            PRECISION=precision(chip(query.device)), num_warps=tile.warps, num_stages=tile.stages,
            **constants,
        )  # fmt: skip
