"""Evaluation figures against brute force over subsets, permutations and simulated runs."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_fast.eval.metrics import (
    kendall_tau,
    major_at_k,
    paired_comparison,
    pairwise_accuracy,
    pass_at_k,
    wilson_interval,
)


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (6, 0), (6, 2), (6, 6), (7, 5)])
def test_pass_at_k_is_the_mean_over_all_subsets(samples, correct):
    verdicts = [index < correct for index in range(samples)]
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(verdicts, k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact():
    # 1 - C(1999, 1000) / C(2000, 1000): both overflow a double, their ratio is one half.
    assert pass_at_k(2000, 1, 1000) == 0.5


def brute_major(answers: list[str | None], right: dict[str, bool], k: int) -> Fraction:
    total, subsets = Fraction(0), 0
    for subset in itertools.combinations(answers, k):
        subsets += 1
        votes = Counter(answer for answer in subset if answer is not None)
        if votes:
            top = [answer for answer, n in votes.items() if n == max(votes.values())]
            total += Fraction(sum(right[answer] for answer in top), len(top))
    return total / subsets


@settings(max_examples=60, deadline=None)
@given(
    answers=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=8),
    right=st.fixed_dictionaries({name: st.booleans() for name in "abcd"}),
)
def test_major_at_k_is_the_mean_over_all_subsets(answers, right):
    correct = [answer is not None and right[answer] for answer in answers]
    for k in range(1, len(answers) + 1):
        expected = float(brute_major(answers, right, k))
        assert major_at_k(answers, correct, k) == pytest.approx(expected, abs=1e-12)


def test_major_at_k_of_one_sample_is_the_mean_and_of_all_is_the_vote():
    answers = ["x"] * 12 + ["y"] * 11 + [str(n) for n in range(9)]
    correct = [answer == "x" for answer in answers]
    assert major_at_k(answers, correct, 1) == pytest.approx(12 / 32)
    assert major_at_k(answers, correct, 32) == 1
    assert 12 / 32 < major_at_k(answers, correct, 16) < 1


def test_major_at_k_breaks_ties_evenly():
    assert major_at_k(["x", "y"], [True, False], 2) == 0.5
    assert major_at_k(["x", "y", "z"], [True, False, True], 3) == pytest.approx(2 / 3)


def test_major_at_k_refuses_answers_with_two_verdicts():
    with pytest.raises(ValueError, match="answer 'x' is both correct and wrong"):
        major_at_k(["x", "x"], [True, False], 1)


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_samples_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k} must lie between 1 and the number of samples, 3"):
        pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match=f"k={k} must lie between 1"):
        major_at_k(["x"] * 3, [True] * 3, k)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, Table I (method 3).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_the_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_covers_as_often_as_promised():
    trials = 64
    for p in (0.1, 0.5, 0.9):
        covered = sum(
            math.comb(trials, s) * p**s * (1 - p) ** (trials - s)
            for s in range(trials + 1)
            if wilson_interval(s, trials)[0] <= p <= wilson_interval(s, trials)[1]
        )
        assert 0.93 < covered < 0.98


def test_wilson_interval_at_the_edges():
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(5, 5)[1] == 1
    low, high = wilson_interval(12.5, 20, confidence=0.5)
    assert low < 12.5 / 20 < high
    assert wilson_interval(12.5, 20)[0] < low
    with pytest.raises(ValueError, match="successes=3 must lie between 0 and trials=2"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="confidence=95 must lie between 0 and 1"):
        wilson_interval(1, 2, confidence=95)


def test_paired_comparison_counts_and_tests_discordant_tasks():
    a = [False] * 9 + [True] * 11
    b = [True] * 8 + [False] + [True] * 10 + [False]
    result = paired_comparison(a, b)
    assert (result.better, result.worse) == (8, 1)
    assert result.difference == pytest.approx(7 / 20)
    # McNemar's exact test: both tails of nine fair coins, at most one against.
    expected = sum(math.comb(9, i) for i in range(10) if math.comb(9, i) <= math.comb(9, 1)) / 2**9
    assert result.p_value == pytest.approx(expected)
    assert 0 < result.low < result.difference < result.high


def test_paired_comparison_interval_agrees_with_resampling_tasks():
    rng = np.random.default_rng(1)
    a, b = rng.random(40), rng.random(40)
    result = paired_comparison(a, b)
    rows = rng.integers(0, 40, size=(20_000, 40))
    expected = np.quantile((b - a)[rows].mean(1), [0.025, 0.975])
    assert (result.low, result.high) == pytest.approx(tuple(expected), abs=0.01)


def test_paired_comparison_of_equal_runs_finds_nothing():
    result = paired_comparison([0.5, 1, 0], [0.5, 1, 0])
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(("a", "b"), [([1, 0], [1]), ([], []), ([[1]], [[1]])])
def test_paired_comparison_needs_the_same_tasks(a, b):
    with pytest.raises(ValueError, match="one value a task for the same tasks"):
        paired_comparison(a, b)


numbers = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9)


@given(pairs=numbers)
def test_ranking_figures_against_counting_pairs(pairs):
    concordant = discordant = x_ties = y_ties = right = differing = 0.0
    for (x1, y1), (x2, y2) in itertools.combinations(pairs, 2):
        product = (x1 - x2) * (y1 - y2)
        concordant += product > 0
        discordant += product < 0
        x_ties += x1 == x2
        y_ties += y1 == y2
        if y1 != y2:
            differing += 1
            right += 1 if product > 0 else 0.5 if x1 == x2 else 0
    total = math.comb(len(pairs), 2)
    norm = math.sqrt((total - x_ties) * (total - y_ties))
    scores, truth = zip(*pairs, strict=True)
    expected_tau = (concordant - discordant) / norm if norm else math.nan
    assert kendall_tau(scores, truth) == pytest.approx(expected_tau, nan_ok=True)
    expected = right / differing if differing else math.nan
    assert pairwise_accuracy(scores, truth) == pytest.approx(expected, nan_ok=True)


def test_ranking_figures_at_their_ends():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1 == pairwise_accuracy([1, 2, 3], [1, 2, 3])
    assert kendall_tau([3, 2, 1], [10, 20, 30]) == -1
    assert pairwise_accuracy([3, 2, 1], [1, 2, 3]) == 0
    assert pairwise_accuracy([1, 1], [1, 2]) == 0.5
    with pytest.raises(ValueError, match="must not hold NaN"):
        kendall_tau([1, math.nan], [1, 2])
    with pytest.raises(ValueError, match="need the same length"):
        pairwise_accuracy([1, 2], [1])
