"""The paper's worked example: its sampling order, its localized steps, every number it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from elpo_fast.algo import make_planner, score
from elpo_fast.algo.planners import Critical, trajectory_of
from elpo_fast.config import AlgoConfig
from elpo_fast.tree import io, ops
from elpo_fast.tree.store import Forest, Tree

FILE = Path(__file__).parents[1] / "data" / "figure4.json"
FIGURE = json.loads(FILE.read_text())
ORDER = (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 8, 9, 13, 14, 15)
# Entropies are not printed. These make leaves 0 and 5 references, and Eq. 5 give the counts seen.
ENTROPY = {"a0": 1.0, "c5": 1.0, "leaf5": 3.0}


def paths(node: dict, above: tuple[str, ...] = ()) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(leaf, names of its steps) of every trajectory."""
    here = (*above, node["id"]) if node["id"] != "root" else ()
    if "leaf" in node:
        yield node["leaf"], here
    for child in node.get("children", []):
        yield from paths(child, here)


def grow() -> tuple[Tree, dict[str, int], list[tuple[str, int]], list[Critical]]:
    """Let the planner grow the figure's tree: tree, nodes by name, requests, search results.

    `ORDER` is the figure's leaf that is sampled as number 0, 1, ... With K = 3 tool calls the
    search of leaf 5 probes its middle call c5 first; the figure numbers c's suffixes before c5's.
    """
    trajectories = dict(paths(FIGURE["tree"]))
    planner, tree = make_planner(AlgoConfig()), Tree([1])
    nodes = {"root": 0}
    asked = []
    while not planner.done:
        (request,) = planner.requests()
        asked.append((next(n for n, node in nodes.items() if node == request.node), request.count))
        sampled = []
        for _ in range(request.count):
            figure_leaf = ORDER[len(tree.leaves)]
            steps = trajectories[figure_leaf]
            parent = 0
            for name in steps:
                if name not in nodes:
                    entropy = ENTROPY.get(name, 1.0 if name == steps[0] else 0.9)
                    calls = name != steps[-1] or name == "leaf5"
                    nodes[name] = tree.add_step(parent, [2], [1], [-1], [entropy], tool_call=calls)
                parent = nodes[name]
            assert request.node in tree.path(parent), "continues the node that was asked for"
            reward = FIGURE["rewards"][figure_leaf]
            sampled.append(tree.finish(parent, reward=reward, correct=reward == 1, end="answer"))
        for leaf in sampled:
            planner.observe(trajectory_of(tree, leaf))
    return tree, nodes, asked, planner.critical


def test_sampling_order_and_critical_steps():
    tree, nodes, asked, criticals = grow()
    assert asked == [("root", 3), ("a", 2), ("root", 3), ("c5", 3), ("c", 2), ("root", 3)]
    searched = {
        str(ORDER[c.leaf]): tree.path(tree.leaves[c.leaf]).index(c.node)
        for c in criticals
        if c.probes
    }
    assert searched == FIGURE["critical_steps"]
    # The budget is spent; of the last failures one has a single tool call and needs no probe.
    assert criticals[2:] == [Critical(nodes["d15"], leaf=15, localized=True, probes=0)]


@pytest.mark.parametrize("source", ["file", "planner"])
def test_every_printed_number(source):
    if source == "file":
        forest = io.read(FILE)
        nodes = {name: node for node, name in enumerate(forest.infos[0]["node_names"])}
    else:
        tree, nodes, _, _ = grow()
        forest = Forest.from_trees([tree])
    scored = score(forest, AlgoConfig(lambda_tree=FIGURE["lambda_tree"]))
    columns = (scored.node_reward, scored.branch, scored.trajectory, scored.advantage)
    assert set(FIGURE["expected"]) == set(nodes) - {"root"}
    for name, printed in FIGURE["expected"].items():
        ours = [round(float(column[nodes[name]]), 3) for column in columns]
        assert ours == printed, name


def test_first_all_failed_steps():
    forest = io.read(FILE)
    names = forest.infos[0]["node_names"]
    _, first = ops.first_all_failed(forest.parent, forest.correct)
    failed = {
        names[node]: [
            leaf for leaf in range(16) if node in forest.path(int(forest.leaf_node[leaf]))
        ]
        for node in np.flatnonzero(first).tolist()
    }
    assert failed == FIGURE["first_all_failed_nodes"]
