"""The planner of VinePPO (arXiv 2410.01679) and SPO (arXiv 2505.23564): values at cut points.

A full trajectory, then `continuations` of each of `cuts` places that divide its tool calls into
parts of equal number (every call, where there are fewer), and so on with the next trajectory until
the budget is spent: together with the advantage `child_value` each part is worth what it adds.
"""

from __future__ import annotations

from elpo_fast.algo.planners import Request, RoundsPlanner, Trajectory


class SegmentPlanner(RoundsPlanner):
    """Deterministic; the cuts do not depend on the outcome."""

    reads_entropy = False

    def __init__(self, n_total: int, cuts: int, continuations: int) -> None:
        super().__init__(n_total)
        self.cuts, self.continuations = cuts, continuations
        self._cut: Trajectory | None = None  # to be cut next
        self._full = False  # whether the round asks for a full trajectory

    def _round(self, left: int) -> list[Request]:
        trajectory, self._cut = self._cut, None
        asked: list[Request] = []
        if trajectory is not None:
            places = [call for call in trajectory.calls if call != trajectory.steps[-1]]
            parts, number = len(places) + 1, min(self.cuts, len(places))
            for cut in range(1, number + 1):
                count = min(self.continuations, left)
                if count:
                    asked.append(Request(places[cut * parts // (number + 1) - 1], count))
                left -= count
        self._full = not asked
        return asked or [Request(0, 1)]

    def _learn(self, trajectory: Trajectory) -> None:
        if self._full:
            self._cut = trajectory
