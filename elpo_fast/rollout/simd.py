"""Numba building blocks of the CPU kernels: bfloat16, exponentials, and vector code for attention.

bfloat16 arrays come in as `uint16` and are widened in registers; all arithmetic is fp32. A compiler
does not vectorise a dot product of 64 numbers well, and attention is made of them, so `scores` and
`weighted_sum` emit their vector instructions themselves. They take the sizes of a head from the
element types of their arrays, `query_heads(group, width)` and `head(dtype, width)`, so that every
loop over a head is unrolled.
"""

# Kernels are typed by their compilation, for each dtype they are called with.
# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from math import gcd

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

OPTIONS = {"cache": True, "fastmath": True, "error_model": "numpy", "nogil": True}
LOWEST = np.float32(-3e38)  # fastmath knows no infinities

_FLOAT, _INDEX = ir.FloatType(), ir.IntType(64)
_FAST = ("fast",)


@cache
def head(dtype: np.dtype, width: int) -> np.dtype:
    """Element type of key and value arrays: one head of one token."""
    return np.dtype([("x", dtype, (width,))])


@cache
def query_heads(group: int, width: int) -> np.dtype:
    """Element type of query arrays: the `group` query heads that share one key head."""
    return np.dtype([("x", np.float32, (group, width))])


@intrinsic
def _to_float(typing_context, bits):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
def _to_bits(typing_context, value):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


def widen(x):
    """float32 of an array element, which is float32 or a bfloat16 in a uint16."""


@overload(widen, inline="always")
def _widen(x):
    if x == types.uint16:
        return lambda x: _to_float(np.uint32(x) << np.uint32(16))
    return lambda x: x


def narrow(value, like):
    """`value` (float32) as an element of the array `like`, rounded to nearest even."""


@overload(narrow, inline="always")
def _narrow(value, like):
    if like.dtype == types.uint16:

        def to_bfloat16(value, like):
            bits = _to_bits(np.float32(value))
            bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            return np.uint16(bits >> np.uint32(16))

        return to_bfloat16
    return lambda value, like: value


@njit(inline="always", **OPTIONS)
def exp(z):
    """e^z for z <= 0, as a polynomial that vectorises; relative error 5e-8 (1 + |z|)."""
    t = max(z, np.float32(-87.0)) * np.float32(1.44269504)
    n = np.rint(t)
    f = t - n
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    return p * _to_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


class _Shapes:
    """Array arguments of an intrinsic, and how to address a head of one of them."""

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
        return b.mul(b.add(b.mul(row, self.size(array, 1)), column), _INDEX(scale))

    def pointer(self, array: int, kind, *index):
        b = self.builder
        offset = index[0] if len(index) == 1 else b.add(*index)
        return b.gep(self.arrays[array].data, [offset], source_etype=kind)

    def scalar(self, array: int, kind, index):
        return self.builder.load(self.pointer(array, kind, index), typ=kind)

    def vectors(self, array: int, start, width: int, lanes: int, dtype) -> list:
        """`width` numbers from `start` on, as fp32 vectors."""
        b = self.builder
        narrow = dtype == types.uint16
        kind = ir.IntType(16) if narrow else _FLOAT
        loaded = []
        for i in range(0, width, lanes):
            pointer = self.pointer(array, kind, start, _INDEX(i))
            x = b.load(pointer, typ=ir.VectorType(kind, lanes), align=2 if narrow else 4)
            if narrow:
                bits = ir.VectorType(ir.IntType(32), lanes)
                x = b.shl(b.zext(x, bits), ir.Constant(bits, [16] * lanes))
                x = b.bitcast(x, ir.VectorType(_FLOAT, lanes))
            loaded.append(x)
        return loaded


def _sizes(queries, keys):
    group, width = queries.dtype.fields["x"].type.shape
    return group, width, gcd(width, 16), keys.dtype.fields["x"].type.dtype


@intrinsic
def scores(typing_context, queries, row, head, keys, path, out):
    """`out[g, t] = queries[row, head].x[g] . keys[path[t], head].x`, `out` `[group, len(path)]`."""
    group, width, lanes, dtype = _sizes(queries, keys)

    def generate(context, builder, signature, args):
        b, a = builder, _Shapes(context, builder, signature, args)
        _, row, head, _, _, _ = args
        length = a.size(4, 0)
        vector = ir.VectorType(_FLOAT, lanes)
        add_up = cgutils.get_or_insert_function(
            b.module,
            ir.FunctionType(_FLOAT, [_FLOAT, vector]),
            f"llvm.vector.reduce.fadd.v{lanes}f32",
        )
        start = a.element(0, row, head, group * width)
        query = a.vectors(0, start, group * width, lanes, types.float32)
        with cgutils.for_range(b, length, intp=_INDEX) as loop:
            slot = a.scalar(4, _INDEX, loop.index)
            key = a.vectors(3, a.element(3, slot, head, width), width, lanes, dtype)
            for g in range(group):
                total = ir.Constant(vector, [0.0] * lanes)
                for i, x in enumerate(key):
                    product = b.fmul(query[g * len(key) + i], x, flags=_FAST)
                    total = b.fadd(total, product, flags=_FAST)
                score = b.call(add_up, [_FLOAT(0.0), total], fastmath=_FAST)
                b.store(score, a.pointer(5, _FLOAT, b.mul(_INDEX(g), length), loop.index))
        return context.get_dummy_value()

    return types.void(queries, row, head, keys, path, out), generate


@intrinsic
def weighted_sum(typing_context, weights, queries, head, values, path, out):
    """`out[g] = sum_t weights[g, t] values[path[t], head].x`, `out` `[group, width]`.

    `queries` only tells the sizes.
    """
    group, width, lanes, dtype = _sizes(queries, values)

    def generate(context, builder, signature, args):
        b, a = builder, _Shapes(context, builder, signature, args)
        head = args[2]
        length = a.size(4, 0)
        vector = ir.VectorType(_FLOAT, lanes)
        zero = ir.Constant(vector, [0.0] * lanes)
        first_lane = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        sums = [cgutils.alloca_once(b, vector) for _ in range(group * width // lanes)]
        for s in sums:
            b.store(zero, s)
        with cgutils.for_range(b, length, intp=_INDEX) as loop:
            slot = a.scalar(4, _INDEX, loop.index)
            value = a.vectors(3, a.element(3, slot, head, width), width, lanes, dtype)
            for g in range(group):
                weight = a.scalar(0, _FLOAT, b.add(b.mul(_INDEX(g), length), loop.index))
                weight = b.insert_element(zero, weight, ir.IntType(32)(0))
                weight = b.shuffle_vector(weight, zero, first_lane)
                for i, x in enumerate(value):
                    s = sums[g * len(value) + i]
                    product = b.fmul(weight, x, flags=_FAST)
                    b.store(b.fadd(b.load(s), product, flags=_FAST), s)
        for i, s in enumerate(sums):
            target = a.pointer(5, _FLOAT, _INDEX(i * lanes))
            b.store(b.load(s), b.bitcast(target, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(weights, queries, head, values, path, out), generate
