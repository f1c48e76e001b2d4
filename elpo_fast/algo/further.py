"""Another planner's tree, and what is sampled in it afterwards, to judge what was found there.

A `FlowPlanner` runs a generator that yields requests and is given the trajectories that came of
them, in sampling order. `grown` is the part of it that grows the other planner's tree.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence

from elpo_fast.algo.bel import BelPlanner
from elpo_fast.algo.planners import Critical, Planner, Request, Trajectory

Flow = Generator[list[Request], list[Trajectory], None]


class FlowPlanner(Planner):
    """A planner whose tree is `planner`'s at first and then grows by `flow`."""

    def __init__(self, planner: Planner, flow: Flow) -> None:
        self._planner, self._flow = planner, flow
        self.reads_entropy = planner.reads_entropy
        self._requests: list[Request] = next(flow, [])
        self._pending = sum(request.count for request in self._requests)
        self._observed: list[Trajectory] = []

    @property
    def critical(self) -> Sequence[Critical]:  # type: ignore[override]
        return self._planner.critical

    @property
    def done(self) -> bool:
        return self._pending == 0

    def requests(self) -> list[Request]:
        asked, self._requests = self._requests, []
        return asked

    def observe(self, trajectory: Trajectory) -> None:
        self._observed.append(trajectory)
        self._pending -= 1
        if self._pending == 0:
            came = sorted(self._observed, key=lambda each: each.leaf)
            self._observed = []
            try:
                self._requests = self._flow.send(came)
            except StopIteration:
                return
            self._pending = sum(request.count for request in self._requests)


def grown(planner: Planner) -> Generator[list[Request], list[Trajectory], list[Trajectory]]:
    """Grow a planner's tree; its trajectories."""
    every: list[Trajectory] = []
    while not planner.done:
        for trajectory in (yield planner.requests()):
            every.append(trajectory)
            planner.observe(trajectory)
    return every


def going_on(trajectories: Sequence[Trajectory]) -> set[int]:
    """Steps that called a tool and after which trajectories can go on."""
    ends = {trajectory.steps[-1] for trajectory in trajectories}
    return {node for trajectory in trajectories for node in trajectory.calls} - ends


def branches(trajectories: Sequence[Trajectory]) -> list[tuple[int, ...]]:
    """The children of every prefix that has several, in sampling order."""
    below: dict[int, dict[int, None]] = {}
    parent: dict[int, int] = {}
    for trajectory in trajectories:
        # A suffix's steps include those of the prefix it continues.
        for before, node in zip((0, *trajectory.steps), trajectory.steps, strict=False):
            parent[node] = before
            below.setdefault(before, {})[node] = None
    return [tuple(children) for children in below.values() if len(children) > 1]


def ranking_flow(planner: Planner, samples: int) -> Flow:
    """After `planner`'s tree: `samples` continuations of every child of a branching prefix."""
    trajectories = yield from grown(planner)
    able = going_on(trajectories)
    children = {child for siblings in branches(trajectories) for child in siblings}
    if asked := [Request(child, samples) for child in sorted(children & able)]:
        yield asked


REPLACED = ("a random step", "first irrecoverable", "second", "third")
"""Steps of a failed trajectory that `recovery_flow` replaces."""


def recovery_flow(planner: Planner, samples: int, note: Callable[[str, bool], None]) -> Flow:
    """After `planner`'s tree: for each localized search `samples` trajectories that continue before
    the first irrecoverable step, the two after it, and a random one; `note` is told which step was
    replaced and whether any of them succeeded."""
    trajectories = yield from grown(planner)
    rng = random.Random(repr(trajectories))  # another one for every tree, whoever comes first
    by_leaf = {trajectory.leaf: trajectory for trajectory in trajectories}
    places = []
    for critical in planner.critical:
        if critical.localized:
            steps = by_leaf[critical.leaf].steps
            first = steps.index(critical.node)
            chosen = (rng.randrange(len(steps)), first, first + 1, first + 2)
            for kind, step in zip(REPLACED, chosen, strict=True):
                if step < len(steps):
                    places.append((kind, (0, *steps)[step]))
    for kind, before in places:
        came = yield [Request(before, samples)]
        note(kind, any(trajectory.correct for trajectory in came))


def agreement_flow(planner: BelPlanner, times: int, note: Callable[[int, list[int]], None]) -> Flow:
    """After `planner`'s tree: `times` more searches of each trajectory that it searched to the end,
    each as long as it takes; `note` is told its number of calls, and which of them were found."""
    trajectories = yield from grown(planner)
    by_leaf = {trajectory.leaf: trajectory for trajectory in trajectories}
    for critical in planner.critical:
        reference = by_leaf[critical.leaf]
        if not critical.localized:
            continue
        found = [reference.calls.index(critical.node) + 1]
        for _ in range(times):
            search = planner.search_in(reference)
            while not search.settled:
                anchor, count = search.next_probe()
                came = yield [Request(reference.calls[anchor - 1], count)]
                successes = sum(trajectory.correct for trajectory in came)
                search.learn(successes, count - successes)
            found.append(search.step)
        note(len(reference.calls), found)
