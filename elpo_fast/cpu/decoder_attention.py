"""Attention of single nodes along their paths of cache slots, for the decoder.

`_attend` takes the sizes of a head from the element types of its arrays, `query_heads(group,
width)` and `head(dtype, width)`, so that every loop over a head is unrolled.

What it brings: of a decode step of 64 rows, 120 ms, attention takes 11 to 14; the compiler's own
loop took three times as long (two cores of a Xeon).
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from math import gcd

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from elpo_fast.cpu.kernel import kernel
from elpo_fast.cpu.vectors import (
    FAST,
    FLOAT,
    INDEX,
    LOWEST,
    Arrays,
    broadcast,
    constant,
    fast_exponential,
    larger,
    permuted,
)


@cache
def head(dtype: np.dtype, width: int) -> np.dtype:
    """Element type of key and value arrays: one head of one token."""
    return np.dtype([("x", dtype, (width,))])


@cache
def query_heads(group: int, width: int) -> np.dtype:
    """Element type of query arrays: the `group` query heads that share one key head."""
    return np.dtype([("x", np.float32, (group, width))])


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
                    permuted(builder, x, stay, y), permuted(builder, x, cross, y), flags=FAST
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
        b, a = builder, Arrays(context, builder, signature, args)
        _, row, head, _, _, _, _, _, first = args
        length = a.size(5, 0)
        last = b.sub(length, INDEX(1))
        blocks = b.udiv(b.add(length, INDEX(tokens - 1)), INDEX(tokens))
        vector, whole = ir.VectorType(FLOAT, lanes), ir.VectorType(ir.IntType(32), lanes)
        zero = constant(0.0, vector)
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
                turned.append(permuted(b, x, mask))
            return turned

        def slots(block):
            start = b.mul(block, INDEX(tokens))
            for j in range(tokens):
                t = b.add(start, INDEX(j))
                t = b.select(b.icmp_signed("<", t, last), t, last)
                yield a.scalar(5, INDEX, t)

        # Scores and their maxima.
        start = a.element(0, row, head, group * width)
        query = a.vectors(0, start, group * width, lanes, types.float32)
        highest = zeros(parts)
        for cell in highest:
            b.store(constant(LOWEST, vector), cell)
        with cgutils.for_range(b, blocks, intp=INDEX) as loop:
            products = []
            for slot in slots(loop.index):
                key = a.vectors(3, a.element(3, slot, head, width), width, lanes, dtype)
                for g in range(group):
                    total = b.fmul(query[g * per_head], key[0], flags=FAST)
                    for i in range(1, per_head):
                        product = b.fmul(query[g * per_head + i], key[i], flags=FAST)
                        total = b.fadd(total, product, flags=FAST)
                    products.append(total)
            products += [zero] * (room - len(products))
            left = b.trunc(b.sub(length, b.mul(loop.index, INDEX(tokens))), ir.IntType(32))
            left = broadcast(b, left, whole)
            for part in range(parts):
                score = _sums(b, products[part * lanes : (part + 1) * lanes])
                inside = b.icmp_signed("<", ir.Constant(whole, owner[part].tolist()), left)
                score = b.select(inside, score, constant(LOWEST, vector))
                a.store(
                    score, 6, types.float32, b.mul(loop.index, INDEX(room)), INDEX(part * lanes)
                )
                b.store(larger(b, b.load(highest[part]), score), highest[part])
        top = [b.load(cell) for cell in highest]
        for x in turns(top[0]):
            top[0] = larger(b, top[0], x)

        # Weights, their sums and the weighted sum of the values.
        totals, sums = zeros(parts), zeros(group * per_head)
        with cgutils.for_range(b, blocks, intp=INDEX) as loop:
            start = b.mul(loop.index, INDEX(room))
            for part in range(parts):
                at = b.add(start, INDEX(part * lanes))
                (score,) = a.vectors(6, at, lanes, lanes, types.float32)
                weight = fast_exponential(b, b.fsub(score, top[part], flags=FAST))
                b.store(b.fadd(b.load(totals[part]), weight, flags=FAST), totals[part])
                a.store(weight, 6, types.float32, at)
            for j, slot in enumerate(slots(loop.index)):
                value = a.vectors(4, a.element(4, slot, head, width), width, lanes, dtype)
                for g in range(group):
                    i = j * group + g
                    lane = i // lanes * lanes + _lane(i % lanes, lanes)
                    weight = a.scalar(6, FLOAT, b.add(start, INDEX(lane)))
                    weight = broadcast(b, weight, vector)
                    for i, x in enumerate(value):
                        cell = sums[g * per_head + i]
                        product = b.fmul(weight, x, flags=FAST)
                        b.store(b.fadd(b.load(cell), product, flags=FAST), cell)
        total = [b.load(cell) for cell in totals]
        for x in turns(total[0]):
            total[0] = b.fadd(total[0], x, flags=FAST)
        target = b.add(b.mul(row, a.size(7, 1)), first)
        for g in range(group):
            scale = permuted(b, total[g // lanes], [_lane(g % lanes, lanes)] * lanes)
            scale = b.fdiv(constant(1.0, vector), scale, flags=FAST)
            for i in range(per_head):
                mean = b.fmul(b.load(sums[g * per_head + i]), scale, flags=FAST)
                at = INDEX((g * per_head + i) * lanes)
                a.store(mean, 7, signature.args[7].dtype, target, at)
        return context.get_dummy_value()

    return types.void(queries, row, head, keys, values, path, scores, out, start), generate


@kernel(fast=True, parallel=True)
def attend(queries, keys, values, table, first, positions, out):
    """Attention of node `q` over the slots `table[first[q] : first[q] + positions[q] + 1]`.

    `queries` `[Q, kv_heads]` of `query_heads`, scaled; `keys` and `values` `[S, kv_heads]` of
    `head`; `out` `[Q, heads * D]`.
    """
    for item in prange(queries.size):
        attend_item(item, queries, keys, values, table, first, positions, out)


@kernel(fast=True)
def attend_item(item, queries, keys, values, table, first, positions, out):
    """`attend` of node `item // kv_heads` with key head `item % kv_heads`."""
    kv_heads = queries.shape[1]
    group, width = queries[0, 0].x.shape
    tokens, room = block_sizes(group, width)
    q, h = item // kv_heads, item % kv_heads
    length = positions[q] + 1
    path = table[first[q] : first[q] + length]
    scores = np.empty(((length + tokens - 1) // tokens, room), np.float32)
    _attend(queries, q, h, keys, values, path, scores, out, h * group * width)
