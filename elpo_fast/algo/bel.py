"""Binary error localization (Algorithm 1): find the first irrecoverable step of failures.

Full trajectories are sampled until the buffer holds `b_max` failures. The one with the largest
entropy contrast (Eq. 4) becomes the reference, the buffer is cleared, and a binary search over its
tool calls samples suffixes: where any suffix of a prefix succeeds the error lies later, where all
fail it lies there or earlier. Then the next round begins, until the budget is spent.

A round is all that runs concurrently: the full trajectories that the buffer still lacks (Algorithm
1 needs at least that many, one after the other or not), or all suffixes of one anchor. So a tree
does not depend on who finishes first.

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

from elpo_fast.algo.planners import Critical, Request, RoundsPlanner, Trajectory


class Search:
    """Binary search for the critical one among the reference's tool calls, counted from 1."""

    def __init__(self, reference: Trajectory, counts: Sequence[int]) -> None:
        """`counts [K]`: how many suffixes to sample after each call."""
        self.reference, self.counts = reference, counts
        self.low, self.high = 1, len(reference.calls)
        self.anchor = 0

    @property
    def settled(self) -> bool:
        """Nothing more is asked for."""
        return self.low >= self.high

    @property
    def step(self) -> int:
        """The critical call, as far as is known."""
        return self.low

    def next_probe(self) -> tuple[int, int]:
        """After which call to sample, from now on the `anchor`, and how many suffixes."""
        self.anchor = (self.low + self.high) // 2
        return self.anchor, self.counts[self.anchor - 1]

    def learn(self, successes: int, failures: int) -> None:
        """What the suffixes from the anchor came to."""
        if successes:
            self.low = self.anchor + 1
        else:
            self.high = self.anchor


class BelPlanner(RoundsPlanner):
    """The planner of ELPO; `done` when exactly `n_total` trajectories have been observed."""

    reads_entropy = True

    def __init__(self, n_total: int, b_max: int, x_min: int, x_max: int, beta: float) -> None:
        super().__init__(n_total)
        if b_max < 1 or not 1 <= x_min <= x_max:
            raise ValueError(
                f"b_max={b_max} must be at least 1, and 1 <= x_min={x_min} <= x_max={x_max}"
            )
        self.b_max, self.x_min, self.x_max, self.beta = b_max, x_min, x_max, beta
        self._buffer: list[Trajectory] = []
        self._search: Search | None = None
        self._probes = 0  # rounds of the search, of whose latest ...
        self._asked = self._successes = 0  # ... so many were asked for and succeeded
        self._next = self._plan(n_total)

    def _round(self, left: int) -> list[Request]:
        return self._next

    def _learn(self, trajectory: Trajectory) -> None:
        if self._search is not None:
            self._successes += trajectory.correct
        elif not trajectory.correct:
            self._buffer.append(trajectory)
        if self._pending == 0:
            if self._search is not None:
                self._search.learn(self._successes, self._asked - self._successes)
            self._next = self._plan(self.n_total - self.spent)

    def _plan(self, left: int) -> list[Request]:
        """What to sample next; nothing where Algorithm 1 ends."""
        while True:
            if self._search is not None:
                if left and not self._search.settled:
                    return self._probe(self._search, left)
                self._conclude(self._search)
            elif left and len(self._buffer) < self.b_max:
                return [Request(0, min(left, self.b_max - len(self._buffer)))]
            elif self._buffer:
                reference = select_reference(self._buffer)
                self._buffer.clear()
                self._search, self._probes = self.search_in(reference), 0
            else:
                return []

    def search_in(self, reference: Trajectory) -> Search:
        """A search that begins."""
        contrasts = (entropy - reference.root_entropy for entropy in reference.tool_entropy)
        counts = [suffix_count(c, self.x_min, self.x_max, self.beta) for c in contrasts]
        return Search(reference, counts)

    def _probe(self, search: Search, left: int) -> list[Request]:
        anchor, count = search.next_probe()
        self._probes, self._asked, self._successes = self._probes + 1, min(left, count), 0
        return [Request(search.reference.calls[anchor - 1], self._asked)]

    def _conclude(self, search: Search) -> None:
        self._search = None
        if search.reference.calls:
            found = Critical(
                node=search.reference.calls[search.step - 1],
                leaf=search.reference.leaf,
                localized=search.settled,
                probes=self._probes,
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
