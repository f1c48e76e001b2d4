"""Bayesian bisection: BEL's search with a belief about where the error is.

Algorithm 1 takes a prefix whose few suffixes all fail for lost, and never comes back. Here the step
`t` is uncertain, with equal odds at the start: a success after call `m` says `t > m` for certain, a
failure makes `t <= m` more likely, but by no more than it should. With `q` the chance of a suffix
from a prefix that can recover, itself unknown and the same for all of them,

    P(success after m | t, q) = q if m < t, else 0.

Each round asks for `x_min` suffixes where one of them is expected to tell most about `t`, and the
search ends when one step has a probability of `confidence`, or when it has cost as many suffixes as
bisection takes at most rounds, at `(x_min + x_max) / 2` each. The most probable step is the result.
All else is as in `elpo_fast.algo.bel`, the budget included.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from elpo_fast.algo.bel import BelPlanner, Search
from elpo_fast.algo.planners import Trajectory

_CHANCES = np.linspace(0.05, 0.95, 10)  # values of q, with equal odds
Floats = NDArray[np.float64]


def likelihood(calls: int, anchor: int, successes: int, failures: int) -> Floats:
    """Of what suffixes after call `anchor` did, given the step and `q`, `[calls, 10]`."""
    possible = _CHANCES**successes * (1 - _CHANCES) ** failures
    lost = np.full(len(_CHANCES), float(successes == 0))
    return np.where(np.arange(1, calls + 1)[:, None] > anchor, possible, lost)


def posterior(calls: int, probes: list[tuple[int, int, int]]) -> Floats:
    """Probability of each step `[calls]`, given `(anchor, successes, failures)` of probes."""
    belief = np.ones((calls, len(_CHANCES)))
    for probe in probes:
        belief *= likelihood(calls, *probe)
    return belief.sum(1) / belief.sum()


class BayesPlanner(BelPlanner):
    """`planner: bel_bayes`."""

    def __init__(
        self, n_total: int, b_max: int, x_min: int, x_max: int, beta: float, confidence: float
    ) -> None:
        if not 0 < confidence <= 1:
            raise ValueError(f"confidence={confidence} must be above 0 and at most 1")
        self.confidence = confidence
        super().__init__(n_total, b_max, x_min, x_max, beta)

    def search_in(self, reference: Trajectory) -> Search:
        calls = len(reference.calls)
        rounds = math.ceil(math.log2(max(calls, 1)))
        suffixes = math.ceil(rounds * (self.x_min + self.x_max) / 2)
        return BayesSearch(reference, [self.x_min] * calls, suffixes, self.confidence)


class BayesSearch(Search):
    """Ends after `suffixes` suffixes."""

    def __init__(
        self, reference: Trajectory, counts: list[int], suffixes: int, confidence: float
    ) -> None:
        super().__init__(reference, counts)
        self._left, self._confidence = suffixes, confidence
        self._belief = np.full((len(counts), len(_CHANCES)), 1 / max(len(counts), 1))

    @property
    def settled(self) -> bool:
        return self._left <= 0 or float(self._odds.max(initial=0)) >= self._confidence

    @property
    def step(self) -> int:
        return int(self._odds.argmax()) + 1

    def next_probe(self) -> tuple[int, int]:
        middle = len(self.counts) / 2
        anchors = range(1, len(self.counts))
        self.anchor = max(anchors, key=lambda at: (round(self._told(at), 9), -abs(at - middle)))
        return self.anchor, min(self.counts[self.anchor - 1], self._left)

    def learn(self, successes: int, failures: int) -> None:
        self._left -= successes + failures
        self._belief *= likelihood(len(self._belief), self.anchor, successes, failures)
        self._belief /= self._belief.sum()

    @property
    def _odds(self) -> Floats:
        """`[K]`."""
        return self._belief.sum(1) / self._belief.sum()

    def _told(self, anchor: int) -> float:
        """By how much one suffix after call `anchor` is expected to lower the entropy of the step;
        equal ones go to the middle."""
        calls, now = len(self._belief), self._belief / self._belief.sum()
        after = 0.0
        for outcome in ((1, 0), (0, 1)):
            joint = (now * likelihood(calls, anchor, *outcome)).sum(1)
            chance = joint.sum()
            if chance > 0:
                after += chance * _entropy(joint / chance)
        return _entropy(self._odds) - after


def _entropy(odds: Floats) -> float:
    some = odds[odds > 0]
    return float(-(some * np.log(some)).sum())
