"""AT²PO's planner (arXiv 2601.04767): the most uncertain places of a tree are branched after.

`initial` full trajectories first. Then in every round one more continuation from each of the
`expansions` places with the largest

    H - penalty * (continuations so far - 1),

`H` being the mean entropy, in nats, of the steps that went on from there: a place that was branched
after already has to be more uncertain than others. Where no place is left, full trajectories.
"""

from __future__ import annotations

import math

from elpo_fast.algo.planners import Request, RoundsPlanner, Trajectory


class TopKPlanner(RoundsPlanner):
    """Deterministic: places are ranked, not drawn."""

    reads_entropy = True

    def __init__(self, n_total: int, initial: int, expansions: int, penalty: float) -> None:
        if not 1 <= initial <= n_total:
            raise ValueError(f"initial={initial} must be between 1 and n_total={n_total}")
        super().__init__(n_total)
        self.initial, self.expansions, self.penalty = initial, expansions, penalty
        self._entropies: dict[int, dict[int, float]] = {}  # by place, of each step that went on

    def _round(self, left: int) -> list[Request]:
        if not self.spent:
            return [Request(0, self.initial)]
        if not self._entropies:
            return [Request(0, left)]
        best = sorted(self._entropies, key=lambda place: (-self._score(place), place))
        return [Request(place, 1) for place in best[: min(left, self.expansions)]]

    def _learn(self, trajectory: Trajectory) -> None:
        following = dict(zip(trajectory.steps, trajectory.steps[1:], strict=False))
        for place, entropy in zip(trajectory.calls, trajectory.tool_entropy, strict=True):
            if math.isfinite(entropy):
                self._entropies.setdefault(place, {})[following[place]] = entropy

    def _score(self, place: int) -> float:
        seen = self._entropies[place].values()
        return sum(seen) / len(seen) - self.penalty * (len(seen) - 1)
