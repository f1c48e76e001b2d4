"""GRPO's planner: all trajectories start at the prompt, so the tree is a star."""

from __future__ import annotations

from elpo_fast.algo.planners import Request, RoundsPlanner, Trajectory


class StarPlanner(RoundsPlanner):
    """Asks for `n_total` full trajectories at once and localizes nothing."""

    reads_entropy = False

    def _round(self, left: int) -> list[Request]:
        return [Request(0, left)]

    def _learn(self, trajectory: Trajectory) -> None:
        pass
