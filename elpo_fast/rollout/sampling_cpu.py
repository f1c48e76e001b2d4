"""Sampling on the CPU: two passes over the logits of a row, without sorting the vocabulary.

`sampling.sample` is the same in plain PyTorch and defines what this must compute. Sums over the
vocabulary are fp32 inside a block, fp64 over the blocks.
"""

# Kernels are typed by their compilation, for each dtype they are called with.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit, prange

from elpo_fast.rollout.simd import LOWEST, OPTIONS, exp, widen

_BINS, _BINS_PER_NAT = 2048, 64  # histogram of log-probabilities for top-k and top-p
_BLOCK = 256  # tokens of the vocabulary summed in fp32


@njit(**OPTIONS)
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
    lowest = LOWEST
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


@njit(**OPTIONS)
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


@njit(parallel=True, **OPTIONS)
def sample(logits, which, temperature, top_k, top_p, min_p, uniform, tokens, logprobs, entropies):
    """Draw one token a row by inverting the cumulative distribution at `uniform`.

    `logits` `[F, V]`, everything else `[R]`; writes `tokens`, `logprobs`, `entropies`. See
    `sampling.sample` for the meaning.
    """
    vocab_size = logits.shape[1]
    blocks = (vocab_size + _BLOCK - 1) // _BLOCK
    for r in prange(which.size):
        line = logits[which[r]]
        highest = LOWEST
        for i in range(vocab_size):
            highest = max(highest, widen(line[i]))
        if temperature[r] == 0:
            token = 0
            while widen(line[token]) < highest:
                token += 1
            tokens[r], logprobs[r], entropies[r] = token, 0, 0
            continue
        scale = np.float32(1) / temperature[r]
        lowest = LOWEST
        if top_k[r] > 0 or top_p[r] < 1 or min_p[r] > 0:
            lowest = _threshold(line, highest, scale, top_k[r], top_p[r], min_p[r])
        masses = np.empty(blocks, np.float64)
        total = moment = 0.0  # sums of e^z and of z e^z
        for b in range(blocks):
            mass = weighted = np.float32(0)
            for i in range(b * _BLOCK, min((b + 1) * _BLOCK, vocab_size)):
                z = (widen(line[i]) - highest) * scale
                p = exp(z) if z >= lowest else np.float32(0)
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
            z = (widen(line[i]) - highest) * scale
            if z >= lowest:
                token = i
                goal -= exp(z)
                if goal < 0:
                    break
        z = (widen(line[token]) - highest) * scale
        tokens[r] = token
        logprobs[r] = z - np.log(total)
        entropies[r] = np.log(total) - moment / total
