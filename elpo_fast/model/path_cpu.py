"""The CPU's kernels of attention along paths, by Numba: all of a block of queries in one go.

Scores, softmax and both products of a block stay in cache; the backward needs one exponential and
five products a pair, and no sums but those of its gradients. All arithmetic is float32.

A matrix `[rows, columns]` is stored in panels of `PANEL` columns, `[columns / PANEL, rows, PANEL]`,
the last one filled up with zeros. With this every distance in a product's inner loop is a constant;
LLVM would otherwise spend more on addresses than on the products. It does not keep a tile of a
product in registers by itself either, so the vector instructions are emitted here: with helpers of
this module's own, because Numba's cache on disk notices changes of a kernel's own file alone, and
without the decoder's licence to forget infinities and NaN, which must show in a loss.
"""

# Kernels are typed by their compilation.
# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_OPTIONS = {"cache": True, "error_model": "numpy", "nogil": True}
_LANES = 16  # numbers of a vector

# A tile of a product fills the registers: with AVX-512 28 of 32 hold sums, elsewhere 12 of 16.
ROWS, PANEL = (14, 32) if get_host_cpu_features().get("avx512f") else (6, 16)
_SIZES = (2, 4, 8, 14) if ROWS == 14 else (2, 4, 6)
_TILES = ((0, 11), (11, 11), (22, 10)) if PANEL == 32 else ((0, 6), (6, 6), (12, 4))  # of a panel
BLOCK = 4 * ROWS  # rows of queries at once
_TOKENS = 64  # packed at once

_FLOAT, _INDEX, _BIT, _ADDRESS = ir.FloatType(), ir.IntType(64), ir.IntType(1), ir.PointerType()
_VECTOR, _WHOLE = ir.VectorType(_FLOAT, _LANES), ir.VectorType(ir.IntType(32), _LANES)
_ROUNDER = 1.5 * 2**23  # added to a small float32, leaves its nearest integer in the low bits
_LOG2E = 1.4426950408889634
_POLYNOMIAL = (1.5353359e-4, 1.3398875e-3, 9.6184374e-3, 5.5503323e-2, 2.4022648e-1, 0.6931472, 1.0)


class Layout(NamedTuple):
    """Where queries and keys of packed trees lie, and who computes what; all `int64`.

    The tokens of a run have consecutive slots, from the beginning of a panel of slots on. The
    queries of a run that share a key head are rows, `group` for each token. The blocks are divided
    into shares, whose gradients of keys and values are summed apart from each other's.
    """

    slots: np.ndarray  # [N] of each token
    slices: np.ndarray  # [S, 3] paths of all runs: panel, place on the path, tokens
    first: np.ndarray  # [runs + 1] slice of each run
    blocks: np.ndarray  # [B, 5] run, its first token, that token's place, first row, end of rows
    bounds: np.ndarray  # [shares + 1] block of each share
    reach: np.ndarray  # [shares, 2] first panel of what its blocks see, and end
    offsets: np.ndarray  # [shares + 1] panel of each share's sums


def _constant(value, kind=_VECTOR):
    if kind.element == _FLOAT:
        value = float(np.float32(value))  # LLVM takes no other constant as one
    return ir.Constant(kind, [value] * kind.count)


def _declared(builder, name, result, *arguments):
    kind = ir.FunctionType(result, arguments)
    return cgutils.get_or_insert_function(builder.module, kind, name)


def _fma(builder, x, y, z):
    function = _declared(builder, f"llvm.fma.v{_LANES}f32", _VECTOR, *[_VECTOR] * 3)
    return builder.call(function, [x, y, z])


def _at(builder, pointer, offset):
    offset = _INDEX(offset) if isinstance(offset, int) else offset
    return builder.gep(pointer, [offset], source_etype=_FLOAT)


def _load(builder, pointer, offset):
    return builder.load(_at(builder, pointer, offset), typ=_VECTOR, align=4)


def _store(builder, x, pointer, offset):
    pointer = builder.bitcast(_at(builder, pointer, offset), _VECTOR.as_pointer())
    builder.store(x, pointer, align=4)


def _spread(builder, pointer, offset):
    """One number in all lanes."""
    number = builder.load(_at(builder, pointer, offset), typ=_FLOAT, align=4)
    first = builder.insert_element(_constant(0.0), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, _constant(0, _WHOLE))


def _larger(builder, x, y):
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _exponential(builder, z):
    """e^z for z up to 80, by a minimax polynomial, to 1e-7; 0 below -87."""
    b = builder
    shifted = _fma(b, z, _constant(_LOG2E), _constant(_ROUNDER))
    nearest = b.fsub(shifted, _constant(_ROUNDER))
    rest = _fma(b, z, _constant(_LOG2E), b.fneg(nearest))
    rest = _fma(b, z, _constant(_LOG2E - float(np.float32(_LOG2E))), rest)
    p = _constant(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = _fma(b, p, rest, _constant(coefficient))
    power = b.shl(b.bitcast(shifted, _WHOLE), _constant(23, _WHOLE))
    power = b.bitcast(b.add(power, _constant(127 << 23, _WHOLE)), _VECTOR)
    tiny = b.fcmp_ordered("<", z, _constant(-87.0))
    return b.select(tiny, _constant(0.0), b.fmul(p, power))


def _addresses(context, builder, signature, args, *which):
    """Of the numbers of array arguments."""
    for i in which:
        yield context.make_array(signature.args[i])(context, builder, value=args[i]).data


@intrinsic
def _claim(typing_context, counter, index):
    """One more than anyone else got from `counter[index]`, from 0 on."""

    def generate(context, builder, signature, args):
        (data,) = _addresses(context, builder, signature, args, 0)
        pointer = builder.gep(data, [args[1]], source_etype=_INDEX)
        return builder.atomic_rmw("add", pointer, _INDEX(1), "monotonic")

    return types.int64(counter, types.int64), generate


def _product_function(module, rows, transposed):
    """`c [rows, PANEL] = x @ w`, or added to it.

    `x [rows, PANEL depth]` in panels `stride` numbers apart, or, transposed, `[depth, rows]` of one
    panel.
    """
    name = f"path_product_{rows}_{'transposed' if transposed else 'plain'}"
    if name in module.globals:
        return module.globals[name]
    kind = ir.FunctionType(ir.VoidType(), [_ADDRESS, _INDEX, _ADDRESS, _ADDRESS, _INDEX, _BIT])
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block())
    x, stride, w, c, depth, add = function.args
    cells = [
        (r, i, cgutils.alloca_once(b, _VECTOR))
        for r in range(rows)
        for i in range(0, PANEL, _LANES)
    ]
    with b.if_else(add) as (then, otherwise):
        with then:
            for r, i, cell in cells:
                b.store(_load(b, c, r * PANEL + i), cell)
        with otherwise:
            for *_, cell in cells:
                b.store(_constant(0.0), cell)

    def steps(x, w, count):
        """`count` columns of `x` and rows of `w`."""
        for k in range(count):
            weights = {i: _load(b, w, k * PANEL + i) for i in range(0, PANEL, _LANES)}
            for r in range(rows):
                spread = _spread(b, x, k * PANEL + r if transposed else r * PANEL + k)
                for row, i, cell in cells:
                    if row == r:
                        b.store(_fma(b, spread, weights[i], b.load(cell)), cell)

    if transposed:
        with cgutils.for_range(b, b.lshr(depth, _INDEX(1)), intp=_INDEX) as loop:
            start = b.mul(loop.index, _INDEX(2 * PANEL))
            steps(_at(b, x, start), _at(b, w, start), 2)
        with b.if_then(b.trunc(depth, _BIT)):
            start = b.mul(b.sub(depth, _INDEX(1)), _INDEX(PANEL))
            steps(_at(b, x, start), _at(b, w, start), 1)
    else:
        with cgutils.for_range(b, depth, intp=_INDEX) as outer:
            left = _at(b, x, b.mul(outer.index, stride))
            right = _at(b, w, b.mul(outer.index, _INDEX(PANEL * PANEL)))
            with cgutils.for_range(b, _INDEX(PANEL // 4), intp=_INDEX) as loop:
                k = b.mul(loop.index, _INDEX(4))
                steps(_at(b, left, k), _at(b, right, b.mul(k, _INDEX(PANEL))), 4)
    for r, i, cell in cells:
        _store(b, b.load(cell), c, r * PANEL + i)
    b.ret_void()
    return function


def _call_product(context, builder, signature, args, transposed):
    """`_product_function` for the number of rows, or the next larger one."""
    arrays = _addresses(context, builder, signature, args, 0, 3, 5)
    x, w, c = (_at(builder, data, args[i]) for data, i in zip(arrays, (1, 4, 6), strict=True))
    stride, rows, depth, add = args[2], *args[7:]
    values = x, stride, w, c, depth, builder.trunc(add, _BIT)
    sizes = sorted({size for _, size in _TILES}) if transposed else _SIZES
    end = builder.append_basic_block()
    switch = builder.switch(rows, end)
    for fewer, size in zip((0, *sizes), sizes, strict=False):
        block = builder.append_basic_block()
        for count in range(fewer + 1, size + 1):
            switch.add_case(_INDEX(count), block)
        with builder.goto_block(block):
            builder.call(_product_function(builder.module, size, transposed), values)
            builder.branch(end)
    builder.position_at_end(end)
    return context.get_dummy_value()


@intrinsic
def _multiply(typing_context, x, x_at, stride, w, w_at, c, c_at, rows, depth, add):
    """`c [rows, PANEL]`, from `c_at` on, is or is added `x @ w`, of `depth` panels of `x`.

    Places are counted in numbers, in arrays without gaps, of any shape. `rows` up to `ROWS`; there
    is room for so many in `x` and `c`.
    """

    def generate(context, builder, signature, args):
        return _call_product(context, builder, signature, args, False)

    i = types.int64
    return types.void(x, i, i, w, i, c, i, i, i, types.boolean), generate


@intrinsic
def _multiply_transposed(typing_context, x, x_at, stride, w, w_at, c, c_at, rows, depth, add):
    """The same of the transpose of `x [depth, rows]`, columns of one panel."""

    def generate(context, builder, signature, args):
        return _call_product(context, builder, signature, args, True)

    i = types.int64
    return types.void(x, i, i, w, i, c, i, i, i, types.boolean), generate


def _for_rows(builder, panels, rows):
    """Loops over the vectors of panels `[panels, BLOCK, PANEL]`: offset and row of each."""
    b = builder
    with cgutils.for_range(b, panels, intp=_INDEX) as outer:
        panel = b.mul(outer.index, _INDEX(BLOCK * PANEL))
        with cgutils.for_range(b, rows, intp=_INDEX) as loop:
            start = b.add(panel, b.mul(loop.index, _INDEX(PANEL)))
            yield [b.add(start, _INDEX(i)) for i in range(0, PANEL, _LANES)], loop.index


def _reduced(builder, name, x, *start):
    kinds = [*(_FLOAT for _ in start), _VECTOR]
    function = _declared(builder, f"llvm.vector.reduce.{name}.v{_LANES}f32", _FLOAT, *kinds)
    return builder.call(function, [*start, x], fastmath=("reassoc",) if start else ("nsz",))


@intrinsic
def _maxima(typing_context, scores, panels, rows, lanes, highest):
    """`highest[r]`, the largest of a row's scores; `lanes [BLOCK, _LANES]` is overwritten."""

    def generate(context, builder, signature, args):
        b = builder
        s, work, out = _addresses(context, b, signature, args, 0, 3, 4)
        with cgutils.for_range(b, args[2], intp=_INDEX) as loop:
            _store(b, _constant(-3e38), work, b.mul(loop.index, _INDEX(_LANES)))
        for offsets, row in _for_rows(b, args[1], args[2]):
            lane = b.mul(row, _INDEX(_LANES))
            most = _load(b, work, lane)
            for offset in offsets:
                most = _larger(b, _load(b, s, offset), most)
            _store(b, most, work, lane)
        with cgutils.for_range(b, args[2], intp=_INDEX) as loop:
            most = _load(b, work, b.mul(loop.index, _INDEX(_LANES)))
            b.store(_reduced(b, "fmax", most), _at(b, out, loop.index), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, i, i, lanes, highest), generate


@intrinsic
def _powers(typing_context, scores, panels, rows, lanes, highest, sums):
    """Scores become e^(score - highest of its row); `sums[r]` is their sum."""

    def generate(context, builder, signature, args):
        b = builder
        s, work, top, out = _addresses(context, b, signature, args, 0, 3, 4, 5)
        with cgutils.for_range(b, args[2], intp=_INDEX) as loop:
            _store(b, _constant(0.0), work, b.mul(loop.index, _INDEX(_LANES)))
        for offsets, row in _for_rows(b, args[1], args[2]):
            lane = b.mul(row, _INDEX(_LANES))
            most, total = _spread(b, top, row), _load(b, work, lane)
            for offset in offsets:
                power = _exponential(b, b.fsub(_load(b, s, offset), most))
                _store(b, power, s, offset)
                total = b.fadd(total, power)
            _store(b, total, work, lane)
        with cgutils.for_range(b, args[2], intp=_INDEX) as loop:
            total = _load(b, work, b.mul(loop.index, _INDEX(_LANES)))
            total = _reduced(b, "fadd", total, _FLOAT(0.0))
            b.store(total, _at(b, out, loop.index), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, i, i, lanes, highest, sums), generate


@intrinsic
def _score_gradients(typing_context, scores, grads, panels, rows, highest, inverse, correction):
    """Scores become probabilities, gradients of these become gradients of the scores."""

    def generate(context, builder, signature, args):
        b = builder
        s, g, *numbers = _addresses(context, b, signature, args, 0, 1, 4, 5, 6)
        for offsets, row in _for_rows(b, args[2], args[3]):
            top, inverse, correction = (_spread(b, x, row) for x in numbers)
            for offset in offsets:
                p = _exponential(b, b.fsub(_load(b, s, offset), top))
                p = b.fmul(p, inverse)
                _store(b, p, s, offset)
                _store(b, b.fmul(p, b.fsub(_load(b, g, offset), correction)), g, offset)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, grads, i, i, highest, inverse, correction), generate


@njit(**_OPTIONS)
def pack(counter, layout, x, columns, panels):
    """`x [N, kv_heads, D]` in slots: `columns [kv_heads, slots / PANEL, D, PANEL]` and `panels
    [kv_heads, parts, slots, PANEL]`, zeros before; either may be empty."""
    tokens, kv_heads, size = x.shape
    item = _claim(counter, 0)
    while item * _TOKENS < tokens:
        for token in range(item * _TOKENS, min((item + 1) * _TOKENS, tokens)):
            slot = layout.slots[token]
            for head in range(kv_heads):
                line = x[token, head]
                if columns.size:
                    column = columns[head, slot // PANEL, :, slot % PANEL]
                    for i in range(size):
                        column[i] = line[i]
                if panels.size:
                    for start in range(0, size, PANEL):
                        part = panels[head, start // PANEL, slot]
                        for i in range(min(PANEL, size - start)):
                            part[i] = line[start + i]
        item = _claim(counter, 0)


@njit(**_OPTIONS)
def collect(counter, layout, sums, out):
    """`out [N, kv_heads, D]`, the sums of all shares, in their order."""
    tokens, kv_heads, size = out.shape
    item = _claim(counter, 0)
    while item * _TOKENS < tokens:
        for token in range(item * _TOKENS, min((item + 1) * _TOKENS, tokens)):
            slot = layout.slots[token]
            out[token] = 0
            for share in range(len(layout.reach)):
                start, stop = layout.reach[share]
                if not start <= slot // PANEL < stop:
                    continue
                at = slot + PANEL * (layout.offsets[share] - start)
                for head in range(kv_heads):
                    for first in range(0, size, PANEL):
                        part = sums[head, first // PANEL, at]
                        line = out[token, head, first:]
                        for i in range(min(PANEL, size - first)):
                            line[i] += part[i]
        item = _claim(counter, 0)


@njit(**_OPTIONS)
def _take(x, block, group, head, scale, rows):
    """A block's rows of `x [N, heads, D]`, times `scale`, in panels."""
    size = x.shape[2]
    for r in range(block[4] - block[3]):
        row = block[3] + r
        line = x[block[1] + row // group, head * group + row % group]
        for start in range(0, size, PANEL):
            part = rows[start // PANEL, r]
            for i in range(min(PANEL, size - start)):
                part[i] = line[start + i] * scale


@njit(**_OPTIONS)
def _give(rows, block, group, head, factor, out):
    """The way back: `out [N, heads, D]` of a block is `rows`, each times its `factor`."""
    size = out.shape[2]
    for r in range(block[4] - block[3]):
        row = block[3] + r
        line = out[block[1] + row // group, head * group + row % group]
        for start in range(0, size, PANEL):
            part = rows[start // PANEL, r]
            for i in range(min(PANEL, size - start)):
                line[start + i] = part[i] * factor[r]


@njit(**_OPTIONS)
def _against(rows, count, columns, slot, out, n):
    """Panel `n` of `out` is the first `count` of `rows` times panel `slot` of `columns`."""
    at, panel = slot * columns.shape[1] * PANEL, BLOCK * PANEL
    for r in range(0, count, ROWS):
        some, to = min(ROWS, count - r), n * panel + r * PANEL
        _multiply(rows, r * PANEL, panel, columns, at, out, to, some, len(rows), False)


@njit(**_OPTIONS)
def _scores(queries, columns, slices, block, group, window, scores, segments):
    """Scores of a block, -inf of what a query does not see.

    `columns [panels, D, PANEL]`. Returns the number of their panels and of `segments [*, 3]`: panel
    of scores, panel of slots and panels of keys that follow each other in both.
    """
    rows = block[4] - block[3]
    lowest, highest = block[2] + block[3] // group, block[2] + (block[4] - 1) // group
    n = m = 0
    for i in range(len(slices)):
        home, place, length = slices[i]
        low = max(0, (lowest - window + 1 - place) // PANEL)
        high = min((length + PANEL - 1) // PANEL, (highest - place) // PANEL + 1)
        if low >= high:
            continue
        segments[m, 0], segments[m, 1], segments[m, 2] = n, home + low, high - low
        m += 1
        for j in range(low, high):
            _against(queries, rows, columns, home + j, scores, n)
            first, left = place + j * PANEL, length - j * PANEL
            if left < PANEL or first + PANEL - 1 > lowest or first <= highest - window:
                for r in range(rows):
                    own = block[2] + (block[3] + r) // group
                    start = min(max(0, own - window + 1 - first), PANEL)
                    stop = max(min(own + 1 - first, left), 0)
                    scores[n, r, :start] = -np.inf
                    scores[n, r, stop:] = -np.inf
            n += 1
    return n, m


@njit(**_OPTIONS)
def _sum_up(weights, values, segments, rows, out):
    """`out = weights @ values`, of the values in slots; both in panels."""
    parts, slots, panel = len(values), values.shape[1], BLOCK * PANEL
    for p in range(parts):
        for r in range(0, rows, ROWS):
            count, to = min(ROWS, rows - r), p * panel + r * PANEL
            for i in range(len(segments)):
                n, home, depth = segments[i]
                x, y = n * panel + r * PANEL, (p * slots + home * PANEL) * PANEL
                _multiply(weights, x, panel, values, y, out, to, count, depth, i > 0)


@njit(**_OPTIONS)
def _pass_on(weights, rows, base, segments, count, out):
    """`out += weights^T @ rows`, in slots from `base` panels before a segment's own on."""
    parts, slots, panel = len(rows), out.shape[1], BLOCK * PANEL
    for i in range(len(segments)):
        n, home, depth = segments[i]
        for j in range(depth):
            for p in range(parts):
                to = (p * slots + (home + j - base) * PANEL) * PANEL
                for start, size in _TILES:
                    x, y = (n + j) * panel + start, to + start * PANEL
                    _multiply_transposed(weights, x, 0, rows, p * panel, out, y, size, count, True)


@njit(**_OPTIONS)
def forward(counter, layout, query, columns, values, scale, window, work, out, statistics):
    """What each thread does, of what no other has claimed: `out` and `statistics`.

    `query` and `out` `[N, heads, D]`; `columns [kv_heads, panels, D, PANEL]` keys and `values
    [kv_heads, parts, slots, PANEL]` in slots, `D` filled up to `parts` panels in both; `statistics
    [2, N, heads]` highest score and sum of powers. `counter` zeros `[2]`; `work` for each thread
    scores `[threads, panels of the longest path, BLOCK, PANEL]`, then queries, zero, and sums
    `[threads, parts, BLOCK, PANEL]`.
    """
    kv_heads = len(columns)
    group = query.shape[1] // kv_heads
    thread = _claim(counter, 1)
    scores, queries, sums = work[0][thread], work[1][thread], work[2][thread]
    highest, total = np.empty(BLOCK, np.float32), np.ones(BLOCK, np.float32)
    lanes = np.empty(BLOCK * _LANES, np.float32)
    segments = np.empty((len(layout.slices), 3), np.int64)
    items = len(layout.blocks) * kv_heads
    item = _claim(counter, 0)
    while item < items:
        head = item % kv_heads
        block = layout.blocks[len(layout.blocks) - 1 - item // kv_heads]
        slices = layout.slices[layout.first[block[0]] : layout.first[block[0] + 1]]
        rows = block[4] - block[3]
        _take(query, block, group, head, scale, queries)
        n, m = _scores(queries, columns[head], slices, block, group, window, scores, segments)
        _maxima(scores, n, rows, lanes, highest)
        _powers(scores, n, rows, lanes, highest, total)
        _sum_up(scores, values[head], segments[:m], rows, sums)
        for r in range(rows):
            row = block[3] + r
            token, own = block[1] + row // group, head * group + row % group
            statistics[0, token, own], statistics[1, token, own] = highest[r], total[r]
        _give(sums, block, group, head, np.float32(1) / total, out)
        item = _claim(counter, 0)


@njit(**_OPTIONS)
def backward(
    counter,
    layout,
    query,
    key_columns,
    value_columns,
    keys,
    scale,
    window,
    work,
    out,
    statistics,
    grad,
    query_grad,
    key_sums,
    value_sums,
):
    """The gradients' part of `forward`: `query_grad`, and sums of each share.

    `grad` and `query_grad` as `out`; `keys` in slots as `values`; `key_sums` and `value_sums`
    `[kv_heads, parts, PANEL offsets[shares], PANEL]`. `work` has scores, their gradients, queries,
    gradients, both zero, and sums.
    """
    kv_heads = len(keys)
    group = query.shape[1] // kv_heads
    thread = _claim(counter, 1)
    scores, score_grads = work[0][thread], work[1][thread]
    queries, above, sums = work[2][thread], work[3][thread], work[4][thread]
    highest, inverse = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    correction, scales = np.empty(BLOCK, np.float32), np.full(BLOCK, scale)
    segments = np.empty((len(layout.slices), 3), np.int64)
    items = len(layout.reach) * kv_heads
    item = _claim(counter, 0)
    while item < items:
        head, share = item % kv_heads, item // kv_heads
        start, stop = PANEL * layout.offsets[share], PANEL * layout.offsets[share + 1]
        base = layout.reach[share, 0] - layout.offsets[share]
        values = value_columns[head]
        key_sums[head, :, start:stop] = 0
        value_sums[head, :, start:stop] = 0
        for b in range(layout.bounds[share], layout.bounds[share + 1]):
            block = layout.blocks[b]
            slices = layout.slices[layout.first[block[0]] : layout.first[block[0] + 1]]
            rows = block[4] - block[3]
            _take(query, block, group, head, scale, queries)
            _take(grad, block, group, head, np.float32(1), above)
            n, m = _scores(
                queries, key_columns[head], slices, block, group, window, scores, segments
            )
            for i in range(m):
                place, home, depth = segments[i]
                for j in range(depth):
                    _against(above, rows, values, home + j, score_grads, place + j)
            for r in range(rows):
                row = block[3] + r
                token, own = block[1] + row // group, head * group + row % group
                highest[r] = statistics[0, token, own]
                inverse[r] = np.float32(1) / statistics[1, token, own]
                correction[r] = np.sum(grad[token, own] * out[token, own])
            _score_gradients(scores, score_grads, n, rows, highest, inverse, correction)
            _sum_up(score_grads, keys[head], segments[:m], rows, sums)
            _give(sums, block, group, head, scales, query_grad)
            _pass_on(scores, above, base, segments[:m], rows, value_sums[head])
            _pass_on(score_grads, queries, base, segments[:m], rows, key_sums[head])
        item = _claim(counter, 0)
