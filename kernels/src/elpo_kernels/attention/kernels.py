"""Tree attention in Triton: flash attention that visits the blocks of `BlockLists` only.

A program of the forward and of the queries' gradient holds a block of rows (queries) and walks its
column blocks (keys); a program of the keys' gradient holds columns and walks rows. Partial blocks
come first, full ones after them without a mask. Sums are float32, in a fixed order and without
atomics. Scores are kept in base 2: `lse` is log2 of the sum of `2^(score · log2 e)`.

Few key heads make few and long programs where every query sees the same prompt. Then the query
heads of a group are split over several programs, whose gradients are added afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from elpo_kernels.attention.blocks import NO_WINDOW, BlockLists
from elpo_kernels.attention.tiles import Tile, chip, precision, tiles

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
KEY_PROGRAMS = 16  # programs for each column block that are worth the memory of their sums


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
            dp = tl.dot(above, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - correction[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
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
                dp = tl.dot(v, tl.trans(above), input_precision=PRECISION)
                ds = p * (dp - correction[None, :])
                k_acc = tl.dot(ds.to(q.dtype), q, k_acc, input_precision=PRECISION)
            start, stop = stop, stop + last
    base = split.to(tl.int64) * size * sums_stride + kv_head * D
    k_acc *= scale * LN2
    _store(key_sums + base, k_acc, first, sums_stride, size, COLUMNS, D, DIM)
    _store(value_sums + base, v_acc, first, sums_stride, size, COLUMNS, D, DIM)


class Operands(NamedTuple):
    """What every kernel is given first."""

    query: Tensor  # [T, Hq, D]
    key: Tensor  # [T, Hkv, D]
    value: Tensor  # [T, Hkv, D]
    end: Tensor  # int32 [T]
    position: Tensor | None  # int32 [T]
    window: int
    scale: float


def forward(x: Operands, by_row: BlockLists) -> tuple[Tensor, Tensor]:
    """Output `[T, Hq, D]` and `lse` `[Hq, T]` for the row lists of `tiles().forward`."""
    size, heads, dim = x.query.shape
    out = torch.empty((size, heads, dim), dtype=x.query.dtype, device=x.query.device)
    lse = torch.empty((heads, size), dtype=torch.float32, device=x.query.device)
    tile = tiles(x.query.device, x.query.dtype, dim).forward
    _launch(forward_kernel, tile, heads, x, by_row, (out, lse))
    return out, lse


def backward(
    x: Operands, by_row: BlockLists, by_column: BlockLists, out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    size, heads, dim = x.query.shape
    kv_heads = x.key.shape[1]
    shipped = tiles(x.query.device, x.query.dtype, dim)
    grad = grad.contiguous()
    query_grad = torch.empty((size, heads, dim), dtype=x.query.dtype, device=x.query.device)
    delta = torch.empty_like(lse)
    results: tuple[Tensor, ...] = out, lse, grad, delta, query_grad
    _launch(query_gradient_kernel, shipped.query, heads, x, by_row, results)
    splits = max(1, min(heads // kv_heads, KEY_PROGRAMS // kv_heads))
    shape = splits, size, kv_heads, dim
    sums = [torch.empty(shape, dtype=torch.float32, device=x.key.device) for _ in range(2)]
    programs, results = kv_heads * splits, (lse, grad, delta, *sums)
    more = {"SPLITS": splits}
    _launch(
        key_gradient_kernel, shipped.key, programs, x, by_column, results, (kv_heads * dim,), more
    )
    key_grad, value_grad = (part.sum(0).to(x.key.dtype) for part in sums)
    return query_grad, key_grad, value_grad


def _launch(
    kernel: Any,
    tile: Tile,
    programs: int,
    x: Operands,
    lists: BlockLists,
    tensors: tuple[Tensor, ...],
    more_strides: tuple[int, ...] = (),
    constants: dict[str, int] | None = None,
) -> None:
    """One program for each list and head; nothing for no tokens."""
    query, key, value, end, position, window, scale = x
    size, heads, dim = query.shape
    if size == 0:
        return
    strides = tuple(stride for operand in x[:3] for stride in operand.stride()[:2])
    with torch.cuda.device_of(query):
        kernel[(len(lists.order), programs)](
            query, key, value, end, end if position is None else position, *lists, *tensors,
            size, lists.blocks.shape[1], *strides, heads * dim, *more_strides,
            scale * LOG2E, window, GROUP=heads // key.shape[1], D=dim,
            DIM=max(16, triton.next_power_of_2(dim)),
            ROWS=tile.rows, COLUMNS=tile.columns, WINDOWED=window != NO_WINDOW,
            PRECISION=precision(chip(query.device)), num_warps=tile.warps, num_stages=tile.stages,
            **(constants or {}),
        )  # fmt: skip
