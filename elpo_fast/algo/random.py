"""Tree-GRPO's planner (arXiv 2509.21240): trees that grow at random steps.

`trees` full trajectories first, then in rounds for each of them `expansions` continuations of
random steps that called a tool, of all that share its first step, until the budget is spent. A tree
without such a step gets another full trajectory, which is a tree of its own.
"""

from __future__ import annotations

import random

from elpo_fast.algo.planners import Request, RoundsPlanner, Trajectory


class RandomPlanner(RoundsPlanner):
    """Draws with a generator of its own, the same for every task."""

    reads_entropy = False

    def __init__(self, n_total: int, trees: int, expansions: int) -> None:
        if not 1 <= trees <= n_total:
            raise ValueError(f"trees={trees} must be between 1 and n_total={n_total}")
        super().__init__(n_total)
        self.trees, self.expansions = trees, expansions
        self._calls: dict[int, set[int]] = {}  # by first step: those that called a tool and went on
        self._random = random.Random(0)

    def _round(self, left: int) -> list[Request]:
        asked = [0] * self.trees
        if self.spent:
            asked = [
                self._random.choice(sorted(calls)) if calls else 0
                for _, calls in sorted(self._calls.items())
                for _ in range(self.expansions)
            ]
        return [Request(node, 1) for node in asked[:left]]

    def _learn(self, trajectory: Trajectory) -> None:
        going_on = set(trajectory.calls) - {trajectory.steps[-1]}
        self._calls.setdefault(trajectory.steps[0], set()).update(going_on)
