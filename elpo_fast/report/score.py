"""`elpo tree score`: node reward and advantages (Eq. 6-10) of every node of a tree file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from elpo_fast.algo import score
from elpo_fast.config import AlgoConfig
from elpo_fast.tree.io import read
from elpo_fast.tree.pack import Scored
from elpo_fast.tree.store import Forest, TreeError

_COLUMNS = {
    "node_reward": "node reward",
    "branch": "branch",
    "trajectory": "trajectory",
    "advantage": "hierarchical",
}


def score_command(path: str | Path, lam: float, as_json: bool) -> int:
    """Print the scores of a JSON tree or saved forest; the exit code: 0, or 2 for faulty input.

    The table shows three decimals, as the paper's Figure 4; JSON has full precision.
    """
    try:
        if not 0.0 <= lam <= 1.0:
            raise TreeError(f"--lambda {lam:g} is not between 0 and 1")
        forest = read(path)
    except TreeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    values = score(forest, AlgoConfig(lambda_tree=lam))
    if as_json:
        trees = [_tree(forest, values, tree) for tree in range(len(forest))]
        print(json.dumps({"lambda": lam, "trees": trees}, indent=1))
    else:
        for tree in range(len(forest)):
            _print_table(forest, values, tree)
    return 0


def _names(forest: Forest, tree: int) -> list[str]:
    """Names from the file, else numbers within the tree."""
    nodes = len(forest.nodes(tree))
    names = forest.infos[tree].get("node_names")
    return names if names is not None else [str(node) for node in range(nodes)]


def _tree(forest: Forest, values: Scored, tree: int) -> dict[str, object]:
    names, nodes = _names(forest, tree), forest.nodes(tree)
    return {
        "task_id": forest.task_ids[tree],
        "nodes": {
            name: {
                "parent": None if node == nodes[0] else names[forest.parent[node] - nodes[0]],
                **{
                    title.replace(" ", "_"): float(getattr(values, column)[node])
                    for column, title in _COLUMNS.items()
                },
            }
            for name, node in zip(names, nodes, strict=True)
        },
    }


def _print_table(forest: Forest, values: Scored, tree: int) -> None:
    names = [
        "  " * int(depth) + name
        for name, depth in zip(_names(forest, tree), forest.depth[forest.nodes(tree)], strict=True)
    ]
    width = max(map(len, ["node", *names]))
    if len(forest) > 1:
        print(f"tree {tree}: {forest.task_ids[tree]}")
    print(f"{'node':<{width}}", *(f"{title:>13}" for title in _COLUMNS.values()))
    for name, node in zip(names, forest.nodes(tree), strict=True):
        # + 0.0: a mean that rounds to zero from below is not printed as -0.000.
        numbers = (round(float(getattr(values, column)[node]), 3) + 0.0 for column in _COLUMNS)
        print(f"{name:<{width}}", *(f"{number:>13.3f}" for number in numbers))
