"""Trees on disk: a forest as one `.npz` file, and trees that people write as JSON.

The `.npz` file holds the arrays of `Forest` and one JSON text with everything else; no pickle. It
is written to a temporary file first and renamed, so a reader sees the old file or the new one.

JSON trees carry rewards but no tokens. Two forms are read:

    {"tree": {"id": "root", "children": [{"id": "a", "leaf": 0}, ...]}, "rewards": [1.0, ...]}
    {"nodes": [{"id": "root", "parent": null}, {"id": "a", "parent": "root", "reward": 1.0}, ...]}

In either, a leaf says its own `"reward"` or, where the file has a list of `"rewards"`, its index in
that list as `"leaf"`; the list is then in sampling order. Optional: `"correct"` on leaves (default:
a reward of at least 1, the paper's success), `"tool_call"` on nodes (default: all but leaves),
`"task_id"`, and `"critical_steps"`, leaf number to step number of localized steps.
Node names are kept in the tree's `info["node_names"]`. Every fault of a file is a `TreeError`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elpo_fast.tree.samples import SUFFIX, read_samples
from elpo_fast.tree.store import ARRAYS, Forest, Tree, TreeError

TEMPORARY = ".tmp"
"""How the name of a file ends that is being written; one that is killed leaves it behind."""

_FORMAT = "elpo-forest-1"
_TEXTS = ("task_ids", "infos", "ends", "reasons")


def save(forest: Forest, path: str | Path) -> None:
    """Write the forest to `path` (`.npz`); there is never a half-written file of that name."""
    path = Path(path)
    texts = {"format": _FORMAT, **{name: getattr(forest, name) for name in _TEXTS}}
    try:
        meta = json.dumps(texts).encode()
    except TypeError as error:
        raise TreeError(f"a tree's info must be plain JSON values: {error}") from None
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            arrays = {name: getattr(forest, name) for name in ARRAYS}
            np.savez(file, meta=np.frombuffer(meta, np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | Path) -> Forest:
    """Read what `save` wrote; `TreeError` where the file is missing, damaged or something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            texts = json.loads(file["meta"].tobytes())
            arrays: dict[str, Any] = {name: file[name] for name in ARRAYS}
    except OSError as error:
        raise TreeError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # damage surfaces as nearly anything inside zipfile and NumPy
        raise TreeError(f"{path} is not a saved forest, or it is damaged") from None
    if not isinstance(texts, dict) or texts.get("format") != _FORMAT:
        raise TreeError(f"{path} is not a saved forest of this version ({_FORMAT})")
    try:
        arrays.update((name, tuple(texts[name])) for name in _TEXTS)
        return Forest(**arrays)
    except (KeyError, TypeError):
        raise TreeError(f"{path} is damaged: its texts are incomplete") from None
    except TreeError as error:
        raise TreeError(f"{path}: {error}") from None


def read(path: str | Path) -> Forest:
    """A saved forest (`.npz`), samples of slime or miles (`.pt`, see `tree.samples`) or a JSON tree
    (anything else)."""
    path = Path(path)
    if path.suffix == ".npz":
        return load(path)
    if path.suffix == SUFFIX:
        return Forest.from_trees(read_samples(path))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TreeError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise TreeError(f"{path} is neither UTF-8 text nor a .npz file") from None
    try:
        return Forest.from_trees([parse_tree(json.loads(text))])
    except TreeError as error:
        raise TreeError(f"{path}: {error}") from None
    except RecursionError:
        raise TreeError(f'{path} is nested too deeply; use the flat form {{"nodes": []}}') from None
    except ValueError as error:
        raise TreeError(f"{path} is not JSON: {error}") from None


def parse_tree(data: Any) -> Tree:
    """A token-less `Tree` from either JSON form, parsed."""
    data = _typed(data, dict, "the file")
    if ("tree" in data) == ("nodes" in data):
        raise TreeError('a tree file needs either "tree" (nested) or "nodes" (flat)')
    nodes = _unnested(data["tree"]) if "tree" in data else _typed(data["nodes"], list, "nodes")
    specs = _by_name(nodes)
    order = _order(specs)
    tree = Tree([], task_id=str(data.get("task_id", "")), info={"node_names": order})
    index = {order[0]: 0}
    inner = {spec["parent"] for spec in specs.values()}
    for name in order[1:]:
        calls = _typed(specs[name].get("tool_call", name in inner), bool, f"tool_call of {name}")
        parent = index[specs[name]["parent"]]
        index[name] = tree.add_step(parent, [], [], [], [], tool_call=calls)
    for name, reward in _leaf_rewards(specs, [name for name in order if name not in inner], data):
        correct = _typed(specs[name].get("correct", reward >= 1), bool, f"correct of {name}")
        tree.finish(index[name], reward=reward, correct=correct, end="answer")
    for leaf, step in _typed(data.get("critical_steps", {}), dict, "critical_steps").items():
        _mark(tree, leaf, step)
    return tree


def _unnested(root: Any) -> Iterator[dict[str, Any]]:
    """The nodes of the nested form as the flat one has them, in document order."""
    stack: list[tuple[Any, Any]] = [(root, None)]
    while stack:
        value, parent = stack.pop()
        spec = _typed(value, dict, "every node")
        yield {**spec, "parent": parent}
        name = spec["id"]  # which has been looked at
        below = _typed(spec.get("children", []), list, f"children of {name}")
        stack += [(child, name) for child in reversed(below)]


def _by_name(nodes: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Nodes, each with its parent's name."""
    specs: dict[str, dict[str, Any]] = {}
    for value in nodes:
        spec = _typed(value, dict, "every node")
        if "parent" not in spec:
            raise TreeError(f'node {spec.get("id")!r} has no "parent" (null for the root)')
        name, parent = _name(spec.get("id")), spec["parent"]
        if name in specs:
            raise TreeError(f"node id {name!r} is used twice")
        specs[name] = {**spec, "parent": None if parent is None else _name(parent)}
    return specs


def _name(value: Any) -> str:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise TreeError(f"a node's id must be a text or an integer, not {value!r}")
    return str(value)


def _order(specs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names with every parent before its children, document order kept among siblings."""
    below: dict[str | None, list[str]] = {}
    for name, spec in specs.items():
        parent = spec["parent"]
        if parent is not None and parent not in specs:
            raise TreeError(f"node {name!r} has the parent {parent!r}, which does not exist")
        below.setdefault(parent, []).append(name)
    roots = below.get(None, [])
    if len(roots) > 1:
        raise TreeError(f"a tree has one root, but {roots[0]!r} and {roots[1]!r} have no parent")
    order: list[str] = []
    stack = list(roots)
    while stack:
        order.append(stack.pop())
        stack += reversed(below.get(order[-1], []))
    if len(order) < len(specs):
        reached = set(order)
        lost = next(name for name in specs if name not in reached)
        raise TreeError(f"node {lost!r} does not hang below the root: its parents form a cycle")
    if len(order) < 2:
        raise TreeError("a tree needs a root and at least one step below it")
    return order


def _leaf_rewards(
    specs: Mapping[str, Mapping[str, Any]], leaves: list[str], data: Mapping[str, Any]
) -> list[tuple[str, float]]:
    """Leaves in sampling order with their rewards."""
    for name in specs.keys() - set(leaves):
        if "leaf" in specs[name] or "reward" in specs[name]:
            raise TreeError(f"node {name!r} has children and cannot be a leaf")
    if "rewards" not in data:
        return [(name, _reward(specs[name].get("reward"), name)) for name in leaves]
    rewards = _typed(data["rewards"], list, "rewards")
    owner: dict[int, str] = {}
    for name in leaves:
        leaf = specs[name].get("leaf")
        if "reward" in specs[name]:
            raise TreeError(f'leaf {name!r} has its own reward although the file has "rewards"')
        if leaf is None:
            raise TreeError(f'leaf {name!r} has no reward: it lacks a "leaf" index into "rewards"')
        if not isinstance(leaf, int) or isinstance(leaf, bool) or not 0 <= leaf < len(rewards):
            raise TreeError(
                f"node {name!r} is leaf {leaf!r}, but there are {len(rewards)} rewards, from 0"
            )
        if leaf in owner:
            raise TreeError(f"leaf {leaf} is used twice, by {owner[leaf]!r} and {name!r}")
        owner[leaf] = name
    for leaf in range(len(rewards)):
        if leaf not in owner:
            raise TreeError(f"reward {leaf} belongs to no leaf of the tree")
    return [(owner[leaf], _reward(value, owner[leaf])) for leaf, value in enumerate(rewards)]


def _reward(value: Any, name: str) -> float:
    if value is None:
        raise TreeError(f"leaf {name!r} has no reward")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TreeError(f"leaf {name!r} has the reward {value!r}, which is not a number")
    try:
        reward = float(value)
    except OverflowError:  # an integer beyond every float
        reward = math.inf
    if not math.isfinite(reward):
        raise TreeError(f"leaf {name!r} has the reward {reward}; rewards must be finite")
    return reward


def _mark(tree: Tree, leaf: str, step: Any) -> None:
    if not leaf.isdecimal() or int(leaf) >= len(tree.leaves):
        raise TreeError(f"critical_steps names the leaf {leaf!r}, which does not exist")
    path = tree.path(tree.leaves[int(leaf)])
    if not isinstance(step, int) or isinstance(step, bool) or not 1 <= step < len(path):
        raise TreeError(f"critical step {step!r} of leaf {leaf} is not a step of its path")
    tree.mark_critical(path[step], int(leaf), localized=True)


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise TreeError(f"{what} must be a JSON {_KINDS[kind]}, not {type(value).__name__}")
    return value


_KINDS = {dict: "object", list: "list", bool: "true or false"}
