"""ARPO's planner (arXiv 2507.19849): branches where a tool's response makes the policy uncertain.

`initial` full trajectories first. After the m-th tool call of a trajectory the entropy has changed
by `H_m - H_root`, in nats; where `alpha + beta * change > threshold` another continuation is
sampled from there, the most uncertain places first, in the new trajectories as well, until the
budget is spent. What is left at the end are full trajectories.

ARPO's entropies go over the first tokens of a step, ours over all of its agent tokens; ARPO
branches while it samples, we do after a trajectory has ended, from the same places.
"""

from __future__ import annotations

import math

from elpo_fast.algo.planners import Request, RoundsPlanner, Trajectory


class EntropyPlanner(RoundsPlanner):
    """Deterministic: places are ranked, not drawn."""

    reads_entropy = True

    def __init__(
        self, n_total: int, initial: int, alpha: float, beta: float, threshold: float
    ) -> None:
        if not 1 <= initial <= n_total:
            raise ValueError(f"initial={initial} must be between 1 and n_total={n_total}")
        super().__init__(n_total)
        self.initial = initial
        self.alpha, self.beta, self.threshold = alpha, beta, threshold
        self._places: dict[int, float] = {}  # steps to branch after, with their probability
        self._used: set[int] = set()

    def _round(self, left: int) -> list[Request]:
        if not self.spent:
            asked = [Request(0, self.initial)]
        elif self._places:
            best = sorted(self._places, key=lambda node: (-self._places[node], node))[:left]
            asked = [Request(node, 1) for node in best]
        else:
            asked = [Request(0, left)]
        self._used |= self._places.keys()
        self._places.clear()
        return asked

    def _learn(self, trajectory: Trajectory) -> None:
        for node, entropy in zip(trajectory.calls, trajectory.tool_entropy, strict=True):
            chance = self.alpha + self.beta * (entropy - trajectory.root_entropy)
            if chance > self.threshold and math.isfinite(chance) and node not in self._used:
                self._places[node] = max(chance, self._places.get(node, -math.inf))
