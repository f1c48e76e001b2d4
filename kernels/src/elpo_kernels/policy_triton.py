"""`policy.surrogate` as one Triton kernel, a block of tokens a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elpo_kernels.policy import Clip

BLOCK = 256


@triton.jit
def surrogate_kernel(  # type: ignore[no-untyped-def]
    logprob,  # [T]
    old,  # [T]
    pos,  # [T]
    neg,  # [T]
    eps_low,  # [T] or one value
    eps_high,  # [T] or one value
    loss,  # [T] out
    slope,  # [T] out
    log_ratio,  # [T] out
    flags,  # [T] out
    ratio_cap,
    count,
    LOW_STEP: tl.constexpr,  # 1: a bound for every token, 0: one for all
    HIGH_STEP: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    p = tl.load(pos + at, mask=inside, other=0.0)
    n = tl.load(neg + at, mask=inside, other=0.0)
    has_pos, has_neg = p != 0, n != 0
    x = tl.load(logprob + at, mask=inside, other=0.0) - tl.load(old + at, mask=inside, other=0.0)
    x = tl.where(has_pos | has_neg, x, 0.0)
    is_nan = x != x
    bounded = tl.where(is_nan, x, tl.minimum(tl.maximum(x, -LIMIT), LIMIT))
    ratio = tl.exp(bounded)
    top = 1 + tl.load(eps_high + at * HIGH_STEP, mask=inside, other=0.0)
    bottom = 1 - tl.load(eps_low + at * LOW_STEP, mask=inside, other=0.0)
    high, low, capped = ratio > top, ratio < bottom, ratio > ratio_cap
    gain = tl.where(has_pos, p * tl.where(high, top, ratio), 0.0)
    gain += tl.where(has_neg, n * tl.where(low, bottom, tl.minimum(ratio, ratio_cap)), 0.0)
    steep = tl.where(high, 0.0, p) + tl.where(low | capped, 0.0, n)
    steep = tl.where(bounded == x, -steep * ratio, 0.0)
    mark = tl.where(has_neg & low, 1, 0) + tl.where(has_pos & high, 2, 0)
    mark += tl.where(has_neg & capped, 4, 0)
    tl.store(loss + at, -gain, mask=inside)
    tl.store(slope + at, tl.where(is_nan, x, steep), mask=inside)
    tl.store(log_ratio + at, bounded, mask=inside)
    tl.store(flags + at, mark.to(tl.int8), mask=inside)


def surrogate(logprob: Tensor, clip: Clip, limit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `policy.Surrogate`; float32. `limit` of the log-ratio."""
    old = logprob if clip.old_logprob is None else clip.old_logprob
    loss, slope, log_ratio = (torch.empty_like(logprob) for _ in range(3))
    flags = torch.empty_like(logprob, dtype=torch.int8)
    count = len(logprob)
    if count == 0:
        return loss, slope, log_ratio, flags
    with torch.cuda.device_of(logprob):
        surrogate_kernel[(triton.cdiv(count, BLOCK),)](
            logprob,
            old.contiguous(),
            clip.pos.contiguous(),
            clip.neg.contiguous(),
            clip.eps_low.contiguous(),
            clip.eps_high.contiguous(),
            loss,
            slope,
            log_ratio,
            flags,
            clip.ratio_cap,
            count,
            LOW_STEP=clip.eps_low.ndim,
            HIGH_STEP=clip.eps_high.ndim,
            LIMIT=limit,
            BLOCK=BLOCK,
        )
    return loss, slope, log_ratio, flags
