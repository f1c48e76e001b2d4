"""What threads share: counters in memory, and a pool of them that each process has for itself."""

# mypy: ignore-errors

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
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


def on_threads(threads, kernel, *arguments):
    """`kernel(counter, *arguments)` on so many threads at once, each of which takes what work there
    is left, by `counter`, zeros `[2]`.

    Python's threads, because Numba's own may not be called by several at once everywhere.
    """
    counter = np.zeros(2, np.int64)
    others = range(threads - 1)
    calls = [_pool(os.getpid(), threads).submit(kernel, counter, *arguments) for _ in others]
    kernel(counter, *arguments)
    for call in calls:
        call.result()


@cache
def _pool(process, threads):
    """Threads do not survive a fork: each process has its own."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="elpo-cpu")
