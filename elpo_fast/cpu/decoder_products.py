"""Products of a few rows with a packed weight, tile by tile in registers.

Two bfloat16 numbers lie in a word and are widened by a shift and a mask, or, where the processor
has instructions for it, multiplied as they are. `decoder_step` says what they bring.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from elpo_fast.cpu.vectors import (
    FEATURES,
    FLOAT,
    INDEX,
    LANES,
    PANEL,
    TILE_SIZES,
    Arrays,
    broadcast,
    constant,
    of_size,
)

DOTS = bool(FEATURES.get("avx512bf16"))  # whether it adds up pairs of bfloat16 products


def multiplies(dtype: torch.dtype) -> bool:
    """Whether `forward` is the fast way to multiply numbers of this kind: not bfloat16 where there
    are instructions for whole tiles of it, or none at all."""
    bfloat16 = dtype == torch.bfloat16 and DOTS and not torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 or bfloat16


def _tile_function(module, rows, x_type, weight_type):
    """`out [rows, PANEL] = x [rows, 2 pairs] @ w`, for `x` with rows `stride` numbers apart; sums
    in the order of the columns, whatever the number of rows."""
    name = f"tile_{rows}_{x_type}_{weight_type}"
    if name in module.globals:
        return module.globals[name]
    address, lanes = ir.PointerType(), LANES
    vector, whole = ir.VectorType(FLOAT, lanes), ir.VectorType(ir.IntType(32), lanes)
    kind = ir.FunctionType(ir.VoidType(), [address, INDEX, address, INDEX, address])
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block())
    x, stride, w, pairs, out = function.args
    dots = x_type == types.uint16
    number = ir.IntType(16) if dots else FLOAT
    inputs = [vector, whole, whole] if dots else [vector] * 3
    add = cgutils.get_or_insert_function(
        module,
        ir.FunctionType(vector, inputs),
        "llvm.x86.avx512bf16.dpbf16ps.512" if dots else f"llvm.fma.v{lanes}f32",
    )
    parts = range(0, PANEL, lanes)
    sums = [[cgutils.alloca_once(b, vector) for _ in parts] for _ in range(rows)]
    for cells in sums:
        for cell in cells:
            b.store(constant(0.0, vector), cell)
    lines = [b.gep(x, [b.mul(stride, INDEX(r))], source_etype=number) for r in range(rows)]

    def load(start, kind):
        pointers = (b.gep(w, [b.add(start, INDEX(i))], source_etype=kind.element) for i in parts)
        return [b.load(pointer, typ=kind, align=4) for pointer in pointers]

    with cgutils.for_range(b, pairs, intp=INDEX) as loop:
        column = b.mul(loop.index, INDEX(2))
        start = b.mul(column, INDEX(PANEL))
        if weight_type == types.float32:
            columns = load(start, vector), load(b.add(start, INDEX(PANEL)), vector)
        else:  # a word holds one column's number in its low half, the next one's in its high
            words = load(b.mul(loop.index, INDEX(PANEL)), whole)
            columns = (
                [b.bitcast(b.shl(bits, constant(16, whole)), vector) for bits in words],
                [b.bitcast(b.and_(bits, constant(-1 << 16, whole)), vector) for bits in words],
            )
        for i, weights in enumerate([words] if dots else columns):
            for line, cells in zip(lines, sums, strict=True):
                pointer = b.gep(line, [b.add(column, INDEX(i))], source_etype=number)
                if dots:
                    pair = broadcast(b, b.load(pointer, typ=ir.IntType(32), align=2), whole)
                else:
                    pair = broadcast(b, b.load(pointer, typ=FLOAT, align=4), vector)
                for cell, weight in zip(cells, weights, strict=True):
                    total = b.load(cell)
                    values = [total, pair, weight] if dots else [pair, weight, total]
                    b.store(b.call(add, values), cell)
    for r, cells in enumerate(sums):
        for i, cell in zip(parts, cells, strict=True):
            pointer = b.gep(out, [INDEX(r * PANEL + i)], source_etype=FLOAT)
            b.store(b.load(cell), b.bitcast(pointer, vector.as_pointer()), align=4)
    b.ret_void()
    return function


@intrinsic
def multiply_tile(typing_context, x, first, rows, weight, panel, out):
    """`out[:rows] = x[first : first + rows] @` one panel of a packed weight.

    `x` float32, or bfloat16 if the weight is and the processor `DOTS` them; with an even number of
    columns. `rows` from 1 to `TILE_ROWS`; 2, 4, 8 or `TILE_ROWS` are computed, so `x` and `out`
    have `TILE_ROWS` from `first` on.
    """

    def generate(context, builder, signature, args):
        b, a = builder, Arrays(context, builder, signature, args)
        _, first, rows, _, panel, _ = args
        narrow = weight.dtype == types.uint32
        width = a.size(0, 1)
        size = b.mul(a.size(3, 1), INDEX(PANEL))
        pairs = a.size(3, 1) if narrow else b.udiv(a.size(3, 1), INDEX(2))
        number = ir.IntType(16) if x.dtype == types.uint16 else FLOAT
        values = (
            a.pointer(0, number, b.mul(first, width)),
            width,
            a.pointer(3, ir.IntType(32) if narrow else FLOAT, b.mul(panel, size)),
            pairs,
            a.arrays[5].data,
        )

        def call(size):
            b.call(_tile_function(b.module, size, x.dtype, weight.dtype), values)

        of_size(b, rows, TILE_SIZES, call)
        return context.get_dummy_value()

    return types.void(x, first, rows, weight, panel, out), generate
