"""GRPO's planner: all trajectories start at the prompt, so the tree is a star."""

from __future__ import annotations

from collections.abc import Sequence

from elpo_fast.algo.planners import Critical, Request, Trajectory


class StarPlanner:
    """Asks for `n_total` full trajectories at once and localizes nothing."""

    reads_entropy = False

    def __init__(self, n_total: int) -> None:
        if n_total < 1:
            raise ValueError(f"n_total={n_total} must be at least 1")
        self.spent = n_total
        self.critical: Sequence[Critical] = []
        self._asked = False
        self._pending = n_total

    @property
    def done(self) -> bool:
        return self._pending == 0

    def requests(self) -> list[Request]:
        if self._asked:
            return []
        self._asked = True
        return [Request(0, self.spent)]

    def observe(self, trajectory: Trajectory) -> None:
        if self.done:
            raise RuntimeError(f"leaf {trajectory.leaf} was not asked for; the budget is spent")
        self._pending -= 1
