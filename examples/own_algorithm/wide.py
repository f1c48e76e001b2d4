"""A planner, an advantage and token weights of one's own."""

import random

import numpy as np

from elpo_fast import Planner, Request
from elpo_fast.tree import ops


class Wide(Planner):
    """Some full trajectories, then one continuation after another, from tool calls drawn by lot."""

    reads_entropy = False

    def __init__(self, n_total: int, full: int = 4):
        self.left, self.full, self.pending = n_total, full, 0
        self.calls, self.rng = [], random.Random(0)

    @property
    def done(self):
        return not self.left and not self.pending

    def requests(self):
        if self.pending or not self.left:
            return []
        self.pending = min(self.full, self.left)
        self.left -= self.pending
        self.full = 1
        return [Request(self.rng.choice(self.calls) if self.calls else 0, self.pending)]

    def observe(self, trajectory):
        self.pending -= 1
        self.calls += trajectory.calls


def over_baseline(forest, baseline: float = 0.0):
    """Advantage of every trajectory, `[L]`: its reward over a baseline that does not move."""
    return forest.reward[forest.leaf_node] - baseline


def token_mean(forest):
    """Weight of a token of every trajectory, `[L]`: the same for all tokens of a tree."""
    agent = ops.segment_sum(forest.token_start, forest.agent)
    length = ops.path_sum(forest.parent, agent)[forest.leaf_node]
    total = np.add.reduceat(length, forest.leaf_start[:-1])
    return 1 / np.repeat(np.maximum(total, 1), np.diff(forest.leaf_start))
