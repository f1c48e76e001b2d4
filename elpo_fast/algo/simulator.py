"""Scripted policies without a model, whose recoverability is known: what a search should find.

A failed trajectory of `K` tool calls has a script: `recoverability[m]`, the probability that a
continuation after call `m` succeeds. It is 0 from the first irrecoverable step on where it is
`monotone`, as bisection assumes; otherwise later steps may be recoverable again, for example
because the policy noticed by itself what it would hardly have noticed otherwise.

`theory` is the exact distribution of what Algorithm 1 finds in a trajectory: its probes are
independent, and each call is probed at most once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from elpo_fast.algo.planners import Critical, Planner, Trajectory


@dataclass(frozen=True)
class Script:
    """A failed trajectory and the truth about it."""

    trajectory: Trajectory
    recoverability: tuple[float, ...]  # after each call, [K]

    @property
    def irrecoverable(self) -> int:
        """The first irrecoverable call, from 1; K at the latest."""
        return self.recoverability.index(0.0) + 1


@dataclass(frozen=True)
class Search:
    """What a planner concluded about a script, and how many rollouts were left at the start."""

    script: Script
    critical: Critical
    left: int

    @property
    def error(self) -> int:
        """Calls by which it is too late, negative: too early."""
        return self.found - self.script.irrecoverable

    @property
    def found(self) -> int:
        """The call, from 1."""
        return self.script.trajectory.calls.index(self.critical.node) + 1


class Policy:
    """One scripted policy; full trajectories succeed with probability `solve_rate`, drawn here."""

    def __init__(
        self,
        seed: int,
        *,
        monotone: bool = True,
        max_calls: int = 12,
        signal: float = 0.3,
    ) -> None:
        """`signal`, in nats: by how much the entropy is higher after the irrecoverable call."""
        self._rng = np.random.default_rng(seed)
        self.monotone, self.max_calls, self.signal = monotone, max_calls, signal
        self.solve_rate = float(self._rng.uniform(0.1, 0.9))
        self.scripts: dict[int, Script] = {}  # of failed full trajectories, by leaf
        self.trajectories = 0
        self._chance = {0: self.solve_rate}  # of success, by the node to continue after
        self._nodes = 0

    def sample(self, node: int) -> Trajectory:
        """A trajectory that continues after `node`, which called a tool, or 0."""
        rng, leaf = self._rng, self.trajectories
        self.trajectories += 1
        correct = bool(rng.random() < self._chance[node])
        if node or correct:
            self._nodes += 1
            return Trajectory(leaf, (self._nodes,), (), correct, 0.0, (), float("nan"))
        calls = int(rng.integers(1, self.max_calls + 1))
        script = self._scripted(leaf, calls)
        self.scripts[leaf] = script
        self._chance |= zip(script.trajectory.calls, script.recoverability, strict=True)
        return script.trajectory

    def _scripted(self, leaf: int, calls: int) -> Script:
        rng = self._rng
        first = int(rng.integers(1, calls + 1))
        chances = rng.uniform(0.05, 0.95, calls)
        if self.monotone:
            chances = np.sort(chances)[::-1]
            chances[first - 1 :] = 0.0
        else:
            chances[first - 1 :] *= rng.random(calls - first + 1) < 0.3
            chances[[first - 1, -1]] = 0.0
        entropy = rng.normal(0.1, 0.2, calls)
        entropy[first - 1] += self.signal
        nodes = tuple(range(self._nodes + 1, self._nodes + calls + 2))
        self._nodes += calls + 1
        trajectory = Trajectory(
            leaf, nodes, nodes[:calls], False, 0.0, tuple(entropy.tolist()), float(entropy.mean())
        )
        return Script(trajectory, tuple(chances.tolist()))


def searches(planner: Planner, policy: Policy, n_total: int) -> Iterator[Search]:
    """Drive a planner to its end; its searches as they end. Raises `RuntimeError` where it spends
    more than `n_total` trajectories."""
    left, before = n_total, 0
    while True:
        for critical in planner.critical[before:]:
            yield Search(policy.scripts[critical.leaf], critical, left)
        before = len(planner.critical)
        if planner.done:
            return
        requests = planner.requests()
        for request in requests:
            for _ in range(request.count):
                planner.observe(policy.sample(request.node))
        if policy.trajectories > n_total:
            raise RuntimeError(f"{policy.trajectories} trajectories exceed n_total={n_total}")
        if all(request.node == 0 for request in requests):
            left = n_total - policy.trajectories


def theory(
    script: Script, counts: Sequence[int], left: int = 10**9
) -> dict[tuple[int, bool], float]:
    """Probability of each result of Algorithm 1, `(call, localized)`, with `counts [K]` suffixes
    after each call and `left` rollouts."""

    @cache
    def below(low: int, high: int, left: int) -> dict[tuple[int, bool], float]:
        if low >= high or not left:
            return {(low, low == high): 1.0}
        middle = (low + high) // 2
        spent = min(left, counts[middle - 1])
        lost = (1 - script.recoverability[middle - 1]) ** spent
        found: dict[tuple[int, bool], float] = {}
        for chance, bounds in ((lost, (low, middle)), (1 - lost, (middle + 1, high))):
            further = below(*bounds, left - spent) if chance else {}
            for result, probability in further.items():
                found[result] = found.get(result, 0.0) + chance * probability
        return found

    return below(1, len(counts), left)


def repeated(
    script: Script, make_planner: Callable[[], Planner], times: int, seed: int
) -> list[int]:
    """The call that each of `times` searches of the same trajectory finds, from 1. The planners
    have to search the first failure that they see."""
    rng = np.random.default_rng(seed)
    calls = script.trajectory.calls
    chance = dict(zip(calls, script.recoverability, strict=True))
    found = []
    for _ in range(times):
        planner, leaf = make_planner(), 0
        while not planner.critical:
            for request in planner.requests():
                for _ in range(request.count):
                    ended = script.trajectory
                    if leaf:
                        correct = bool(rng.random() < chance[request.node])
                        ended = Trajectory(leaf, (-leaf,), (), correct, 0.0, (), float("nan"))
                    planner.observe(ended)
                    leaf += 1
        found.append(calls.index(planner.critical[0].node) + 1)
    return found
