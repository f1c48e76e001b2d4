"""What a planner is: it decides from which nodes of one task's tree to sample.

A planner is a pure state machine, deterministic given its observations; whoever drives it samples
what `requests` returns, all of it concurrently if it likes, and reports every finished trajectory
to `observe`. The planner alone counts the budget: it asks for exactly `n_total` trajectories, full
ones and suffixes alike.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from elpo_fast.tree.store import Tree


@dataclass(frozen=True, slots=True)
class Request:
    """Sample `count` trajectories that continue after `node`; node 0 asks for full ones."""

    node: int
    count: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What a planner needs to know of one finished trajectory. Entropies are in nats (Eq. 3)."""

    leaf: int  # ordinal in sampling order
    steps: tuple[int, ...]  # its nodes in order, without the root
    calls: tuple[int, ...]  # those of `steps` that called a tool: K of them
    correct: bool
    root_entropy: float  # H_root: mean over the agent tokens of the first step
    tool_entropy: tuple[float, ...]  # H_tool_m: the same for the step after the m-th call, [K]
    mean_tool_entropy: float  # H_tool: mean over the agent tokens of all those steps

    @property
    def contrast(self) -> float:
        """Eq. 4's criterion `H_tool - H_root`; NaN where a mean has no tokens to go over."""
        return self.mean_tool_entropy - self.root_entropy


@dataclass(frozen=True, slots=True)
class Critical:
    """Result of one search: the first irrecoverable step of a failed trajectory."""

    node: int
    leaf: int  # ordinal of the reference trajectory
    localized: bool  # false where the budget ended before the search: a lower bound only
    probes: int  # rounds of suffixes that it took


class Planner(Protocol):
    """Decides where one task's tree grows. A subclass has to have the abstract members."""

    critical: Sequence[Critical] = ()
    reads_entropy: bool = True  # whether the entropies of trajectories decide anything

    @property
    @abstractmethod
    def done(self) -> bool:
        """Nothing will be asked for any more and everything asked for was observed."""
        ...

    @abstractmethod
    def requests(self) -> list[Request]:
        """Everything that may be sampled now; each request is handed out once."""
        ...

    @abstractmethod
    def observe(self, trajectory: Trajectory) -> None:
        """Report one trajectory that was asked for."""
        ...


class RoundsPlanner(Planner):
    """Asks in rounds: all that a round asked for is observed before the next one begins."""

    def __init__(self, n_total: int) -> None:
        if n_total < 1:
            raise ValueError(f"n_total={n_total} must be at least 1")
        self.n_total, self.spent = n_total, 0
        self._pending = 0  # asked for, not yet observed

    @property
    def done(self) -> bool:
        return self.spent == self.n_total and self._pending == 0

    def requests(self) -> list[Request]:
        if self._pending or self.done:
            return []
        asked = self._round(self.n_total - self.spent)
        self._pending = sum(request.count for request in asked)
        self.spent += self._pending
        return asked

    def observe(self, trajectory: Trajectory) -> None:
        if self._pending == 0:
            raise RuntimeError(f"leaf {trajectory.leaf} was not asked for; the budget is spent")
        self._pending -= 1
        self._learn(trajectory)

    @abstractmethod
    def _round(self, left: int) -> list[Request]:
        """What to sample now, between 1 and `left` trajectories."""
        ...

    @abstractmethod
    def _learn(self, trajectory: Trajectory) -> None: ...


def trajectory_of(tree: Tree, leaf: int) -> Trajectory:
    """Summary of the trajectory that ends in leaf `leaf` (an ordinal) of `tree`."""
    steps = tuple(tree.path(tree.leaves[leaf])[1:])
    after = [i + 1 for i, node in enumerate(steps) if tree.tool_call[node]]
    following = [steps[i : i + 1] for i in after]  # one step each, none at a turn limit
    return Trajectory(
        leaf=leaf,
        steps=steps,
        calls=tuple(steps[i - 1] for i in after),
        correct=tree.correct[steps[-1]] == 1,
        root_entropy=_mean_entropy(tree, steps[:1]),
        tool_entropy=tuple(_mean_entropy(tree, nodes) for nodes in following),
        mean_tool_entropy=_mean_entropy(tree, [node for nodes in following for node in nodes]),
    )


def _mean_entropy(tree: Tree, nodes: Iterable[int]) -> float:
    """Mean over the agent tokens of `nodes`; NaN where they have none."""
    total, count = 0.0, 0
    for node in nodes:
        agent = tree.agent[node] != 0
        total += float(tree.entropy[node][agent].sum(dtype=float))
        count += int(agent.sum())
    return total / count if count else math.nan
