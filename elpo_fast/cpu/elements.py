"""Single numbers in kernels: bfloat16 kept in a `uint16`, computed with in float32; e^z."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from elpo_fast.cpu.vectors import fast_exponential


@intrinsic
def to_float(typing_context, bits):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
def to_bits(typing_context, value):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


def widen(x):
    """float32 of an array element, which is float32 or a bfloat16 in a uint16."""


@overload(widen, inline="always")
def _widen(x):
    if x == types.uint16:
        return lambda x: to_float(np.uint32(x) << np.uint32(16))
    return lambda x: x


def narrow(value, like):
    """`value` (float32) as an element of the array `like`, rounded to nearest even."""


@overload(narrow, inline="always")
def _narrow(value, like):
    if like.dtype == types.uint16:

        def to_bfloat16(value, like):
            bits = to_bits(np.float32(value))
            bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            return np.uint16(bits >> np.uint32(16))

        return to_bfloat16
    return lambda value, like: value


@intrinsic
def exp(typing_context, z):
    """e^z for z <= 0, which vectorises."""

    def generate(context, builder, signature, args):
        return fast_exponential(builder, args[0])

    return types.float32(types.float32), generate
