"""ARPO's planner (arXiv 2507.19849): branches where a tool's response makes the policy uncertain.

`initial` full trajectories first. After the m-th tool call of a trajectory the entropy has changed
by `H_m - H_root`, in nats; where `alpha + beta * change > threshold` another continuation is
sampled from there, the most uncertain places first, in the new trajectories as well, until the
budget is spent. What is left at the end are full trajectories.

AEPO (arXiv 2510.14545) balances this. Of the budget `k`, `k sigmoid(beta_m (H_root - H_tool))` are
full trajectories, as the first one says (`monitor`, `beta_m`; None: `initial`). And where the `l`
tool calls right before were branched after, too, `alpha + beta * change` is multiplied by
`1 - l * penalty`, down to 0.

ARPO's entropies go over the first tokens of a step, ours over all of its agent tokens; ARPO
branches while it samples, we do after a trajectory has ended, from the same places.
"""

from __future__ import annotations

import math

from elpo_fast.algo.bel import suffix_count
from elpo_fast.algo.planners import Request, RoundsPlanner, Trajectory


class EntropyPlanner(RoundsPlanner):
    """Deterministic: places are ranked, not drawn."""

    reads_entropy = True

    def __init__(
        self,
        n_total: int,
        initial: int,
        alpha: float,
        beta: float,
        threshold: float,
        penalty: float = 0.0,
        monitor: float | None = None,
    ) -> None:
        if not 1 <= initial <= n_total:
            raise ValueError(f"initial={initial} must be between 1 and n_total={n_total}")
        super().__init__(n_total)
        self.initial = initial
        self.alpha, self.beta, self.threshold = alpha, beta, threshold
        self.penalty, self.monitor = penalty, monitor
        self._places: dict[int, float] = {}  # steps to branch after, with their probability
        self._used: set[int] = set()
        self._full = 0  # full trajectories to begin with, once that is known

    def _round(self, left: int) -> list[Request]:
        if self._full > 1:  # those of the first one's places come after them
            others, self._full = self._full - 1, 1
            return [Request(0, others)]
        if not self.spent:
            asked = [Request(0, 1 if self.monitor is not None else self.initial)]
        elif self._places:
            best = sorted(self._places, key=lambda node: (-self._places[node], node))[:left]
            asked = [Request(node, 1) for node in best]
        else:
            asked = [Request(0, left)]
        self._used |= self._places.keys()
        self._places.clear()
        return asked

    def _learn(self, trajectory: Trajectory) -> None:
        if self.monitor is not None and self._full == 0:
            full = suffix_count(-trajectory.contrast, 0, self.n_total, self.monitor)
            self._full = min(self.n_total, max(1, full))
        in_a_row = 0  # branched places right before
        for node, entropy in zip(trajectory.calls, trajectory.tool_entropy, strict=True):
            chance = self.alpha + self.beta * (entropy - trajectory.root_entropy)
            chance *= max(0.0, 1.0 - self.penalty * in_a_row)
            branched = node in self._used or chance > self.threshold
            in_a_row = in_a_row + 1 if branched else 0
            if chance > self.threshold and math.isfinite(chance) and node not in self._used:
                self._places[node] = max(chance, self._places.get(node, -math.inf))
