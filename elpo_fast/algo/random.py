"""Tree-GRPO's planner (arXiv 2509.21240): trees that grow at random steps.

`trees` full trajectories first, then in rounds for each of them `expansions` continuations of
random steps that called a tool, of all that share its first step, until the budget is spent. A tree
without such a step gets another full trajectory, which is a tree of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from elpo_fast.algo.planners import Critical, Request, Trajectory


class RandomPlanner:
    """Draws with a generator of its own, the same for every task."""

    reads_entropy = False

    def __init__(self, n_total: int, trees: int, expansions: int) -> None:
        if not 1 <= trees <= n_total:
            raise ValueError(f"trees={trees} must be between 1 and n_total={n_total}")
        self.n_total, self.trees, self.expansions = n_total, trees, expansions
        self.spent = 0
        self.critical: Sequence[Critical] = []
        self._pending = 0
        self._calls: dict[int, set[int]] = {}  # by first step: those that called a tool and went on
        self._random = random.Random(0)

    @property
    def done(self) -> bool:
        return self.spent == self.n_total and self._pending == 0

    def requests(self) -> list[Request]:
        if self._pending or self.done:
            return []
        asked = [0] * self.trees
        if self.spent:
            asked = [
                self._random.choice(sorted(calls)) if calls else 0
                for _, calls in sorted(self._calls.items())
                for _ in range(self.expansions)
            ]
        asked = asked[: self.n_total - self.spent]
        self._pending = len(asked)
        self.spent += len(asked)
        return [Request(node, 1) for node in asked]

    def observe(self, trajectory: Trajectory) -> None:
        if self._pending == 0:
            raise RuntimeError(f"leaf {trajectory.leaf} was not asked for; the budget is spent")
        self._pending -= 1
        going_on = set(trajectory.calls) - {trajectory.steps[-1]}
        self._calls.setdefault(trajectory.steps[0], set()).update(going_on)
