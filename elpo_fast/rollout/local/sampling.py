"""Sampling: the next token, its log-prob and the exact entropy, of two distributions.

The full distribution is softmax(logits / temperature). The sampling distribution is that, cut by
top-k, then top-p, then min-p (in this order, as transformers does) and renormalised. Tokens that
tie with the last one kept are kept. Temperature 0 takes the most likely token: as a sampling
distribution one with log-prob 0 and entropy 0, the full one is that of temperature 1.

Randomness is counter-based: token `t` of row `i` is drawn by inverting the cumulative distribution
at a uniform number that depends on (seed, i, t) alone, so a completion does not depend on what else
was in the batch. `sample` is the formulation for any device, `sample_on_cpu` the CPU's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_keys(seed: int, n: int) -> np.ndarray:
    """`uint64 [n]` independent stream keys of one request."""
    start = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64) + _GOLDEN)
    return _mix(start + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN)


def uniforms(keys: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """`float64 [R]` in [0, 1), one for each (stream key, step)."""
    return (_mix(keys + (steps.astype(np.uint64) + np.uint64(1)) * _GOLDEN) >> np.uint64(11)) * (
        2.0**-53
    )


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Parameters of `R` rows, one array each."""

    which: np.ndarray  # int64 [R], the row's line in the logits
    temperature: np.ndarray  # float32 [R]
    top_k: np.ndarray  # int64 [R], 0: off
    top_p: np.ndarray  # float32 [R]
    min_p: np.ndarray  # float32 [R]
    uniform: np.ndarray  # float64 [R]


class Drawn(NamedTuple):
    """Tokens `int32 [R]`; log-probs and entropies `float32 [R]` of the sampling distribution and,
    uncut, of the full one."""

    tokens: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    full_logprobs: np.ndarray
    full_entropies: np.ndarray


def sample(logits: torch.Tensor, batch: SamplingBatch) -> Drawn:
    """The next token of every row, from `logits` `[F, V]`."""
    device = logits.device

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)[:, None]

    temperature = column(batch.temperature)
    greedy = temperature == 0
    x = logits[torch.from_numpy(batch.which).to(device)].float()
    z = (x - x.amax(-1, keepdim=True)) / torch.where(greedy, 1.0, temperature)
    full = z.log_softmax(-1)
    z = z.masked_fill(greedy & (z < 0), -torch.inf)
    if (batch.top_k > 0).any() or (batch.top_p < 1).any() or (batch.min_p > 0).any():
        down = z.sort(-1, descending=True).values
        top_k = column(batch.top_k)
        last = torch.where(top_k > 0, top_k, z.shape[-1]).clamp(max=z.shape[-1]) - 1
        lowest = down.gather(-1, last)
        p = down.masked_fill(down < lowest, -torch.inf).double().softmax(-1)
        outside = (p.cumsum(-1) - p >= column(batch.top_p)) & (column(batch.top_p) < 1)
        outside[:, 0] = False
        lowest = lowest.maximum(
            down.masked_fill(outside, torch.inf).amin(-1, keepdim=True)
        ).maximum(column(batch.min_p).log())
        z = z.masked_fill(z < lowest, -torch.inf)
    logprobs = z.log_softmax(-1)
    mass = logprobs.double().exp().cumsum(-1)
    tokens = torch.searchsorted(mass, column(batch.uniform) * mass[:, -1:], right=True)
    # Greedy ties: the first of the most likely tokens, a distribution on one point.
    tokens = torch.where(greedy, z.argmax(-1, keepdim=True), tokens)
    columns = [
        logprobs.gather(-1, tokens).masked_fill(greedy, 0.0)[:, 0],
        _entropy(logprobs).masked_fill(greedy[:, 0], 0.0),
        full.gather(-1, tokens)[:, 0],
        _entropy(full),
    ]
    return Drawn(
        tokens[:, 0].to(torch.int32).cpu().numpy(),
        *torch.stack([column.float() for column in columns]).cpu().numpy(),
    )


def _entropy(logprobs: torch.Tensor) -> torch.Tensor:
    p = logprobs.double().exp()
    return -torch.where(p > 0, p * logprobs, 0.0).sum(-1)


def sample_on_cpu(logits: torch.Tensor, batch: SamplingBatch) -> Drawn:
    """`sample` by the CPU's kernel."""
    from elpo_fast.cpu.sampling import sample as fast

    return Drawn(*fast(logits, batch))
