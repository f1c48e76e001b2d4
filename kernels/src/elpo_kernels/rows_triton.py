"""Triton kernels over rows of logits, one program a row: the arithmetic of `rows` and of
`linear.torch_tiles`.

A row's logits z arrive raw, in any floating dtype, and become base-2 levels in float32,

    L_v = scale · softcap(z_v + bias_v) + offset,

with `scale` and `offset` of the row. Columns beyond the tile read as −inf and are never written.
Tokens lie on grid axis 0, the only one without a small limit. Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 2048, 8


@triton.jit
def _level(z, scale, offset, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """L and the soft cap's derivative."""
    cap_grad = 1.0
    if SOFTCAP != 0:
        decay = tl.exp2(-2.8853900817779268 * tl.abs(z) / SOFTCAP)  # e^(−2|z|/cap)
        size = (1 - decay) / (1 + decay)
        cap_grad = 1 - size * size
        z = tl.where(z < 0, -SOFTCAP, SOFTCAP) * size
    return z * scale + offset, cap_grad


@triton.jit
def _load(logits, bias, at, first, columns, HAS_BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = at < columns
    z = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + first + at, mask=inside, other=0.0)
    return z, inside


@triton.jit
def target_kernel(  # type: ignore[no-untyped-def]
    x,  # [R, width]
    weight,  # [vocabulary, width]
    bias,  # [vocabulary]
    target,  # [R] token
    column,  # [R] out: where the target lies in this shard, -1 where it does not
    raw,  # [R] the target's logit, added to; 0 where it is in another shard
    logit,  # [R] the same with the bias
    shard,  # the first token of this shard
    vocabulary,
    width,
    x_stride,
    weight_stride,
    width_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    here = tl.load(target + row).to(tl.int64) - shard
    mine = (here >= 0) & (here < vocabulary)
    tl.store(column + row, tl.where(mine, here, -1))
    if mine:
        total = 0.0
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < width
            a = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(
                weight + here * weight_stride + at.to(tl.int64) * width_stride,
                mask=inside,
                other=0.0,
            )
            total += tl.sum(a * b.to(tl.float32), 0)
        tl.store(raw + row, tl.load(raw + row) + total)
        if HAS_BIAS:
            total += tl.load(bias + here)
        tl.store(logit + row, tl.load(logit + row) + total)


@triton.jit
def move_kernel(  # type: ignore[no-untyped-def]
    values,  # [., columns], updated
    source,  # [R] row r becomes row source[r], which does not change
    columns,
    stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    origin = tl.load(source + row)
    if origin != row:
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < columns
            value = tl.load(values + origin * stride + at, mask=inside)
            tl.store(values + row * stride + at, value, mask=inside)


@triton.jit
def sums_kernel(  # type: ignore[no-untyped-def]
    logits,  # [., columns]
    index,  # [R] row of `logits` that program r works on
    bias,  # [V]
    scale,  # [R]
    offset,  # [R]
    target,  # [R] column of the target in the vocabulary, -1 where it is not in this shard
    top,  # [R] running maximum of L, updated
    total,  # [R] running Σ 2^(L − top) without the target, updated
    moment,  # [R] running Σ 2^(L − top) · (L − top) without the target, updated
    first,  # the tile's first column in the vocabulary
    columns,
    stride,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row).to(tl.int64)
    row_scale, row_offset = tl.load(scale + row), tl.load(offset + row)
    skip = tl.load(target + row) - first
    m, s, e = tl.load(top + row), tl.load(total + row), tl.load(moment + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z, inside = _load(logits + source * stride, bias, at, first, columns, HAS_BIAS)
        level, _ = _level(z, row_scale, row_offset, SOFTCAP)
        level = tl.where(inside, tl.where(at == skip, float("-inf"), level), float("-inf"))
        higher = tl.maximum(m, tl.max(level, 0))
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        shift = tl.where(m == float("-inf"), 0.0, m - origin)
        power = tl.exp2(level - origin)
        fade = tl.exp2(shift)
        if ENTROPY:
            part = tl.where(power == 0, 0.0, power * (level - origin))
            e = fade * (e + shift * s) + tl.sum(part, 0)
        s = fade * s + tl.sum(power, 0)
        m = higher
    tl.store(top + row, m)
    tl.store(total + row, s)
    tl.store(moment + row, e)


@triton.jit
def powers_kernel(  # type: ignore[no-untyped-def]
    logits,  # [R, columns]
    bias,  # [V]
    scale,  # [R]
    offset,  # [R]
    target,  # [R]
    out,  # [., V] row position[r] receives row r
    position,  # [R]
    total,  # [R] running Σ 2^L without the target, updated
    moment,  # [R] running Σ 2^L · L without the target, updated
    first,  # the tile's first column in the vocabulary
    columns,
    stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_scale, row_offset = tl.load(scale + row), tl.load(offset + row)
    skip = tl.load(target + row) - first
    place = out + tl.load(position + row).to(tl.int64) * out_stride + first
    s, e = tl.load(total + row), tl.load(moment + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z, inside = _load(logits + row * stride, bias, at, first, columns, HAS_BIAS)
        level, cap_grad = _level(z, row_scale, row_offset, SOFTCAP)
        level = tl.where(inside, tl.where(at == skip, float("-inf"), level), float("-inf"))
        power = tl.exp2(level)
        s += tl.sum(power, 0)
        if ENTROPY:
            e += tl.sum(tl.where(power == 0, 0.0, power * level), 0)
        if SOFTCAP != 0:
            power *= cap_grad
        tl.store(place + at, power.to(out.dtype.element_ty), mask=inside)
    tl.store(total + row, s)
    tl.store(moment + row, e)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits,  # [., columns]
    index,  # [R] row of `logits` that program r works on
    bias,  # [V]
    scale,  # [R]
    offset,  # [R]
    target,  # [R]
    alpha,  # [R]
    beta,  # [R]
    at_target,  # [R]
    out,  # [., columns] written at the same rows; may be `logits`
    first,  # the tile's first column in the vocabulary
    columns,
    stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """2^L · (α + β ln 2^L), `at_target` at the target, times the soft cap's derivative."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row).to(tl.int64)
    row_scale, row_offset = tl.load(scale + row), tl.load(offset + row)
    skip = tl.load(target + row) - first
    a, peak = tl.load(alpha + row), tl.load(at_target + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z, inside = _load(logits + source * stride, bias, at, first, columns, HAS_BIAS)
        level, cap_grad = _level(z, row_scale, row_offset, SOFTCAP)
        power = tl.exp2(level)
        factor = power * a
        if ENTROPY:
            log = level * 0.6931471805599453
            factor += tl.where(power == 0, 0.0, power * log) * tl.load(beta + row)
        value = tl.where(at == skip, peak, factor)
        if SOFTCAP != 0:
            value *= cap_grad
        tl.store(out + source * out_stride + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def with_entropy_kernel(  # type: ignore[no-untyped-def]
    kept,  # [R, columns], updated
    alpha,  # [R]
    beta,  # [R]
    columns,
    stride,
    BLOCK: tl.constexpr,
):
    """E ← E · (α + β ln E)."""
    row = tl.program_id(0).to(tl.int64)
    a, b = tl.load(alpha + row), tl.load(beta + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        place = kept + row * stride + at
        power = tl.load(place, mask=at < columns, other=0.0).to(tl.float32)
        log = tl.log2(tl.maximum(power, 1.1754943508222875e-38)) * 0.6931471805599453
        value = power * (a + b * log)
        tl.store(place, value.to(kept.dtype.element_ty), mask=at < columns)


def launch(kernel: Any, rows: int, *arguments: Any, **constants: Any) -> None:
    """One program a row; nothing for no rows."""
    if rows:
        with torch.cuda.device_of(arguments[0]):
            kernel[(rows,)](*arguments, **constants, BLOCK=BLOCK, num_warps=WARPS)


@triton.jit
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """values · factor in place; nothing is read or written where the factor is 1."""
    by = tl.load(factor).to(tl.float32)
    if by != 1:
        first, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, count, step):
            at = start + tl.arange(0, BLOCK)
            inside = at < count
            value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32) * by
            tl.store(values + at, value.to(values.dtype.element_ty), mask=inside)


def scale_in_place(values: torch.Tensor, factor: torch.Tensor) -> None:
    """`values`, contiguous, times `factor` `[]`, see `scale_kernel`."""
    programs = min(triton.cdiv(values.numel(), BLOCK), 2048)
    if programs:
        with torch.cuda.device_of(values):
            scale_kernel[(programs,)](values, factor, values.numel(), BLOCK=BLOCK, num_warps=WARPS)
