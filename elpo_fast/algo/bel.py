"""Binary error localization (Algorithm 1): find the first irrecoverable step of failures.

Full trajectories are sampled until the buffer holds `b_max` failures. The one with the largest
entropy contrast (Eq. 4) becomes the reference, the buffer is cleared, and a binary search over its
tool calls samples suffixes: where any suffix of a prefix succeeds the error lies later, where all
fail it lies there or earlier. Then the next round begins, until the budget is spent.

What runs concurrently: the full trajectories that the buffer still lacks (Algorithm 1 needs at
least that many, one after the other or not) and all suffixes of one anchor. There is never more
than one request in flight, so that a tree does not depend on who finishes first.

Choices where the paper is silent:
- `X_m` is rounded to the nearest integer, and cut to what the budget still allows.
- A step without agent tokens after a tool call (turn limit) tells nothing: its `H_tool_m - H_root`
  counts as 0 in Eq. 5, and a trajectory with no contrast at all ranks last in Eq. 4.
- Ties in Eq. 4 go to the earliest sampled trajectory.
- No tool call, no critical step. A single one is the critical step without a probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elpo_fast.algo.planners import Critical, Request, Trajectory


@dataclass(slots=True)
class _Search:
    """Binary search for the critical one among the reference's tool calls, counted from 1."""

    reference: Trajectory
    low: int
    high: int
    anchor: int = 0
    recovered: bool = False  # a suffix from the current anchor succeeded
    probes: int = 0


class BelPlanner:
    """The planner of ELPO; `done` when exactly `n_total` trajectories have been observed."""

    reads_entropy = True

    def __init__(self, n_total: int, b_max: int, x_min: int, x_max: int, beta: float) -> None:
        if n_total < 1 or b_max < 1 or not 1 <= x_min <= x_max:
            raise ValueError(
                f"n_total={n_total} and b_max={b_max} must be at least 1, "
                f"and 1 <= x_min={x_min} <= x_max={x_max}"
            )
        self.n_total, self.b_max = n_total, b_max
        self.x_min, self.x_max, self.beta = x_min, x_max, beta
        self.spent = 0
        self.critical: Sequence[Critical] = []
        self._request: Request | None = None
        self._pending = 0  # asked for, not yet observed
        self._buffer: list[Trajectory] = []
        self._search: _Search | None = None
        self._advance()

    @property
    def done(self) -> bool:
        return self._pending == 0

    def requests(self) -> list[Request]:
        request, self._request = self._request, None
        return [] if request is None else [request]

    def observe(self, trajectory: Trajectory) -> None:
        if self._pending == 0:
            raise RuntimeError(f"leaf {trajectory.leaf} was not asked for; the budget is spent")
        self._pending -= 1
        if self._search is not None:
            self._search.recovered |= trajectory.correct
        elif not trajectory.correct:
            self._buffer.append(trajectory)
        if self._pending == 0:
            if self._search is not None:
                self._narrow(self._search)
            self._advance()

    def _advance(self) -> None:
        """Go on until something has to be sampled or Algorithm 1 ends."""
        while self._pending == 0:
            left = self.n_total - self.spent
            if self._search is not None:
                if left and self._search.low < self._search.high:
                    self._probe(self._search, left)
                else:
                    self._conclude(self._search)
            elif left and len(self._buffer) < self.b_max:
                self._ask(0, min(left, self.b_max - len(self._buffer)))
            elif self._buffer:
                reference = select_reference(self._buffer)
                self._buffer.clear()
                self._search = _Search(reference, low=1, high=len(reference.calls))
            else:
                return

    def _ask(self, node: int, count: int) -> None:
        self._request = Request(node, count)
        self._pending = count
        self.spent += count

    def _probe(self, search: _Search, left: int) -> None:
        reference = search.reference
        search.anchor = (search.low + search.high) // 2
        search.recovered = False
        search.probes += 1
        contrast = reference.tool_entropy[search.anchor - 1] - reference.root_entropy
        count = suffix_count(contrast, self.x_min, self.x_max, self.beta)
        self._ask(reference.calls[search.anchor - 1], min(left, count))

    @staticmethod
    def _narrow(search: _Search) -> None:
        if search.recovered:
            search.low = search.anchor + 1
        else:
            search.high = search.anchor

    def _conclude(self, search: _Search) -> None:
        self._search = None
        if search.reference.calls:
            found = Critical(
                node=search.reference.calls[search.low - 1],
                leaf=search.reference.leaf,
                localized=search.low == search.high,
                probes=search.probes,
            )
            self.critical = [*self.critical, found]


def select_reference(buffer: list[Trajectory]) -> Trajectory:
    """Eq. 4: the failure with the largest `H_tool - H_root`, the earliest of equals."""

    def rank(trajectory: Trajectory) -> tuple[float, int]:
        contrast = trajectory.contrast
        return (-math.inf if math.isnan(contrast) else contrast, -trajectory.leaf)

    return max(buffer, key=rank)


def suffix_count(contrast: float, x_min: int, x_max: int, beta: float) -> int:
    """Eq. 5: `X_m = X_min + (X_max - X_min) sigmoid(beta (H_tool_m - H_root))`, rounded."""
    scaled = 0.0 if math.isnan(contrast) else beta * contrast
    sigmoid = 0.5 * (1.0 + math.tanh(0.5 * scaled))
    return math.floor(x_min + (x_max - x_min) * sigmoid + 0.5)
