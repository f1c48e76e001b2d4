"""What threads share: counters in memory."""

# mypy: ignore-errors

from __future__ import annotations

import os
import platform

from numba import types
from numba.extending import intrinsic

from elpo_fast.cpu.vectors import INDEX, WORD, Arrays, declared, ir

_PAUSE, _YIELD = ("llvm.x86.sse2.pause",), ("llvm.aarch64.hint", 1)
_HINTS = {"x86_64": _PAUSE, "amd64": _PAUSE, "aarch64": _YIELD, "arm64": _YIELD}


@intrinsic
def count(typing_context, counters, index, amount):
    """Add to `counters[index]`; what it was before."""

    def generate(context, builder, signature, args):
        pointer = Arrays(context, builder, signature, args).pointer(0, INDEX, args[1])
        return builder.atomic_rmw("add", pointer, args[2], "acq_rel")

    return types.int64(counters, types.int64, types.int64), generate


@intrinsic
def seen(typing_context, counters, index):
    """`counters[index]` now, and with it all that was written before it was counted up."""

    def generate(context, builder, signature, args):
        pointer = Arrays(context, builder, signature, args).pointer(0, INDEX, args[1])
        return builder.load_atomic(pointer, "acquire", 8, typ=INDEX)

    return types.int64(counters, index), generate


@intrinsic
def relax(typing_context):
    """Leave the core to its other thread for a moment."""

    def generate(context, builder, signature, args):
        hint = _HINTS.get(platform.machine().lower())
        if hint:
            name, *values = hint
            values = [WORD(value) for value in values]
            kinds = [value.type for value in values]
            builder.call(declared(builder, name, ir.VoidType(), *kinds), values)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typing_context):
    """Leave the core to another process that wants it, where there is one."""

    def generate(context, builder, signature, args):
        if os.name == "posix":
            builder.call(declared(builder, "sched_yield", WORD), [])
        return context.get_dummy_value()

    return types.void(), generate
