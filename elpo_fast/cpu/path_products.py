"""Products and softmax of attention along paths, in registers.

A matrix `[rows, columns]` is stored in panels of `PANEL` columns, `[columns / PANEL, rows, PANEL]`,
the last one filled up with zeros. With this every distance in a product's inner loop is a constant;
LLVM would otherwise spend more on addresses than on the products. Infinities and NaN are kept: they
must show in a loss.
"""

# mypy: ignore-errors

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from elpo_fast.cpu.vectors import (
    ADDRESS,
    BIT,
    FLOAT,
    INDEX,
    LANES,
    PANEL,
    TILE_ROWS,
    TILE_SIZES,
    VECTOR,
    Arrays,
    at,
    constant,
    exponential,
    fma,
    larger,
    load,
    load_broadcast,
    of_size,
    reduced,
    store,
)

COLUMN_TILES = ((0, 11), (11, 11), (22, 10)) if PANEL == 32 else ((0, 6), (6, 6), (12, 4))
"""Columns of a panel that are rows of a transposed product."""
BLOCK = 4 * TILE_ROWS  # rows of queries at once


def _product_function(module, rows, transposed):
    """`c [rows, PANEL] = x @ w`, or added to it.

    `x [rows, PANEL depth]` in panels `stride` numbers apart, or, transposed, `[depth, rows]` of one
    panel.
    """
    name = f"path_product_{rows}_{'transposed' if transposed else 'plain'}"
    if name in module.globals:
        return module.globals[name]
    kind = ir.FunctionType(ir.VoidType(), [ADDRESS, INDEX, ADDRESS, ADDRESS, INDEX, BIT])
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block())
    x, stride, w, c, depth, add = function.args
    cells = [
        (r, i, cgutils.alloca_once(b, VECTOR)) for r in range(rows) for i in range(0, PANEL, LANES)
    ]
    with b.if_else(add) as (then, otherwise):
        with then:
            for r, i, cell in cells:
                b.store(load(b, c, r * PANEL + i), cell)
        with otherwise:
            for *_, cell in cells:
                b.store(constant(0.0), cell)

    def steps(x, w, count):
        """`count` columns of `x` and rows of `w`."""
        for k in range(count):
            weights = {i: load(b, w, k * PANEL + i) for i in range(0, PANEL, LANES)}
            for r in range(rows):
                spread = load_broadcast(b, x, k * PANEL + r if transposed else r * PANEL + k)
                for row, i, cell in cells:
                    if row == r:
                        b.store(fma(b, spread, weights[i], b.load(cell)), cell)

    if transposed:
        with cgutils.for_range(b, b.lshr(depth, INDEX(1)), intp=INDEX) as loop:
            start = b.mul(loop.index, INDEX(2 * PANEL))
            steps(at(b, x, start), at(b, w, start), 2)
        with b.if_then(b.trunc(depth, BIT)):
            start = b.mul(b.sub(depth, INDEX(1)), INDEX(PANEL))
            steps(at(b, x, start), at(b, w, start), 1)
    else:
        with cgutils.for_range(b, depth, intp=INDEX) as outer:
            left = at(b, x, b.mul(outer.index, stride))
            right = at(b, w, b.mul(outer.index, INDEX(PANEL * PANEL)))
            with cgutils.for_range(b, INDEX(PANEL // 4), intp=INDEX) as loop:
                k = b.mul(loop.index, INDEX(4))
                steps(at(b, left, k), at(b, right, b.mul(k, INDEX(PANEL))), 4)
    for r, i, cell in cells:
        store(b, b.load(cell), c, r * PANEL + i)
    b.ret_void()
    return function


def _call_product(context, builder, signature, args, transposed):
    """`_product_function` for the number of rows, or the next larger one."""
    data = Arrays(context, builder, signature, args).data(0, 3, 5)
    x, w, c = (at(builder, y, args[i]) for y, i in zip(data, (1, 4, 6), strict=True))
    stride, rows, depth, add = args[2], *args[7:]
    values = x, stride, w, c, depth, builder.trunc(add, BIT)
    sizes = sorted({size for _, size in COLUMN_TILES}) if transposed else TILE_SIZES

    def call(size):
        builder.call(_product_function(builder.module, size, transposed), values)

    of_size(builder, rows, sizes, call)
    return context.get_dummy_value()


@intrinsic
def multiply(typing_context, x, x_at, stride, w, w_at, c, c_at, rows, depth, add):
    """`c [rows, PANEL]`, from `c_at` on, is or is added `x @ w`, of `depth` panels of `x`.

    Places are counted in numbers, in arrays without gaps, of any shape. `rows` up to `TILE_ROWS`;
    there is room for so many in `x` and `c`.
    """

    def generate(context, builder, signature, args):
        return _call_product(context, builder, signature, args, False)

    i = types.int64
    return types.void(x, i, i, w, i, c, i, i, i, types.boolean), generate


@intrinsic
def multiply_transposed(typing_context, x, x_at, stride, w, w_at, c, c_at, rows, depth, add):
    """The same of the transpose of `x [depth, rows]`, columns of one panel."""

    def generate(context, builder, signature, args):
        return _call_product(context, builder, signature, args, True)

    i = types.int64
    return types.void(x, i, i, w, i, c, i, i, i, types.boolean), generate


def _for_rows(builder, panels, rows):
    """Loops over the vectors of panels `[panels, BLOCK, PANEL]`: offset and row of each."""
    b = builder
    with cgutils.for_range(b, panels, intp=INDEX) as outer:
        panel = b.mul(outer.index, INDEX(BLOCK * PANEL))
        with cgutils.for_range(b, rows, intp=INDEX) as loop:
            start = b.add(panel, b.mul(loop.index, INDEX(PANEL)))
            yield [b.add(start, INDEX(i)) for i in range(0, PANEL, LANES)], loop.index


@intrinsic
def maxima(typing_context, scores, panels, rows, lanes, highest):
    """`highest[r]`, the largest of a row's scores; `lanes [BLOCK, LANES]` is overwritten."""

    def generate(context, builder, signature, args):
        b = builder
        s, work, out = Arrays(context, b, signature, args).data(0, 3, 4)
        with cgutils.for_range(b, args[2], intp=INDEX) as loop:
            store(b, constant(-3e38), work, b.mul(loop.index, INDEX(LANES)))
        for offsets, row in _for_rows(b, args[1], args[2]):
            lane = b.mul(row, INDEX(LANES))
            most = load(b, work, lane)
            for offset in offsets:
                most = larger(b, load(b, s, offset), most)
            store(b, most, work, lane)
        with cgutils.for_range(b, args[2], intp=INDEX) as loop:
            most = load(b, work, b.mul(loop.index, INDEX(LANES)))
            b.store(reduced(b, "fmax", most, flags=("nsz",)), at(b, out, loop.index), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, i, i, lanes, highest), generate


@intrinsic
def powers(typing_context, scores, panels, rows, lanes, highest, sums):
    """Scores become e^(score - highest of its row); `sums[r]` is their sum."""

    def generate(context, builder, signature, args):
        b = builder
        s, work, top, out = Arrays(context, b, signature, args).data(0, 3, 4, 5)
        with cgutils.for_range(b, args[2], intp=INDEX) as loop:
            store(b, constant(0.0), work, b.mul(loop.index, INDEX(LANES)))
        for offsets, row in _for_rows(b, args[1], args[2]):
            lane = b.mul(row, INDEX(LANES))
            most, total = load_broadcast(b, top, row), load(b, work, lane)
            for offset in offsets:
                power = exponential(b, b.fsub(load(b, s, offset), most))
                store(b, power, s, offset)
                total = b.fadd(total, power)
            store(b, total, work, lane)
        with cgutils.for_range(b, args[2], intp=INDEX) as loop:
            total = load(b, work, b.mul(loop.index, INDEX(LANES)))
            total = reduced(b, "fadd", total, FLOAT(0.0), flags=("reassoc",))
            b.store(total, at(b, out, loop.index), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, i, i, lanes, highest, sums), generate


@intrinsic
def score_gradients(typing_context, scores, grads, panels, rows, highest, inverse, correction):
    """Scores become probabilities, gradients of these become gradients of the scores."""

    def generate(context, builder, signature, args):
        b = builder
        s, g, *numbers = Arrays(context, b, signature, args).data(0, 1, 4, 5, 6)
        for offsets, row in _for_rows(b, args[2], args[3]):
            top, inverse, correction = (load_broadcast(b, x, row) for x in numbers)
            for offset in offsets:
                p = exponential(b, b.fsub(load(b, s, offset), top))
                p = b.fmul(p, inverse)
                store(b, p, s, offset)
                store(b, b.fmul(p, b.fsub(load(b, g, offset), correction)), g, offset)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, grads, i, i, highest, inverse, correction), generate
