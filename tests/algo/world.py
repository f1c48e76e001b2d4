"""A world without a model: scripted trajectories whose recoverability per step is known.

A full trajectory of `K` tool calls that fails has a planted step: from the prefix up to and
including call `m` a success is possible exactly if `m < planted`. Also the plain loop of Algorithm
1, one trajectory after the other, that the planner must agree with.
"""

from __future__ import annotations

import math

import numpy as np

from elpo_fast.algo.planners import Planner, Request, Trajectory, trajectory_of
from elpo_fast.tree.store import Tree


class World:
    """Samples trajectories into a tree; what it does depends on the seed and the request alone."""

    def __init__(
        self, seed: int, *, max_calls: int, solve_rate: float = 0.3, probe_rate: float = 1.0
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.max_calls, self.solve_rate, self.probe_rate = max_calls, solve_rate, probe_rate
        self.tree = Tree([1])
        self.hopeless: set[int] = set()  # nodes from which nothing succeeds
        self.planted: dict[int, int] = {}  # leaf ordinal -> planted node
        self.asked: list[int] = []  # the node of each trajectory, in order

    def sample(self, node: int) -> Trajectory:
        self.asked.append(node)
        rng, tree = self.rng, self.tree
        calls = int(rng.integers(0, self.max_calls + 1))
        at_limit = calls > 0 and rng.random() < 0.2  # the last call is not followed by a step
        correct = node not in self.hopeless and bool(
            rng.random() < (self.probe_rate if node else self.solve_rate)
        )
        planted = None if correct or node or not calls else int(rng.integers(1, calls + 1))
        failed = node in self.hopeless
        first = len(tree)
        for call in range(1, calls + 2 - at_limit):
            failed = failed or (planted is not None and call >= planted)
            size = int(rng.integers(0, 4))
            agent = rng.random(size) < 0.8
            entropy = rng.random(size) * agent
            node = tree.add_step(node, agent * 1, agent, -entropy, entropy, tool_call=call <= calls)
            if failed:
                self.hopeless.add(node)
        leaf = tree.finish(node, reward=float(correct), correct=correct, end="answer")
        if planted is not None:
            self.planted[leaf] = first + planted - 1
        return trajectory_of(tree, leaf)


def play(planner: Planner, world: World, shuffle: np.random.Generator) -> list[list[Request]]:
    """Drive a planner to its end; the requests of each round. Results arrive in any order."""
    rounds = []
    while not planner.done:
        requests = planner.requests()
        assert requests, "a planner that is not done must ask for something"
        assert planner.requests() == [], "each request is handed out once"
        rounds.append(requests)
        found = [world.sample(r.node) for r in requests for _ in range(r.count)]
        for index in shuffle.permutation(len(found)):
            planner.observe(found[index])
    assert planner.requests() == []
    return rounds


def algorithm_1(
    world: World, n_total: int, b_max: int, x_min: int, x_max: int, beta: float
) -> list[tuple[int, int, bool, int]]:
    """Algorithm 1, one trajectory after the other; (node, leaf, localized, probes) a search."""
    spent, found = 0, []
    while spent < n_total:
        buffer = []
        while len(buffer) < b_max and spent < n_total:
            trajectory = world.sample(0)
            spent += 1
            if not trajectory.correct:
                buffer.append(trajectory)
        if not buffer:
            break
        reference = buffer[0]
        for other in buffer[1:]:
            have = reference.mean_tool_entropy - reference.root_entropy
            contrast = other.mean_tool_entropy - other.root_entropy
            if contrast > have or (math.isnan(have) and not math.isnan(contrast)):
                reference = other
        low, high, probes = 1, len(reference.calls), 0
        while low < high and spent < n_total:
            m = (low + high) // 2
            contrast = reference.tool_entropy[m - 1] - reference.root_entropy
            if math.isnan(contrast):
                contrast = 0.0
            suffixes = x_min + (x_max - x_min) / (1 + math.exp(-beta * contrast))
            success, probes = False, probes + 1
            for _ in range(int(suffixes + 0.5)):
                if spent == n_total:
                    break
                success |= world.sample(reference.calls[m - 1]).correct
                spent += 1
            low, high = (m + 1, high) if success else (low, m)
        if reference.calls:
            found.append((reference.calls[low - 1], reference.leaf, low == high, probes))
    return found
