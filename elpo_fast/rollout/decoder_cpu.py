"""The CPU's kernels, by Numba: a whole step of the decoder, its operations one by one, sampling.

`decoder_torch` and `sampling.sample` are the same in plain PyTorch and define what these must
compute. bfloat16 arrays come in as `uint16` and are widened in registers; all arithmetic is fp32,
sums over the vocabulary end in fp64.

`forward` is one parallel region: waking a thread costs 50 to 100 us, a step has hundreds of
operations. Its threads meet in a counter for each operation, from which they claim parts of it and
in which they report them; whoever finds none left waits until all are reported. A thread that
comes late, or never, costs time but nothing else.

A compiler does not vectorise a dot product of 64 numbers well, nor a sum that leaves some out, nor
does it keep a tile of a matrix product in registers, so `_attend`, `_mass` and `_tile` emit their
vector instructions themselves. `_attend` takes the sizes of a head from the element types of its
arrays, `query_heads(group, width)` and `head(dtype, width)`, so that every loop over a head is
unrolled.

One module, because Numba's cache on disk notices changes of a kernel's own file alone.
"""

# Kernels are typed by their compilation, for each dtype they are called with.
# mypy: ignore-errors

from __future__ import annotations

import os
import platform
from collections import namedtuple
from functools import cache
from math import gcd

import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

_OPTIONS = {"cache": True, "fastmath": True, "error_model": "numpy", "nogil": True}
_LOWEST = np.float32(-3e38)  # fastmath knows no infinities
_EXPONENT = 0x7F800000  # an infinity's or NaN's bits; fastmath knows neither
_BINS, _BINS_PER_NAT = 2048, 64  # histogram of log-probabilities for top-k and top-p
_BLOCK = 256  # tokens of the vocabulary summed in fp32
_LANES = 16  # logits of a vector
_AHEAD = 2  # blocks of tokens between prefetching and use

# A tile of a product fills the registers: with AVX-512 28 of 32 hold sums, elsewhere 12 of 16.
_FEATURES = get_host_cpu_features()
TILE_ROWS, PANEL = (14, 32) if _FEATURES.get("avx512f") else (6, 16)
DOTS = bool(_FEATURES.get("avx512bf16"))  # whether it adds up pairs of bfloat16 products
COUNTER = 16  # numbers of a counter, on cache lines of its own: parts claimed, and parts done
_SPINS = 4096  # looks at a counter before other processes are let in
_PAUSE, _YIELD = ("llvm.x86.sse2.pause",), ("llvm.aarch64.hint", 1)
_HINTS = {"x86_64": _PAUSE, "amd64": _PAUSE, "aarch64": _YIELD, "arm64": _YIELD}
_STORE, _ADD, _SILU = range(3)
OPERATIONS = 8  # of a layer

_FLOAT, _INDEX = ir.FloatType(), ir.IntType(64)
_FAST = ("fast",)
_POLYNOMIAL = (1.5353359e-4, 1.3398875e-3, 9.6184374e-3, 5.5503323e-2, 2.4022648e-1, 0.6931472, 1.0)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether `forward` is the fast way to multiply numbers of this kind: not bfloat16 where there
    are instructions for whole tiles of it, or none at all."""
    bfloat16 = dtype == torch.bfloat16 and DOTS and not torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 or bfloat16


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


@intrinsic
def _count(typing_context, counters, index, amount):
    """Add to `counters[index]`; what it was before."""

    def generate(context, builder, signature, args):
        pointer = _Shapes(context, builder, signature, args).pointer(0, _INDEX, args[1])
        return builder.atomic_rmw("add", pointer, args[2], "acq_rel")

    return types.int64(counters, index, types.int64), generate


@intrinsic
def _seen(typing_context, counters, index):
    """`counters[index]` now, and with it all that was written before it was counted up."""

    def generate(context, builder, signature, args):
        pointer = _Shapes(context, builder, signature, args).pointer(0, _INDEX, args[1])
        return builder.load_atomic(pointer, "acquire", 8, typ=_INDEX)

    return types.int64(counters, index), generate


@intrinsic
def _relax(typing_context):
    """Leave the core to its other thread for a moment."""

    def generate(context, builder, signature, args):
        hint = _HINTS.get(platform.machine().lower())
        if hint:
            name, *values = hint
            values = [ir.IntType(32)(value) for value in values]
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(function, values)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _give_way(typing_context):
    """Leave the core to another process that wants it, where there is one."""

    def generate(context, builder, signature, args):
        if os.name == "posix":
            kind = ir.FunctionType(ir.IntType(32), [])
            function = cgutils.get_or_insert_function(builder.module, kind, "sched_yield")
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


def _exponential(builder, z):
    """e^z for z <= 0, of a number or a vector, by a minimax polynomial; relative error
    1e-7 (1 + |z|)."""
    kind = z.type
    many = isinstance(kind, ir.VectorType)
    whole = ir.VectorType(ir.IntType(32), kind.count) if many else ir.IntType(32)

    def number(value, kind=kind):
        return _vector(kind, value) if many else kind(value)

    b = builder
    bounded = b.select(b.fcmp_ordered(">", z, number(-87.0), flags=_FAST), z, number(-87.0))
    t = b.fmul(bounded, number(_single(1.44269504)), flags=_FAST)
    suffix = f"v{kind.count}f32" if many else "f32"
    rint = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(kind, [kind]), f"llvm.rint.{suffix}"
    )
    n = b.call(rint, [t], fastmath=_FAST)
    f = b.fsub(t, n, flags=_FAST)
    p = number(_single(_POLYNOMIAL[0]))
    for coefficient in _POLYNOMIAL[1:]:
        p = b.fadd(b.fmul(p, f, flags=_FAST), number(_single(coefficient)), flags=_FAST)
    power = b.shl(b.add(b.fptosi(n, whole), number(127, whole)), number(23, whole))
    return b.fmul(p, b.bitcast(power, kind), flags=_FAST)


@intrinsic
def exp(typing_context, z):
    """`_exponential` of one number, which vectorises."""

    def generate(context, builder, signature, args):
        return _exponential(builder, args[0])

    return types.float32(types.float32), generate


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

    def store(self, vector, array: int, dtype, *index) -> None:
        """fp32 numbers at `index`, rounded to nearest even where the array is of bfloat16."""
        b, lanes = self.builder, vector.type.count
        if dtype == types.uint16:
            bits = ir.VectorType(ir.IntType(32), lanes)
            x = b.bitcast(vector, bits)
            odd = b.and_(b.lshr(x, _vector(bits, 16)), _vector(bits, 1))
            x = b.lshr(b.add(x, b.add(odd, _vector(bits, 0x7FFF))), _vector(bits, 16))
            vector = b.trunc(x, ir.VectorType(ir.IntType(16), lanes))
        pointer = self.pointer(array, vector.type.element, *index)
        b.store(vector, b.bitcast(pointer, vector.type.as_pointer()), align=2)


def _vector(kind, value):
    return ir.Constant(kind, [value] * kind.count)


def _spread(builder, number, kind):
    """A vector of `kind` with `number` in every lane."""
    first = builder.insert_element(_vector(kind, 0), number, ir.IntType(32)(0))
    return _permuted(builder, first, [0] * kind.count)


def _permuted(builder, x, lanes, other=None):
    """Lane `i` becomes lane `lanes[i]` of `x` followed by `other`."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(x, x if other is None else other, mask)


def _sums(builder, vectors):
    """The sum of each of `lanes` vectors of `lanes` numbers, as one vector.

    Halves of two vectors are added into one until one is left: 15 additions for 16 sums. Sum `i`
    comes out in lane `_lane(i, lanes)`, so that vectors next to each other are added first and few
    are alive at a time.
    """
    half = len(vectors) // 2
    while half:
        lanes = range(vectors[0].type.count)
        count = len(lanes)
        pairs = []
        for x, y in zip(vectors[::2], vectors[1::2], strict=True):
            stay = [i if i % (2 * half) < half else count + i for i in lanes]
            cross = [i + half if i % (2 * half) < half else count + i - half for i in lanes]
            pairs.append(
                builder.fadd(
                    _permuted(builder, x, stay, y), _permuted(builder, x, cross, y), flags=_FAST
                )
            )
        vectors, half = pairs, half // 2
    return vectors[0]


def _lane(i, lanes):
    """`i` with its bits reversed."""
    return int(f"{i:0{lanes.bit_length() - 1}b}"[::-1], 2) if lanes > 1 else 0


def _sizes(queries, keys):
    group, width = queries.dtype.fields["x"].type.shape
    return group, width, gcd(width, 16), keys.dtype.fields["x"].type.dtype


@register_jitable
def block_sizes(group, width):
    """Tokens of a block of `_attend`, and room for its scores."""
    lanes = gcd(width, 16)
    room = lanes * -(-group // lanes)
    return room // group, room


@intrinsic
def _attend(typing_context, queries, row, head, keys, values, path, scores, out, start):
    """`out[row, start:]`: attention of `queries[row, head]` over the slots `path`.

    Goes twice over blocks of as many tokens as give one vector of scores, lane
    `_lane(token * group + query head)`; `scores` `[blocks, room]` keeps them in between.
    """
    group, width, lanes, dtype = _sizes(queries, keys)
    tokens, room = block_sizes(group, width)
    parts = room // lanes  # vectors of scores in a block; if several, it is of one token

    def generate(context, builder, signature, args):
        b, a = builder, _Shapes(context, builder, signature, args)
        _, row, head, _, _, _, _, _, first = args
        length = a.size(5, 0)
        last = b.sub(length, _INDEX(1))
        blocks = b.udiv(b.add(length, _INDEX(tokens - 1)), _INDEX(tokens))
        vector, whole = ir.VectorType(_FLOAT, lanes), ir.VectorType(ir.IntType(32), lanes)
        zero = _vector(vector, 0.0)
        per_head = width // lanes
        # Token of every lane of a block; none for lanes that hold no score.
        owner = np.full(room, 1 << 20)
        for i in range(tokens * group):
            owner[i // lanes * lanes + _lane(i % lanes, lanes)] = i // group
        owner = owner.reshape(parts, lanes)

        def zeros(count):
            cells = [cgutils.alloca_once(b, vector) for _ in range(count)]
            for cell in cells:
                b.store(zero, cell)
            return cells

        def turns(x):
            """`x` with the tokens of a block turned round, in all ways but the first."""
            turned = []
            for step in range(1, tokens):
                mask = list(range(lanes))
                for i in range(tokens * group):
                    mask[_lane(i, lanes)] = _lane((i + step * group) % (tokens * group), lanes)
                turned.append(_permuted(b, x, mask))
            return turned

        fetch = cgutils.get_or_insert_function(
            b.module,
            ir.FunctionType(ir.VoidType(), [ir.PointerType(), *[ir.IntType(32)] * 3]),
            "llvm.prefetch.p0",
        )

        def prefetch(array, slot):
            bits = 16 if dtype == types.uint16 else 32
            start = a.element(array, slot, head, width)
            for i in range(0, width, 64 * 8 // bits):
                pointer = a.pointer(array, ir.IntType(bits), start, _INDEX(i))
                b.call(fetch, [pointer, *map(ir.IntType(32), (0, 3, 1))])

        def slots(block):
            start = b.mul(block, _INDEX(tokens))
            for j in range(tokens):
                t = b.add(start, _INDEX(j))
                t = b.select(b.icmp_signed("<", t, last), t, last)
                yield a.scalar(5, _INDEX, t)

        # Scores and their maxima.
        start = a.element(0, row, head, group * width)
        query = a.vectors(0, start, group * width, lanes, types.float32)
        highest = zeros(parts)
        for cell in highest:
            b.store(_vector(vector, _single(_LOWEST)), cell)
        with cgutils.for_range(b, blocks, intp=_INDEX) as loop:
            # Few keys and values are in any cache; their addresses are known early.
            for slot in slots(b.add(loop.index, _INDEX(_AHEAD))):
                prefetch(3, slot)
                prefetch(4, slot)
            products = []
            for slot in slots(loop.index):
                key = a.vectors(3, a.element(3, slot, head, width), width, lanes, dtype)
                for g in range(group):
                    total = b.fmul(query[g * per_head], key[0], flags=_FAST)
                    for i in range(1, per_head):
                        product = b.fmul(query[g * per_head + i], key[i], flags=_FAST)
                        total = b.fadd(total, product, flags=_FAST)
                    products.append(total)
            products += [zero] * (room - len(products))
            left = b.trunc(b.sub(length, b.mul(loop.index, _INDEX(tokens))), ir.IntType(32))
            left = _spread(b, left, whole)
            for part in range(parts):
                score = _sums(b, products[part * lanes : (part + 1) * lanes])
                inside = b.icmp_signed("<", ir.Constant(whole, owner[part].tolist()), left)
                score = b.select(inside, score, _vector(vector, _single(_LOWEST)))
                a.store(
                    score, 6, types.float32, b.mul(loop.index, _INDEX(room)), _INDEX(part * lanes)
                )
                b.store(_larger(b, b.load(highest[part]), score), highest[part])
        top = [b.load(cell) for cell in highest]
        for x in turns(top[0]):
            top[0] = _larger(b, top[0], x)

        # Weights, their sums and the weighted sum of the values.
        totals, sums = zeros(parts), zeros(group * per_head)
        with cgutils.for_range(b, blocks, intp=_INDEX) as loop:
            start = b.mul(loop.index, _INDEX(room))
            for part in range(parts):
                at = b.add(start, _INDEX(part * lanes))
                (score,) = a.vectors(6, at, lanes, lanes, types.float32)
                weight = _exponential(b, b.fsub(score, top[part], flags=_FAST))
                b.store(b.fadd(b.load(totals[part]), weight, flags=_FAST), totals[part])
                a.store(weight, 6, types.float32, at)
            for j, slot in enumerate(slots(loop.index)):
                value = a.vectors(4, a.element(4, slot, head, width), width, lanes, dtype)
                for g in range(group):
                    i = j * group + g
                    lane = i // lanes * lanes + _lane(i % lanes, lanes)
                    weight = a.scalar(6, _FLOAT, b.add(start, _INDEX(lane)))
                    weight = _spread(b, weight, vector)
                    for i, x in enumerate(value):
                        cell = sums[g * per_head + i]
                        product = b.fmul(weight, x, flags=_FAST)
                        b.store(b.fadd(b.load(cell), product, flags=_FAST), cell)
        total = [b.load(cell) for cell in totals]
        for x in turns(total[0]):
            total[0] = b.fadd(total[0], x, flags=_FAST)
        target = b.add(b.mul(row, a.size(7, 1)), first)
        for g in range(group):
            scale = _permuted(b, total[g // lanes], [_lane(g % lanes, lanes)] * lanes)
            scale = b.fdiv(_vector(vector, 1.0), scale, flags=_FAST)
            for i in range(per_head):
                mean = b.fmul(b.load(sums[g * per_head + i]), scale, flags=_FAST)
                at = _INDEX((g * per_head + i) * lanes)
                a.store(mean, 7, signature.args[7].dtype, target, at)
        return context.get_dummy_value()

    return types.void(queries, row, head, keys, values, path, scores, out, start), generate


def _tile_function(module, rows, x_type, weight_type):
    """`out [rows, PANEL] = x [rows, 2 pairs] @ w`, for `x` with rows `stride` numbers apart; sums
    in the order of the columns, whatever the number of rows."""
    name = f"tile_{rows}_{x_type}_{weight_type}"
    if name in module.globals:
        return module.globals[name]
    address, lanes = ir.PointerType(), _LANES
    vector, whole = ir.VectorType(_FLOAT, lanes), ir.VectorType(ir.IntType(32), lanes)
    kind = ir.FunctionType(ir.VoidType(), [address, _INDEX, address, _INDEX, address])
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block())
    x, stride, w, pairs, out = function.args
    dots = x_type == types.uint16
    number = ir.IntType(16) if dots else _FLOAT
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
            b.store(_vector(vector, 0.0), cell)
    lines = [b.gep(x, [b.mul(stride, _INDEX(r))], source_etype=number) for r in range(rows)]

    def load(start, kind):
        pointers = (b.gep(w, [b.add(start, _INDEX(i))], source_etype=kind.element) for i in parts)
        return [b.load(pointer, typ=kind, align=4) for pointer in pointers]

    with cgutils.for_range(b, pairs, intp=_INDEX) as loop:
        column = b.mul(loop.index, _INDEX(2))
        start = b.mul(column, _INDEX(PANEL))
        if weight_type == types.float32:
            columns = load(start, vector), load(b.add(start, _INDEX(PANEL)), vector)
        else:  # a word holds one column's number in its low half, the next one's in its high
            words = load(b.mul(loop.index, _INDEX(PANEL)), whole)
            columns = (
                [b.bitcast(b.shl(bits, _vector(whole, 16)), vector) for bits in words],
                [b.bitcast(b.and_(bits, _vector(whole, -1 << 16)), vector) for bits in words],
            )
        for i, weights in enumerate([words] if dots else columns):
            for line, cells in zip(lines, sums, strict=True):
                pointer = b.gep(line, [b.add(column, _INDEX(i))], source_etype=number)
                if dots:
                    pair = _spread(b, b.load(pointer, typ=ir.IntType(32), align=2), whole)
                else:
                    pair = _spread(b, b.load(pointer, typ=_FLOAT, align=4), vector)
                for cell, weight in zip(cells, weights, strict=True):
                    total = b.load(cell)
                    values = [total, pair, weight] if dots else [pair, weight, total]
                    b.store(b.call(add, values), cell)
    for r, cells in enumerate(sums):
        for i, cell in zip(parts, cells, strict=True):
            pointer = b.gep(out, [_INDEX(r * PANEL + i)], source_etype=_FLOAT)
            b.store(b.load(cell), b.bitcast(pointer, vector.as_pointer()), align=4)
    b.ret_void()
    return function


@intrinsic
def _tile(typing_context, x, first, rows, weight, panel, out):
    """`out[:rows] = x[first : first + rows] @` one panel of a packed weight.

    `x` float32, or bfloat16 if the weight is and the processor `DOTS` them; with an even number of
    columns. `rows` from 1 to `TILE_ROWS`; 2, 4, 8 or `TILE_ROWS` are computed, so `x` and `out`
    have `TILE_ROWS` from `first` on.
    """

    def generate(context, builder, signature, args):
        b, a = builder, _Shapes(context, builder, signature, args)
        _, first, rows, _, panel, _ = args
        narrow = weight.dtype == types.uint32
        width = a.size(0, 1)
        size = b.mul(a.size(3, 1), _INDEX(PANEL))
        pairs = a.size(3, 1) if narrow else b.udiv(a.size(3, 1), _INDEX(2))
        number = ir.IntType(16) if x.dtype == types.uint16 else _FLOAT
        values = (
            a.pointer(0, number, b.mul(first, width)),
            width,
            a.pointer(3, ir.IntType(32) if narrow else _FLOAT, b.mul(panel, size)),
            pairs,
            a.arrays[5].data,
        )
        end = b.append_basic_block()
        switch = b.switch(rows, end)
        sizes = sorted(size for size in {2, 4, 8, TILE_ROWS} if size <= TILE_ROWS)
        for fewer, size in zip([0, *sizes], sizes, strict=False):
            block = b.append_basic_block()
            for count in range(fewer + 1, size + 1):
                switch.add_case(_INDEX(count), block)
            with b.goto_block(block):
                b.call(_tile_function(b.module, size, x.dtype, weight.dtype), values)
                b.branch(end)
        b.position_at_end(end)
        return context.get_dummy_value()

    return types.void(x, first, rows, weight, panel, out), generate


def _line_vectors(builder, a, dtype, at):
    """Bits and value of the `_LANES` logits from `at` on."""
    (x,) = a.vectors(0, at, _LANES, _LANES, dtype)
    return builder.bitcast(x, ir.VectorType(ir.IntType(32), _LANES)), x


def _reduce(builder, name, x, *start):
    kind = x.type
    suffix = f"v{kind.count}{'f32' if kind.element == _FLOAT else 'i32'}"
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind.element, [*(s.type for s in start), kind]),
        f"llvm.vector.reduce.{name}.{suffix}",
    )
    return builder.call(function, [*start, x], fastmath=_FAST if start or name == "fmax" else ())


@intrinsic
def _survey(typing_context, line, stop):
    """The highest of `line[:stop]`, and the largest of their exponents' bits; `stop` a multiple of
    `_LANES`."""

    def generate(context, builder, signature, args):
        b, a = builder, _Shapes(context, builder, signature, args)
        vector, bits = ir.VectorType(_FLOAT, _LANES), ir.VectorType(ir.IntType(32), _LANES)
        highest, exponent = cgutils.alloca_once(b, vector), cgutils.alloca_once(b, bits)
        b.store(_vector(vector, _single(_LOWEST)), highest)
        b.store(_vector(bits, 0), exponent)
        with cgutils.for_range(b, b.udiv(args[1], _INDEX(_LANES)), intp=_INDEX) as loop:
            raw, x = _line_vectors(b, a, line.dtype, b.mul(loop.index, _INDEX(_LANES)))
            b.store(_larger(b, b.load(highest), x), highest)
            raw = b.and_(raw, _vector(bits, _EXPONENT))
            seen = b.load(exponent)
            b.store(b.select(b.icmp_unsigned(">", raw, seen), raw, seen), exponent)
        results = _reduce(b, "fmax", b.load(highest)), _reduce(b, "umax", b.load(exponent))
        return context.make_tuple(b, signature.return_type, results)

    return types.Tuple((types.float32, types.uint32))(line, stop), generate


@intrinsic
def _mass(typing_context, line, start, stop, highest, scale, lowest):
    """Sums of e^z and of z e^z over those of `line[start:stop]` with z = (x - highest) scale not
    below `lowest`; `stop - start` a multiple of `_LANES`."""

    def generate(context, builder, signature, args):
        b, a = builder, _Shapes(context, builder, signature, args)
        _, start, stop, *numbers = args
        vector = ir.VectorType(_FLOAT, _LANES)
        zero = _vector(vector, 0.0)
        highest, scale, lowest = (_spread(b, x, vector) for x in numbers)
        sums = [cgutils.alloca_once(b, vector) for _ in range(2)]
        for cell in sums:
            b.store(zero, cell)
        steps = b.udiv(b.sub(stop, start), _INDEX(_LANES))
        with cgutils.for_range(b, steps, intp=_INDEX) as loop:
            at = b.add(start, b.mul(loop.index, _INDEX(_LANES)))
            _, x = _line_vectors(b, a, line.dtype, at)
            z = b.fmul(b.fsub(x, highest, flags=_FAST), scale, flags=_FAST)
            inside = b.fcmp_ordered(">=", z, lowest, flags=_FAST)
            p = b.select(inside, _exponential(b, z), zero)
            for cell, term in zip(sums, (p, b.fmul(p, z, flags=_FAST)), strict=True):
                b.store(b.fadd(b.load(cell), term, flags=_FAST), cell)
        results = [_reduce(b, "fadd", b.load(cell), _FLOAT(0.0)) for cell in sums]
        return context.make_tuple(b, signature.return_type, results)

    pair = types.UniTuple(types.float32, 2)
    return pair(line, start, stop, highest, scale, lowest), generate


def _larger(builder, x, y):
    return builder.select(builder.fcmp_ordered(">", x, y, flags=_FAST), x, y)


def _single(value):
    """The nearest float32: LLVM takes no other constant as one."""
    return float(np.float32(value))


@njit(parallel=True, **_OPTIONS)
def add_norm(residual, delta, weight, eps, out):
    """`residual += delta`; `out = residual / rms(residual) * weight`; all `[Q, H]`."""
    rows, width = residual.shape
    for r in prange(rows):
        total = np.float32(0)
        for i in range(width):
            x = residual[r, i] + widen(delta[r, i])
            residual[r, i] = x
            total += x * x
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            out[r, i] = narrow(residual[r, i] * scale * weight[i], out)


@njit(parallel=True, **_OPTIONS)
def silu_mul(gate_up, out):
    """`out = silu(gate) * up` of `gate_up` `[Q, 2 I]`."""
    rows, width = out.shape
    one = np.float32(1)
    for r in prange(rows):
        for i in range(width):
            x = widen(gate_up[r, i])
            e = exp(-abs(x))
            sigmoid = (one if x >= 0 else e) / (one + e)
            out[r, i] = narrow(x * sigmoid * widen(gate_up[r, width + i]), out)


@njit(inline="always", **_OPTIONS)
def _rotate(x, weight, eps, cos, sin, scale, out):
    """Optional RMS norm (empty `weight`: none) and rotary embedding of one head, times `scale`."""
    half = cos.size
    if weight.size:
        total = np.float32(0)
        for i in range(2 * half):
            total += widen(x[i]) * widen(x[i])
        norm = np.float32(1) / np.sqrt(total / np.float32(2 * half) + eps)
        for i in range(half):
            a = widen(x[i]) * norm * weight[i]
            b = widen(x[half + i]) * norm * weight[half + i]
            out[i] = narrow((a * cos[i] - b * sin[i]) * scale, out)
            out[half + i] = narrow((b * cos[i] + a * sin[i]) * scale, out)
    else:
        for i in range(half):
            a, b = widen(x[i]), widen(x[half + i])
            out[i] = narrow((a * cos[i] - b * sin[i]) * scale, out)
            out[half + i] = narrow((b * cos[i] + a * sin[i]) * scale, out)


@njit(**_OPTIONS)
def _rope_store(qkv, query_norm, key_norm, eps, cos, sin, queries, keys, values):
    """`rope_store` of one row."""
    heads, width = queries.shape
    kv_heads = len(keys)
    scale = np.float32(1.0 / np.sqrt(width))
    for h in range(heads):
        x = qkv[h * width : (h + 1) * width]
        _rotate(x, query_norm, eps, cos, sin, scale, queries[h])
    for h in range(kv_heads):
        start = (heads + h) * width
        x = qkv[start : start + width]
        _rotate(x, key_norm, eps, cos, sin, np.float32(1), keys[h])
        start += kv_heads * width
        for i in range(width):
            values[h, i] = narrow(widen(qkv[start + i]), values)


@njit(parallel=True, **_OPTIONS)
def rope_store(qkv, query_norm, key_norm, eps, cos, sin, positions, slots, queries, keys, values):
    """Norm and rotate queries (scaled, into `queries`) and keys; store keys and values.

    `qkv` `[Q, (heads + 2 kv_heads) D]`, `queries` `[Q, heads, D]` fp32, `keys` and `values`
    `[S, kv_heads, D]`, `cos` and `sin` `[positions, D / 2]`.
    """
    for r in prange(len(queries)):
        c, s = cos[positions[r]], sin[positions[r]]
        slot = slots[r]
        _rope_store(qkv[r], query_norm, key_norm, eps, c, s, queries[r], keys[slot], values[slot])


@njit(parallel=True, **_OPTIONS)
def attend(queries, keys, values, table, first, positions, out):
    """Attention of node `q` over the slots `table[first[q] : first[q] + positions[q] + 1]`.

    `queries` `[Q, kv_heads]` of `query_heads`, scaled; `keys` and `values` `[S, kv_heads]` of
    `head`; `out` `[Q, heads * D]`.
    """
    for item in prange(queries.size):
        _attend_item(item, queries, keys, values, table, first, positions, out)


@njit(**_OPTIONS)
def _attend_item(item, queries, keys, values, table, first, positions, out):
    """`attend` of node `item // kv_heads` with key head `item % kv_heads`."""
    kv_heads = queries.shape[1]
    group, width = queries[0, 0].x.shape
    tokens, room = block_sizes(group, width)
    q, h = item // kv_heads, item % kv_heads
    length = positions[q] + 1
    path = table[first[q] : first[q] + length]
    scores = np.empty(((length + tokens - 1) // tokens, room), np.float32)
    _attend(queries, q, h, keys, values, path, scores, out, h * group * width)


class Weights(
    namedtuple(
        "Weights",
        "before_attention query_norm key_norm qkv qkv_bias out out_bias "
        "before_mlp gate_up gate_up_bias down down_bias norm head head_bias",
    )
):
    """All of a decoder, fp32. The first axis is the layer, but for the last three.

    Matrices are packed in panels of `PANEL` outputs, the last one filled up with zeros: `[...,
    panels, inputs, PANEL]` float32, or `[..., panels, inputs / 2, PANEL]` `uint32` of two bfloat16,
    the first input's in the low half. The first half of a panel of `gate_up` is of the gate, the
    second of the same outputs of the up projection. Biases have the padded outputs, an odd number
    of inputs is padded too; norms of queries and keys are empty where there are none.
    """


class Buffers(namedtuple("Buffers", "residual hidden qkv queries heads mixed inner last logits")):
    """What a step computes.

    fp32 `residual` `[Q, H]`, `qkv` `[Q, (heads + 2 kv_heads) D]`, `queries` `[Q, heads, D]` and the
    same memory as `heads` `[Q, kv_heads]` of `query_heads`, and `logits` `[F, V]` of the chosen
    nodes. Fp32 or bfloat16, as it is multiplied, with at least `TILE_ROWS` rows more and an even
    number of columns: `hidden` `[Q, H]`, `mixed` `[Q, heads * D]`, `inner` `[Q, I]`, `last`
    `[F, H]`.
    """


@njit(**_OPTIONS)
def _claim(counters, operation, parts, chunk):
    """Bounds of the next parts to do; the first is not below `parts` when none are left."""
    start = _count(counters, operation * COUNTER, chunk)
    return start, min(start + chunk, parts)


@njit(**_OPTIONS)
def _done(counters, operation, parts):
    _count(counters, operation * COUNTER + COUNTER // 2, parts)


@njit(**_OPTIONS)
def _wait(counters, operation, parts):
    """Until all parts are done."""
    spins = 0
    while _seen(counters, operation * COUNTER + COUNTER // 2) < parts:
        spins += 1
        if spins < _SPINS:
            _relax()
        else:
            _give_way()


@njit(**_OPTIONS)
def _norms(counters, operation, share, x, rows, weight, eps, out):
    """`out[i] = x[rows[i]] / rms(x[rows[i]]) * weight`."""
    width = x.shape[1]
    chunk = max(1, rows.size // share)
    start, stop = _claim(counters, operation, rows.size, chunk)
    while start < rows.size:
        for i in range(start, stop):
            line = x[rows[i]]
            total = np.float32(0)
            for j in range(width):
                total += line[j] * line[j]
            scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
            for j in range(width):
                out[i, j] = narrow(line[j] * scale * weight[j], out)
        _done(counters, operation, stop - start)
        start, stop = _claim(counters, operation, rows.size, chunk)
    _wait(counters, operation, rows.size)


@njit(**_OPTIONS)
def _multiply(counters, operation, share, x, rows, weight, bias, out, how):
    """`x[:rows] @ weight + bias`: stored, added to `out`, or its gated half."""
    panels = len(weight)
    chunk = max(1, panels // share)
    tile = np.empty((TILE_ROWS, PANEL), np.float32)
    start, stop = _claim(counters, operation, panels, chunk)
    while start < panels:
        for p in range(start, stop):
            for first in range(0, rows, TILE_ROWS):
                count = min(rows - first, TILE_ROWS)
                _tile(x, first, count, weight, p, tile)
                _finish(tile[:count], bias[p * PANEL : (p + 1) * PANEL], out, first, p, how)
        _done(counters, operation, stop - start)
        start, stop = _claim(counters, operation, panels, chunk)
    _wait(counters, operation, panels)


@njit(**_OPTIONS)
def _finish(tile, bias, out, first, panel, how):
    """From a tile of sums to `out`."""
    one, half = np.float32(1), PANEL // 2
    for r in range(len(tile)):
        if how == _SILU:
            line = out[first + r, panel * half : (panel + 1) * half]
            for i in range(half):
                x = tile[r, i] + bias[i]
                e = exp(-abs(x))
                sigmoid = (one if x >= 0 else e) / (one + e)
                line[i] = narrow(x * sigmoid * (tile[r, half + i] + bias[half + i]), line)
        else:
            width = min(PANEL, out.shape[1] - panel * PANEL)
            line = out[first + r, panel * PANEL : panel * PANEL + width]
            if how == _ADD:
                for i in range(width):
                    line[i] = narrow(widen(line[i]) + tile[r, i] + bias[i], line)
            else:
                for i in range(width):
                    line[i] = narrow(tile[r, i] + bias[i], line)


@njit(inline="always", **_OPTIONS)
def _work(counters, share, w, b, cos, sin, eps, keys, values, key_heads, value_heads, nodes, ends):
    """What each thread of `forward` does."""
    positions, slots, table, first = nodes
    rows = len(positions)
    every = np.arange(rows)
    n = 0
    for layer in range(len(w.qkv)):
        _norms(counters, n, share, b.residual, every, w.before_attention[layer], eps, b.hidden)
        qkv, bias = w.qkv[layer], w.qkv_bias[layer]
        _multiply(counters, n + 1, share, b.hidden, rows, qkv, bias, b.qkv, _STORE)

        chunk = max(1, rows // share)
        start, stop = _claim(counters, n + 2, rows, chunk)
        while start < rows:
            for r in range(start, stop):
                c, s = cos[positions[r]], sin[positions[r]]
                key, value = keys[layer, slots[r]], values[layer, slots[r]]
                norms = w.query_norm[layer], w.key_norm[layer]
                _rope_store(b.qkv[r], norms[0], norms[1], eps, c, s, b.queries[r], key, value)
            _done(counters, n + 2, stop - start)
            start, stop = _claim(counters, n + 2, rows, chunk)
        _wait(counters, n + 2, rows)

        key, value = key_heads[layer], value_heads[layer]
        items = rows * b.heads.shape[1]
        chunk = max(1, items // (4 * share))  # paths differ in length
        start, stop = _claim(counters, n + 3, items, chunk)
        while start < items:
            for item in range(start, stop):
                _attend_item(item, b.heads, key, value, table, first, positions, b.mixed)
            _done(counters, n + 3, stop - start)
            start, stop = _claim(counters, n + 3, items, chunk)
        _wait(counters, n + 3, items)

        out, bias = w.out[layer], w.out_bias[layer]
        _multiply(counters, n + 4, share, b.mixed, rows, out, bias, b.residual, _ADD)
        _norms(counters, n + 5, share, b.residual, every, w.before_mlp[layer], eps, b.hidden)
        gate_up, bias = w.gate_up[layer], w.gate_up_bias[layer]
        _multiply(counters, n + 6, share, b.hidden, rows, gate_up, bias, b.inner, _SILU)
        down, bias = w.down[layer], w.down_bias[layer]
        _multiply(counters, n + 7, share, b.inner, rows, down, bias, b.residual, _ADD)
        n += OPERATIONS
    _norms(counters, n, share, b.residual, ends, w.norm, eps, b.last)
    _multiply(counters, n + 1, share, b.last, ends.size, w.head, w.head_bias, b.logits, _STORE)


@njit(parallel=True, **_OPTIONS)
def forward(
    threads, counters, w, b, cos, sin, eps, keys, values, key_heads, value_heads, nodes, ends
):
    """A step: keys and values of all nodes, logits of the nodes `ends`; writes `Buffers`.

    `counters` zeros `[(OPERATIONS * layers + 2) * COUNTER]`, `keys` and `values`
    `[layers, S, kv_heads, D]` and again as `[layers, S, kv_heads]` of `head`, `nodes` positions,
    slots, table and first of a `NodeBatch`.
    """
    share = 8 * threads  # pieces in which an operation is claimed: threads differ in speed
    for _ in prange(threads):
        _work(
            counters, share, w, b, cos, sin, eps, keys, values, key_heads, value_heads, nodes, ends
        )


@njit(**_OPTIONS)
def _threshold(logits, highest, scale, top_k, top_p, min_p):
    """Lowest kept `z = (logit - highest) * scale`, exact, without sorting the vocabulary.

    A histogram of z finds the bin in which the limit of top-k (by count) and of top-p (by mass)
    lies; only that bin is sorted.
    """
    vocab_size = logits.size
    count = np.zeros(_BINS, np.int64)
    mass = np.zeros(_BINS, np.float64)
    for i in range(vocab_size):
        z = (widen(logits[i]) - highest) * scale
        b = min(np.int64(-z * np.float32(_BINS_PER_NAT)), _BINS - 1)
        count[b] += 1
        mass[b] += exp(z)
    lowest = _LOWEST
    kept = mass.sum()
    if 0 < top_k < vocab_size:
        b, before, kept = 0, 0, 0.0
        while before + count[b] < top_k:
            before += count[b]
            kept += mass[b]
            b += 1
        members = _bin(logits, highest, scale, b, count[b])
        lowest = members[top_k - before - 1]
        for z in members:
            if z >= lowest:
                kept += exp(z)
    if top_p < 1:
        goal = top_p * kept
        b, heavier = 0, 0.0
        while b < _BINS - 1 and heavier + mass[b] < goal:
            heavier += mass[b]
            b += 1
        limit = np.float32(0)
        for z in _bin(logits, highest, scale, b, count[b]):
            if heavier >= goal:
                break
            limit = z
            heavier += exp(z)
        lowest = max(lowest, limit)
    if min_p > 0:
        lowest = max(lowest, np.float32(np.log(min_p)))
    return lowest


@njit(**_OPTIONS)
def _bin(logits, highest, scale, b, size):
    """The z values of histogram bin `b`, descending."""
    members = np.empty(size, np.float32)
    m = 0
    for i in range(logits.size):
        z = (widen(logits[i]) - highest) * scale
        if min(np.int64(-z * np.float32(_BINS_PER_NAT)), _BINS - 1) == b:
            members[m] = z
            m += 1
    return np.sort(members)[::-1]


@njit(**_OPTIONS)
def _block(line, start, highest, scale, lowest):
    """`_mass` of up to `_BLOCK` logits."""
    stop = min(start + _BLOCK, line.size)
    even = stop - (stop - start) % _LANES
    mass, weighted = _mass(line, start, even, highest, scale, lowest)
    for i in range(even, stop):
        z = (widen(line[i]) - highest) * scale
        if z >= lowest:
            mass += exp(z)
            weighted += exp(z) * z
    return mass, weighted


@njit(parallel=True, **_OPTIONS)
def sample(logits, which, temperature, top_k, top_p, min_p, uniform, tokens, cut, full):
    """Draw one token a row by inverting the cumulative distribution at `uniform`.

    `logits` `[F, V]`, parameters `[R]`; writes `tokens` `[R]` and log-probs and entropies, `[2, R]`
    each, of the cut and of the full distribution. See `sampling.sample` for the meaning. NaN where
    a logit is not finite.
    """
    vocab_size = logits.shape[1]
    blocks = (vocab_size + _BLOCK - 1) // _BLOCK
    for r in prange(which.size):
        line = logits[which[r]]
        highest, exponent = _survey(line, vocab_size - vocab_size % _LANES)
        for i in range(vocab_size - vocab_size % _LANES, vocab_size):
            x = widen(line[i])
            highest = max(highest, x)
            exponent = max(exponent, _to_bits(x) & np.uint32(_EXPONENT))
        if exponent == _EXPONENT:
            tokens[r] = 0
            cut[:, r] = full[:, r] = np.nan
            continue
        if temperature[r] == 0:
            token = 0
            while widen(line[token]) < highest:
                token += 1
            tokens[r] = token
            cut[:, r] = 0
            full[0, r], full[1, r] = _full(line, token, highest, np.float32(1))
            continue
        scale = np.float32(1) / temperature[r]
        lowest = _LOWEST
        if top_k[r] > 0 or top_p[r] < 1 or min_p[r] > 0:
            lowest = _threshold(line, highest, scale, top_k[r], top_p[r], min_p[r])
        masses = np.empty(blocks, np.float64)
        total = moment = 0.0  # sums of e^z and of z e^z
        for b in range(blocks):
            mass, weighted = _block(line, b * _BLOCK, highest, scale, lowest)
            masses[b] = mass
            total += mass
            moment += weighted
        goal = uniform[r] * total
        b = 0
        while b < blocks - 1 and goal >= masses[b]:
            goal -= masses[b]
            b += 1
        while b > 0 and masses[b] == 0:  # rounding: past the last token kept
            b -= 1
        token = 0
        for i in range(b * _BLOCK, min((b + 1) * _BLOCK, vocab_size)):
            z = (widen(line[i]) - highest) * scale
            if z >= lowest:
                token = i
                goal -= exp(z)
                if goal < 0:
                    break
        z = (widen(line[token]) - highest) * scale
        tokens[r] = token
        cut[0, r] = z - np.log(total)
        cut[1, r] = np.log(total) - moment / total
        if lowest == _LOWEST:
            full[:, r] = cut[:, r]
        else:
            full[0, r], full[1, r] = _full(line, token, highest, scale)


@njit(**_OPTIONS)
def _full(line, token, highest, scale):
    """Log-prob of `token` and entropy of the distribution before any cut."""
    total = moment = 0.0
    for start in range(0, line.size, _BLOCK):
        mass, weighted = _block(line, start, highest, scale, _LOWEST)
        total += mass
        moment += weighted
    z = (widen(line[token]) - highest) * scale
    return z - np.log(total), np.log(total) - moment / total
