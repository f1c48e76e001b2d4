"""Vector instructions, emitted through LLVM where the compiler does not find them itself.

A compiler does not vectorise a dot product of 64 numbers well, nor a sum that leaves some out, nor
does it keep a tile of a matrix product in registers.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils

LANES = 16  # numbers of a vector
FEATURES = get_host_cpu_features()

# A tile of a product fills the registers: with AVX-512 28 of 32 hold sums, elsewhere 12 of 16.
TILE_ROWS, PANEL = (14, 32) if FEATURES.get("avx512f") else (6, 16)
TILE_SIZES = tuple(sorted(size for size in {2, 4, 8, TILE_ROWS} if size <= TILE_ROWS))

FLOAT, WORD, INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FAST = ("fast",)
LOWEST = np.float32(-3e38)  # where no infinities are expected
_POLYNOMIAL = (1.5353359e-4, 1.3398875e-3, 9.6184374e-3, 5.5503323e-2, 2.4022648e-1, 0.6931472, 1.0)


def single(value):
    """The nearest float32: LLVM takes no other constant as one."""
    return float(np.float32(value))


def constant(value, kind):
    """`value` in every lane."""
    if kind.element == FLOAT:
        value = single(value)
    return ir.Constant(kind, [value] * kind.count)


def declared(builder, name, result, *arguments):
    """A function of that name, of LLVM or the C library."""
    kind = ir.FunctionType(result, arguments)
    return cgutils.get_or_insert_function(builder.module, kind, name)


def permuted(builder, x, lanes, other=None):
    """Lane `i` becomes lane `lanes[i]` of `x` followed by `other`."""
    mask = ir.Constant(ir.VectorType(WORD, len(lanes)), list(lanes))
    return builder.shuffle_vector(x, x if other is None else other, mask)


def broadcast(builder, number, kind):
    """A vector of `kind` with `number` in every lane."""
    first = builder.insert_element(constant(0, kind), number, WORD(0))
    return permuted(builder, first, [0] * kind.count)


def larger(builder, x, y):
    return builder.select(builder.fcmp_ordered(">", x, y, flags=FAST), x, y)


def fast_exponential(builder, z):
    """e^z for z <= 0, of a number or a vector; relative error 1e-7 (1 + |z|)."""
    kind = z.type
    many = isinstance(kind, ir.VectorType)
    whole = ir.VectorType(WORD, kind.count) if many else WORD

    def number(value, kind=kind):
        return constant(value, kind) if many else kind(value)

    b = builder
    bounded = b.select(b.fcmp_ordered(">", z, number(-87.0), flags=FAST), z, number(-87.0))
    t = b.fmul(bounded, number(single(1.44269504)), flags=FAST)
    rint = declared(b, f"llvm.rint.{f'v{kind.count}f32' if many else 'f32'}", kind, kind)
    n = b.call(rint, [t], fastmath=FAST)
    f = b.fsub(t, n, flags=FAST)
    p = number(single(_POLYNOMIAL[0]))
    for coefficient in _POLYNOMIAL[1:]:
        p = b.fadd(b.fmul(p, f, flags=FAST), number(single(coefficient)), flags=FAST)
    power = b.shl(b.add(b.fptosi(n, whole), number(127, whole)), number(23, whole))
    return b.fmul(p, b.bitcast(power, kind), flags=FAST)


def of_size(builder, rows, sizes, call):
    """`call(size)` for the smallest of `sizes` that has room for `rows`."""
    end = builder.append_basic_block()
    switch = builder.switch(rows, end)
    for fewer, size in zip((0, *sizes), sizes, strict=False):
        block = builder.append_basic_block()
        for count in range(fewer + 1, size + 1):
            switch.add_case(INDEX(count), block)
        with builder.goto_block(block):
            call(size)
            builder.branch(end)
    builder.position_at_end(end)


class Arrays:
    """Array arguments of an intrinsic, and how to address what is in them."""

    def __init__(self, context, builder, signature, args) -> None:
        self.builder = builder
        self.arrays = [
            context.make_array(kind)(context, builder, value=value)
            if isinstance(kind, types.Array)
            else None
            for kind, value in zip(signature.args, args, strict=True)
        ]

    def size(self, array: int, axis: int):
        return self.builder.extract_value(self.arrays[array].shape, axis)

    def element(self, array: int, row, column, scale: int):
        """Index of the first of `scale` numbers at `[row, column]` of an array of two axes."""
        b = self.builder
        return b.mul(b.add(b.mul(row, self.size(array, 1)), column), INDEX(scale))

    def pointer(self, array: int, kind, *index):
        offset = index[0] if len(index) == 1 else self.builder.add(*index)
        return self.builder.gep(self.arrays[array].data, [offset], source_etype=kind)

    def scalar(self, array: int, kind, index):
        return self.builder.load(self.pointer(array, kind, index), typ=kind)

    def vectors(self, array: int, start, width: int, lanes: int, dtype) -> list:
        """`width` numbers from `start` on, as fp32 vectors."""
        b = self.builder
        narrow = dtype == types.uint16
        kind = ir.IntType(16) if narrow else FLOAT
        loaded = []
        for i in range(0, width, lanes):
            pointer = self.pointer(array, kind, start, INDEX(i))
            x = b.load(pointer, typ=ir.VectorType(kind, lanes), align=2 if narrow else 4)
            if narrow:
                bits = ir.VectorType(WORD, lanes)
                x = b.shl(b.zext(x, bits), constant(16, bits))
                x = b.bitcast(x, ir.VectorType(FLOAT, lanes))
            loaded.append(x)
        return loaded

    def store(self, vector, array: int, dtype, *index) -> None:
        """fp32 numbers at `index`, rounded to nearest even where the array is of bfloat16."""
        b, lanes = self.builder, vector.type.count
        if dtype == types.uint16:
            bits = ir.VectorType(WORD, lanes)
            x = b.bitcast(vector, bits)
            odd = b.and_(b.lshr(x, constant(16, bits)), constant(1, bits))
            x = b.lshr(b.add(x, b.add(odd, constant(0x7FFF, bits))), constant(16, bits))
            vector = b.trunc(x, ir.VectorType(ir.IntType(16), lanes))
        pointer = self.pointer(array, vector.type.element, *index)
        b.store(vector, b.bitcast(pointer, vector.type.as_pointer()), align=2)
