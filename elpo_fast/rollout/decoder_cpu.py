"""The CPU's kernels: everything in a step that is not a matrix product.

Numba, parallel over nodes and key heads, or over rows. `decoder_torch` and `sampling.sample` are
the same in plain PyTorch and define what these must compute. bfloat16 arrays come in as `uint16`
and are widened in registers; all arithmetic is fp32, sums over the vocabulary end in fp64.

A compiler does not vectorise a dot product of 64 numbers well, nor a sum that leaves some out, so
`_attend` and `_mass` emit their vector instructions themselves. `_attend` takes the sizes of a head
from the element types of its arrays, `query_heads(group, width)` and `head(dtype, width)`, so that
every loop over a head is unrolled.

One module, because Numba's cache on disk notices changes of a kernel's own file alone.
"""

# Kernels are typed by their compilation, for each dtype they are called with.
# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from math import gcd

import numpy as np
from llvmlite import ir
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

_FLOAT, _INDEX = ir.FloatType(), ir.IntType(64)
_FAST = ("fast",)
_POLYNOMIAL = (1.5353359e-4, 1.3398875e-3, 9.6184374e-3, 5.5503323e-2, 2.4022648e-1, 0.6931472, 1.0)


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


@njit(parallel=True, **_OPTIONS)
def rope_store(qkv, query_norm, key_norm, eps, cos, sin, positions, slots, queries, keys, values):
    """Norm and rotate queries (scaled, into `queries`) and keys; store keys and values.

    `qkv` `[Q, (heads + 2 kv_heads) D]`, `queries` `[Q, heads, D]` fp32, `keys` and `values`
    `[S, kv_heads, D]`, `cos` and `sin` `[positions, D / 2]`.
    """
    rows, heads, width = queries.shape
    kv_heads = keys.shape[1]
    scale = np.float32(1.0 / np.sqrt(width))
    one = np.float32(1)
    for r in prange(rows):
        c, s = cos[positions[r]], sin[positions[r]]
        slot = slots[r]
        for h in range(heads):
            x = qkv[r, h * width : (h + 1) * width]
            _rotate(x, query_norm, eps, c, s, scale, queries[r, h])
        for h in range(kv_heads):
            start = (heads + h) * width
            x = qkv[r, start : start + width]
            _rotate(x, key_norm, eps, c, s, one, keys[slot, h])
            start += kv_heads * width
            for i in range(width):
                values[slot, h, i] = narrow(widen(qkv[r, start + i]), values)


@njit(parallel=True, **_OPTIONS)
def attend(queries, keys, values, table, first, positions, out):
    """Attention of node `q` over the slots `table[first[q] : first[q] + positions[q] + 1]`.

    `queries` `[Q, kv_heads]` of `query_heads`, scaled; `keys` and `values` `[S, kv_heads]` of
    `head`; `out` `[Q, heads * D]`.
    """
    nodes, kv_heads = queries.shape
    group, width = queries[0, 0].x.shape
    tokens, room = block_sizes(group, width)
    for item in prange(nodes * kv_heads):
        q, h = item // kv_heads, item % kv_heads
        length = positions[q] + 1
        path = table[first[q] : first[q] + length]
        scores = np.empty(((length + tokens - 1) // tokens, room), np.float32)
        _attend(queries, q, h, keys, values, path, scores, out, h * group * width)


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
