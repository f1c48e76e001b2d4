"""The decoder's CPU kernels: everything in a step that is not a matrix product.

Numba, parallel over rows and key/value heads. bfloat16 arrays come in as `uint16` and are widened
in registers; all arithmetic is fp32, sums over the vocabulary fp64. `decoder_torch` and
`sampling.sample` are the same in plain PyTorch and define what these must compute.
"""

# Kernels are typed by their compilation, for each dtype they are called with.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic, overload

_OPTIONS = {"cache": True, "fastmath": True, "error_model": "numpy", "nogil": True}
_BINS, _BINS_PER_NAT = 2048, 64  # histogram of log-probabilities for top-k and top-p
_BLOCK = 256  # tokens of the vocabulary summed in fp32 before fp64 takes over
_LOWEST = np.float32(-3e38)  # fastmath knows no infinities


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


def _widen(x):
    """float32 of an array element, which is float32 or a bfloat16 in a uint16."""


@overload(_widen, inline="always")
def _widen_overload(x):
    if x == types.uint16:
        return lambda x: _to_float(np.uint32(x) << np.uint32(16))
    return lambda x: x


def _narrow(value, like):
    """`value` (float32) as an element of the array `like`, rounded to nearest even."""


@overload(_narrow, inline="always")
def _narrow_overload(value, like):
    if like.dtype == types.uint16:

        def to_bfloat16(value, like):
            bits = _to_bits(np.float32(value))
            bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            return np.uint16(bits >> np.uint32(16))

        return to_bfloat16
    return lambda value, like: value


@njit(inline="always", **_OPTIONS)
def _exp(z):
    """e^z for z <= 0, as a polynomial that vectorises; relative error 5e-8 (1 + |z|)."""
    t = max(z, np.float32(-87.0)) * np.float32(1.44269504)
    n = np.rint(t)
    f = t - n
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    return p * _to_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@njit(parallel=True, **_OPTIONS)
def add_norm(residual, delta, weight, eps, out):
    """`residual += delta`; `out = residual / rms(residual) * weight`; all `[Q, H]`."""
    rows, width = residual.shape
    for r in prange(rows):
        total = np.float32(0)
        for i in range(width):
            x = residual[r, i] + _widen(delta[r, i])
            residual[r, i] = x
            total += x * x
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            out[r, i] = _narrow(residual[r, i] * scale * weight[i], out)


@njit(parallel=True, **_OPTIONS)
def silu_mul(gate_up, out):
    """`out = silu(gate) * up` of `gate_up` `[Q, 2 I]`."""
    rows, width = out.shape
    one = np.float32(1)
    for r in prange(rows):
        for i in range(width):
            x = _widen(gate_up[r, i])
            e = _exp(-abs(x))
            sigmoid = (one if x >= 0 else e) / (one + e)
            out[r, i] = _narrow(x * sigmoid * _widen(gate_up[r, width + i]), out)


@njit(inline="always", **_OPTIONS)
def _rotate(x, weight, eps, cos, sin, scale, out):
    """Optional RMS norm (empty `weight`: none) and rotary embedding of one head, times `scale`."""
    half = cos.size
    if weight.size:
        total = np.float32(0)
        for i in range(2 * half):
            total += _widen(x[i]) * _widen(x[i])
        norm = np.float32(1) / np.sqrt(total / np.float32(2 * half) + eps)
        for i in range(half):
            a = _widen(x[i]) * norm * weight[i]
            b = _widen(x[half + i]) * norm * weight[half + i]
            out[i] = _narrow((a * cos[i] - b * sin[i]) * scale, out)
            out[half + i] = _narrow((b * cos[i] + a * sin[i]) * scale, out)
    else:
        for i in range(half):
            a, b = _widen(x[i]), _widen(x[half + i])
            out[i] = _narrow((a * cos[i] - b * sin[i]) * scale, out)
            out[half + i] = _narrow((b * cos[i] + a * sin[i]) * scale, out)


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
                values[slot, h, i] = qkv[r, start + i]


@njit(parallel=True, **_OPTIONS)
def attend(queries, keys, values, table, first, positions, out):
    """Attention of query `r` over the slots `table[first[r] : first[r] + positions[r] + 1]`.

    `queries` `[Q, heads, D]` fp32 and scaled, `keys` and `values` `[S, kv_heads, D]`, `out`
    `[Q, heads * D]`.
    """
    rows, heads, width = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    for item in prange(rows * kv_heads):
        r, h = item // kv_heads, item % kv_heads
        length = positions[r] + 1
        path = table[first[r] : first[r] + length]
        fours = length // 4 * 4
        scores = np.empty((group, length), np.float32)
        tile = np.empty((4, width), np.float32)
        for t in range(0, fours, 4):
            for c in range(4):
                key = keys[path[t + c], h]
                for i in range(width):
                    tile[c, i] = _widen(key[i])
            for g in range(group):
                query = queries[r, h * group + g]
                s0 = s1 = s2 = s3 = np.float32(0)
                for i in range(width):
                    x = query[i]
                    s0 += x * tile[0, i]
                    s1 += x * tile[1, i]
                    s2 += x * tile[2, i]
                    s3 += x * tile[3, i]
                scores[g, t] = s0
                scores[g, t + 1] = s1
                scores[g, t + 2] = s2
                scores[g, t + 3] = s3
        for t in range(fours, length):
            key = keys[path[t], h]
            for g in range(group):
                s0 = np.float32(0)
                for i in range(width):
                    s0 += queries[r, h * group + g, i] * _widen(key[i])
                scores[g, t] = s0
        for g in range(group):
            highest = scores[g, 0]
            for t in range(length):
                highest = max(highest, scores[g, t])
            total = np.float32(0)
            for t in range(length):
                p = _exp(scores[g, t] - highest)
                scores[g, t] = p
                total += p
            total = np.float32(1) / total
            for t in range(length):
                scores[g, t] *= total
        mean = np.zeros((group, width), np.float32)
        for t in range(0, fours, 4):
            for c in range(4):
                value = values[path[t + c], h]
                for i in range(width):
                    tile[c, i] = _widen(value[i])
            for g in range(group):
                p0, p1, p2, p3 = scores[g, t], scores[g, t + 1], scores[g, t + 2], scores[g, t + 3]
                for i in range(width):
                    mean[g, i] += (
                        p0 * tile[0, i] + p1 * tile[1, i] + p2 * tile[2, i] + p3 * tile[3, i]
                    )
        for t in range(fours, length):
            value = values[path[t], h]
            for g in range(group):
                for i in range(width):
                    mean[g, i] += scores[g, t] * _widen(value[i])
        for g in range(group):
            for i in range(width):
                out[r, (h * group + g) * width + i] = _narrow(mean[g, i], out)


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
        z = (_widen(logits[i]) - highest) * scale
        b = min(np.int64(-z * np.float32(_BINS_PER_NAT)), _BINS - 1)
        count[b] += 1
        mass[b] += _exp(z)
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
                kept += _exp(z)
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
            heavier += _exp(z)
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
        z = (_widen(logits[i]) - highest) * scale
        if min(np.int64(-z * np.float32(_BINS_PER_NAT)), _BINS - 1) == b:
            members[m] = z
            m += 1
    return np.sort(members)[::-1]


@njit(parallel=True, **_OPTIONS)
def sample(logits, which, temperature, top_k, top_p, min_p, uniform, tokens, logprobs, entropies):
    """Draw one token a row by inverting the cumulative distribution at `uniform`.

    `logits` `[F, V]`, everything else `[R]`; writes `tokens`, `logprobs`, `entropies`. See
    `sampling.sample` for the meaning.
    """
    vocab_size = logits.shape[1]
    blocks = (vocab_size + _BLOCK - 1) // _BLOCK
    for r in prange(which.size):
        line = logits[which[r]]
        highest = _LOWEST
        for i in range(vocab_size):
            highest = max(highest, _widen(line[i]))
        if temperature[r] == 0:
            token = 0
            while _widen(line[token]) < highest:
                token += 1
            tokens[r], logprobs[r], entropies[r] = token, 0, 0
            continue
        scale = np.float32(1) / temperature[r]
        lowest = _LOWEST
        if top_k[r] > 0 or top_p[r] < 1 or min_p[r] > 0:
            lowest = _threshold(line, highest, scale, top_k[r], top_p[r], min_p[r])
        masses = np.empty(blocks, np.float64)
        total = moment = 0.0  # sums of e^z and of z e^z
        for b in range(blocks):
            mass = weighted = np.float32(0)
            for i in range(b * _BLOCK, min((b + 1) * _BLOCK, vocab_size)):
                z = (_widen(line[i]) - highest) * scale
                p = _exp(z) if z >= lowest else np.float32(0)
                mass += p
                weighted += p * z
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
            z = (_widen(line[i]) - highest) * scale
            if z >= lowest:
                token = i
                goal -= _exp(z)
                if goal < 0:
                    break
        z = (_widen(line[token]) - highest) * scale
        tokens[r] = token
        logprobs[r] = z - np.log(total)
        entropies[r] = np.log(total) - moment / total
