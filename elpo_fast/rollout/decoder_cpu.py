"""The decoder's operations on the CPU: everything in a step that is not a matrix product.

Numba, parallel over nodes and key heads. `decoder_torch` is the same in plain PyTorch and defines
what these must compute.
"""

# Kernels are typed by their compilation, for each dtype they are called with.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit, prange

from elpo_fast.rollout.simd import LOWEST, OPTIONS, exp, narrow, scores, weighted_sum, widen


@njit(parallel=True, **OPTIONS)
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


@njit(parallel=True, **OPTIONS)
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


@njit(inline="always", **OPTIONS)
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


@njit(parallel=True, **OPTIONS)
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
                values[slot, h, i] = qkv[r, start + i]


@njit(parallel=True, **OPTIONS)
def attend(queries, keys, values, table, first, positions, out):
    """Attention of node `q` over the slots `table[first[q] : first[q] + positions[q] + 1]`.

    `queries` `[Q, kv_heads]` of `simd.query_heads`, scaled; `keys` and `values` `[S, kv_heads]` of
    `simd.head`; `out` `[Q, heads * D]`.
    """
    nodes, kv_heads = queries.shape
    group, width = queries[0, 0].x.shape
    for item in prange(nodes * kv_heads):
        q, h = item // kv_heads, item % kv_heads
        length = positions[q] + 1
        path = table[first[q] : first[q] + length]
        weights = np.empty((group, length), np.float32)
        mean = np.empty((group, width), np.float32)
        scores(queries, q, h, keys, path, weights)
        for g in range(group):
            line = weights[g]
            highest = LOWEST
            for t in range(length):
                highest = max(highest, line[t])
            total = np.float32(0)
            for t in range(length):
                p = exp(line[t] - highest)
                line[t] = p
                total += p
            scale = np.float32(1) / total
            for t in range(length):
                line[t] *= scale
        weighted_sum(weights, queries, h, values, path, mean)
        for g in range(group):
            for i in range(width):
                out[q, (h * group + g) * width + i] = narrow(mean[g, i], out)
