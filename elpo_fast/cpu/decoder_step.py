"""A whole step of the decoder as one parallel region.

Waking a thread costs 50 to 100 us, and a step has hundreds of operations. The threads meet in a
counter for each operation, from which they claim parts of it and in which they report them; whoever
finds none left waits until all are reported. A thread that comes late, or never, costs time but
nothing else.

What it brings: a step of 64 rows of SmolLM2 takes 87 to 89 ms instead of the 120 to 127 of one
operation after the other, one of 8 rows 22 instead of 52 (two cores of a Xeon without AMX).
"""

# mypy: ignore-errors

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import prange

from elpo_fast.cpu.decoder_attention import attend_item
from elpo_fast.cpu.decoder_elements import rope_store_row
from elpo_fast.cpu.decoder_products import multiply_tile
from elpo_fast.cpu.elements import exp, narrow, widen
from elpo_fast.cpu.kernel import kernel
from elpo_fast.cpu.threads import count as counted
from elpo_fast.cpu.threads import give_way, relax, seen
from elpo_fast.cpu.vectors import PANEL, TILE_ROWS

COUNTER = 16  # numbers of a counter, on cache lines of its own: parts claimed, and parts done
OPERATIONS = 8  # of a layer
_SPINS = 4096  # looks at a counter before other processes are let in
_STORE, _ADD, _SILU = range(3)


class PackedWeights(
    namedtuple(
        "PackedWeights",
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


@kernel(fast=True)
def _claim(counters, operation, parts, chunk):
    """Bounds of the next parts to do; the first is not below `parts` when none are left."""
    start = counted(counters, operation * COUNTER, chunk)
    return start, min(start + chunk, parts)


@kernel(fast=True)
def _done(counters, operation, parts):
    counted(counters, operation * COUNTER + COUNTER // 2, parts)


@kernel(fast=True)
def _wait(counters, operation, parts):
    """Until all parts are done."""
    spins = 0
    while seen(counters, operation * COUNTER + COUNTER // 2) < parts:
        spins += 1
        if spins < _SPINS:
            relax()
        else:
            give_way()


@kernel(fast=True)
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


@kernel(fast=True)
def multiply(counters, operation, share, x, rows, weight, bias, out, how):
    """`x[:rows] @ weight + bias`: stored, added to `out`, or its gated half."""
    panels = len(weight)
    chunk = max(1, panels // share)
    tile = np.empty((TILE_ROWS, PANEL), np.float32)
    start, stop = _claim(counters, operation, panels, chunk)
    while start < panels:
        for p in range(start, stop):
            for first in range(0, rows, TILE_ROWS):
                count = min(rows - first, TILE_ROWS)
                multiply_tile(x, first, count, weight, p, tile)
                _finish(tile[:count], bias[p * PANEL : (p + 1) * PANEL], out, first, p, how)
        _done(counters, operation, stop - start)
        start, stop = _claim(counters, operation, panels, chunk)
    _wait(counters, operation, panels)


@kernel(fast=True)
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


@kernel(fast=True, inline="always")
def _work(counters, share, w, b, cos, sin, eps, keys, values, key_heads, value_heads, nodes, ends):
    """What each thread of `forward` does."""
    positions, slots, table, first = nodes
    rows = len(positions)
    every = np.arange(rows)
    n = 0
    for layer in range(len(w.qkv)):
        _norms(counters, n, share, b.residual, every, w.before_attention[layer], eps, b.hidden)
        qkv, bias = w.qkv[layer], w.qkv_bias[layer]
        multiply(counters, n + 1, share, b.hidden, rows, qkv, bias, b.qkv, _STORE)

        chunk = max(1, rows // share)
        start, stop = _claim(counters, n + 2, rows, chunk)
        while start < rows:
            for r in range(start, stop):
                c, s = cos[positions[r]], sin[positions[r]]
                key, value = keys[layer, slots[r]], values[layer, slots[r]]
                norms = w.query_norm[layer], w.key_norm[layer]
                rope_store_row(b.qkv[r], norms[0], norms[1], eps, c, s, b.queries[r], key, value)
            _done(counters, n + 2, stop - start)
            start, stop = _claim(counters, n + 2, rows, chunk)
        _wait(counters, n + 2, rows)

        key, value = key_heads[layer], value_heads[layer]
        items = rows * b.heads.shape[1]
        chunk = max(1, items // (4 * share))  # paths differ in length
        start, stop = _claim(counters, n + 3, items, chunk)
        while start < items:
            for item in range(start, stop):
                attend_item(item, b.heads, key, value, table, first, positions, b.mixed)
            _done(counters, n + 3, stop - start)
            start, stop = _claim(counters, n + 3, items, chunk)
        _wait(counters, n + 3, items)

        out, bias = w.out[layer], w.out_bias[layer]
        multiply(counters, n + 4, share, b.mixed, rows, out, bias, b.residual, _ADD)
        _norms(counters, n + 5, share, b.residual, every, w.before_mlp[layer], eps, b.hidden)
        gate_up, bias = w.gate_up[layer], w.gate_up_bias[layer]
        multiply(counters, n + 6, share, b.hidden, rows, gate_up, bias, b.inner, _SILU)
        down, bias = w.down[layer], w.down_bias[layer]
        multiply(counters, n + 7, share, b.inner, rows, down, bias, b.residual, _ADD)
        n += OPERATIONS
    _norms(counters, n, share, b.residual, ends, w.norm, eps, b.last)
    multiply(counters, n + 1, share, b.last, ends.size, w.head, w.head_bias, b.logits, _STORE)


@kernel(fast=True, parallel=True)
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
