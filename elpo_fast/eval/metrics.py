"""Evaluation figures as pure functions of verdicts and scores.

Everything is exact but `paired_comparison`'s interval, a bootstrap with a fixed seed. Success is a
share in [0, 1]; a task's samples are exchangeable, so no figure depends on their order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of `k` of a task's samples is correct.

    Unbiased (Chen et al. 2021): the mean over all subsets of size `k`, 1 - C(n-c, k) / C(n, k).
    """
    _check_k(samples, k)
    if not 0 <= correct <= samples:
        raise ValueError(f"correct={correct} must lie between 0 and samples={samples}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def major_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Probability that the majority vote of `k` of a task's samples is correct.

    The mean over all subsets of size `k`, computed exactly; ties are broken uniformly at random.
    `answers` are the samples' answers, equal ones voting together and `None` not at all; a subset
    without any vote is wrong. Raises `ValueError` where equal answers differ in `correct`.
    """
    _check_k(len(answers), k)
    votes: Counter[Hashable] = Counter(answer for answer in answers if answer is not None)
    right: dict[Hashable, bool] = {}
    for answer, verdict in zip(answers, correct, strict=True):
        if answer is not None and right.setdefault(answer, bool(verdict)) != bool(verdict):
            raise ValueError(f"answer {answer!r} is both correct and wrong; normalise the answers")
    abstaining = len(answers) - votes.total()
    won = Fraction(0)
    for answer, count in votes.items():
        if not right[answer]:
            continue
        rivals = [other for name, other in votes.items() if name != answer]
        for got in range(1, min(count, k) + 1):
            ways = math.comb(count, got)
            for ties, fillings in enumerate(_fillings(rivals, abstaining, got, k - got)):
                won += Fraction(ways * fillings, ties + 1)
    return float(won / math.comb(len(answers), k))


def _fillings(rivals: Sequence[int], abstaining: int, top: int, size: int) -> list[int]:
    """Ways to choose `size` samples so that no rival gets more than `top` votes, by the number of
    rivals that get exactly `top`."""
    # ways[chosen][ties], a rival a time; those who abstain come last and never tie.
    ways = [[0] * (len(rivals) + 1) for _ in range(size + 1)]
    ways[0][0] = 1
    for count in rivals:
        grown = [[0] * (len(rivals) + 1) for _ in range(size + 1)]
        for chosen, row in enumerate(ways):
            for ties, number in enumerate(row):
                for votes in range(min(count, top, size - chosen) + 1) if number else ():
                    grown[chosen + votes][ties + (votes == top)] += number * math.comb(count, votes)
        ways = grown
    totals = [0] * (len(rivals) + 1)
    for chosen, row in enumerate(ways):
        for ties, number in enumerate(row):
            totals[ties] += number * math.comb(abstaining, size - chosen)
    return totals


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success probability; (0, 1) without trials.

    `successes` may be fractional, for example the sum of each task's mean over several samples.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} must lie between 0 and trials={trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, for example 0.95")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    scale = 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    reach = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)) / scale
    return max(0.0, middle - reach), min(1.0, middle + reach)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Run `b` against run `a` on the same tasks."""

    difference: float  # mean of b - a over tasks
    low: float  # bounds of the difference's paired bootstrap interval, of 95 %
    high: float
    better: int  # tasks on which b is above a
    worse: int
    p_value: float  # two-sided exact sign test; for one sample a task, McNemar's exact test


def paired_comparison(a: ArrayLike, b: ArrayLike) -> Comparison:
    """Compare two runs by their success on each task, [N] bool or share in [0, 1]."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(
            f"paired runs need one value a task for the same tasks, got shapes {first.shape} "
            f"and {second.shape}"
        )
    gaps = second - first
    better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
    # Resampled tasks are counts over the distinct gaps: small however many tasks there are.
    values, counts = np.unique(gaps, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(gaps.size, counts / gaps.size, size=10_000)
    low, high = np.quantile(drawn @ values / gaps.size, [0.025, 0.975])
    return Comparison(
        float(gaps.mean()), float(low), float(high), better, worse, _sign_test(better, worse)
    )


def _sign_test(better: int, worse: int) -> float:
    """Probability of a split at least as uneven if both directions were equally likely."""
    total = better + worse
    tail = sum(math.comb(total, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**total)


def kendall_tau(scores: ArrayLike, truth: ArrayLike) -> float:
    """Kendall's tau-b of two rankings [N], ties accounted for; NaN where either is all ties."""
    x, y = _pair_signs(scores, truth)
    norm = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / norm if norm else math.nan


def pairwise_accuracy(scores: ArrayLike, truth: ArrayLike) -> float:
    """Share of the pairs that differ in `truth` [N] which `scores` [N] put in the right order, a
    tie in `scores` counting half; NaN where no pair differs."""
    x, y = _pair_signs(scores, truth)
    differing = y != 0
    return float((1 + x * y)[differing].mean() / 2) if differing.any() else math.nan


def _pair_signs(scores: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Sign of the difference of each of the N(N-1)/2 pairs, in both."""
    first, second = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"scores and truth need the same length, got shapes {first.shape} and {second.shape}"
        )
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("scores and truth must not hold NaN; leave those items out")
    left, right = np.triu_indices(first.size, 1)
    return np.sign(first[left] - first[right]), np.sign(second[left] - second[right])


def _check_k(samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must lie between 1 and the number of samples, {samples}")
