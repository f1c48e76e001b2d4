"""Rollout trees: `Tree` grows one task's tree online, `Forest` is many of them as flat arrays.

Node 0 of a tree is its root, the prompt tokens (none of them the agent's). Every other node is one
step: an assistant message and the environment tokens after it (tool response, template glue). A
trajectory is a path from the root to a leaf; leaves keep the order in which they were finished.

Invariants: a parent has a smaller index than its children; exactly the childless nodes are leaves,
each of exactly one trajectory; rewards are finite on leaves and NaN elsewhere; log-probs and
entropies (nats) mean nothing on tokens that are not the agent's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elpo_fast.tree import ops


class TreeError(ValueError):
    """A malformed tree; the message is one sentence that names the fault."""


class Tree:
    """One task's rollout tree as growable parallel lists, indexed by node.

    `parent` (-1 for the root), `depth`, `tool_call`, `weight_version`, `reward` (NaN), `correct`
    (-1) and the token arrays `token_ids`, `agent`, `logprob`, `entropy`; `leaves`, `ends` and
    `reasons` are indexed by leaf ordinal, the `critical_*` lists by search.
    """

    def __init__(
        self, prompt_ids: ArrayLike, *, task_id: str = "", info: Mapping[str, Any] | None = None
    ) -> None:
        self.task_id = task_id
        self.info = dict(info or {})
        self.parent: list[int] = []
        self.depth: list[int] = []
        self.tool_call: list[bool] = []
        self.weight_version: list[int] = []
        self.reward: list[float] = []
        self.correct: list[int] = []
        self.token_ids: list[NDArray[np.int32]] = []
        self.agent: list[NDArray[np.uint8]] = []
        self.logprob: list[NDArray[np.float32]] = []
        self.entropy: list[NDArray[np.float32]] = []
        self.leaves: list[int] = []
        self.ends: list[str] = []
        self.reasons: list[str] = []
        self.critical_node: list[int] = []
        self.critical_leaf: list[int] = []
        self.critical_localized: list[bool] = []
        self._path_length: list[int] = []
        self._children: list[int] = []  # how many
        nothing = np.zeros(np.size(prompt_ids))
        self.add_step(-1, prompt_ids, nothing, nothing, nothing, tool_call=False)

    def __len__(self) -> int:
        """Number of nodes, the root included."""
        return len(self.parent)

    def add_step(
        self,
        parent: int,
        token_ids: ArrayLike,
        agent_mask: ArrayLike,
        logprobs: ArrayLike,
        entropies: ArrayLike,
        *,
        tool_call: bool,
        weight_version: int = 0,
    ) -> int:
        """Add one step below `parent`; its node index.

        The four arrays are `[N]` (`N = 0` is fine) and are copied: token ids, 1 where the agent
        wrote the token, log-prob and entropy under the sampling distribution (0 elsewhere).
        """
        root = not self.parent  # `__init__` adds the prompt
        if not root:
            self._check_node(parent)
            if self.correct[parent] >= 0:
                raise TreeError(f"node {parent} is finished and cannot get children")
        arrays = (
            np.array(token_ids, np.int32),
            np.array(agent_mask, np.bool_).view(np.uint8),
            np.array(logprobs, np.float32),
            np.array(entropies, np.float32),
        )
        size = arrays[0].size
        if any(array.shape != (size,) for array in arrays):
            raise TreeError(
                "token ids, agent mask, log-probs and entropies of a step need one common length, "
                f"not shapes {', '.join(str(list(array.shape)) for array in arrays)}"
            )
        self.parent.append(parent)
        self.depth.append(0 if root else self.depth[parent] + 1)
        self.tool_call.append(bool(tool_call))
        self.weight_version.append(int(weight_version))
        self.reward.append(math.nan)
        self.correct.append(-1)
        self.token_ids.append(arrays[0])
        self.agent.append(arrays[1])
        self.logprob.append(arrays[2])
        self.entropy.append(arrays[3])
        self._path_length.append(size if root else self._path_length[parent] + size)
        self._children.append(0)
        if not root:
            self._children[parent] += 1
        return len(self) - 1

    def finish(self, node: int, *, reward: float, correct: bool, end: str, reason: str = "") -> int:
        """End a trajectory at `node` with its verdict; the leaf's ordinal in sampling order."""
        self._check_node(node)
        if node == 0:
            raise TreeError("the root cannot be a leaf; a trajectory has at least one step")
        if self.correct[node] >= 0:
            raise TreeError(f"node {node} is already the leaf of another trajectory")
        if self._children[node]:
            raise TreeError(f"node {node} has children and cannot be a leaf")
        if not math.isfinite(reward):
            raise TreeError(f"node {node} has reward {reward}; rewards must be finite")
        self.reward[node] = float(reward)
        self.correct[node] = int(correct)
        self.leaves.append(node)
        self.ends.append(end)
        self.reasons.append(reason)
        return len(self.leaves) - 1

    def mark_critical(self, node: int, leaf: int, localized: bool) -> None:
        """Record a search's result: first irrecoverable step `node` on the path of `leaf` (an
        ordinal); `localized` is false where the budget ended before the search did."""
        if not 0 <= leaf < len(self.leaves):
            raise TreeError(f"leaf {leaf} does not exist; the tree has {len(self.leaves)} leaves")
        if node not in self.path(self.leaves[leaf])[1:]:
            raise TreeError(f"critical node {node} is not a step on the path of leaf {leaf}")
        self.critical_node.append(node)
        self.critical_leaf.append(leaf)
        self.critical_localized.append(bool(localized))

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        self._check_node(node)
        return _path(self.parent, node)

    def path_tokens(self, node: int) -> NDArray[np.int32]:
        """Token ids from the first prompt token to the last token of `node`, `int32 [N]`."""
        return np.concatenate([self.token_ids[at] for at in self.path(node)])

    def path_length(self, node: int) -> int:
        """Number of tokens of `path_tokens(node)`."""
        self._check_node(node)
        return self._path_length[node]

    def _check_node(self, node: int) -> None:
        if not 0 <= node < len(self):
            raise TreeError(f"node {node} does not exist; the tree has {len(self)} nodes")


@dataclass(frozen=True, eq=False)
class Forest:
    """Immutable concatenation of `T` trees with `N` nodes, `S` tokens and `L` leaves in all.

    Node `n` of the whole forest belongs to tree `tree[n]`, whose nodes are
    `node_start[t] : node_start[t + 1]` with the root first; `parent` holds such global indices.
    Tokens of node `n` are `token_start[n] : token_start[n + 1]`; leaves of tree `t`, in sampling
    order, are `leaf_start[t] : leaf_start[t + 1]`. Checked on creation; raises `TreeError`.
    """

    task_ids: tuple[str, ...]
    infos: tuple[dict[str, Any], ...]
    node_start: NDArray[np.int64]  # [T + 1]
    parent: NDArray[np.int64]  # [N], -1 for roots
    token_start: NDArray[np.int64]  # [N + 1]
    reward: NDArray[np.float64]  # [N], NaN where not a leaf
    correct: NDArray[np.int8]  # [N], -1 where not a leaf
    tool_call: NDArray[np.bool_]  # [N]
    weight_version: NDArray[np.int64]  # [N]
    token_ids: NDArray[np.int32]  # [S]
    agent: NDArray[np.uint8]  # [S]
    logprob: NDArray[np.float32]  # [S]
    entropy: NDArray[np.float32]  # [S]
    leaf_start: NDArray[np.int64]  # [T + 1]
    leaf_node: NDArray[np.int64]  # [L]
    ends: tuple[str, ...]  # [L]
    reasons: tuple[str, ...]  # [L]
    critical_node: NDArray[np.int64]  # [C]
    critical_leaf: NDArray[np.int64]  # [C], index into the leaf arrays
    critical_localized: NDArray[np.bool_]  # [C]

    def __post_init__(self) -> None:
        for name, dtype in ARRAYS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                raise TreeError(
                    f"forest array {name} is {array.dtype} {list(array.shape)}, "
                    f"expected one dimension of {np.dtype(dtype)}"
                )
            # One mutability everywhere also means one compiled version of every numba pass.
            array.setflags(write=False)
        _validate(self)

    @classmethod
    def from_trees(cls, trees: Sequence[Tree]) -> Forest:
        """Concatenate finished trees; `TreeError` where a branch is not finished."""
        if not trees:
            raise TreeError("a forest needs at least one tree")
        for index, tree in enumerate(trees):
            for node, children in enumerate(tree._children):
                if not children and tree.correct[node] < 0:
                    raise TreeError(
                        f"tree {index} (task {tree.task_id!r}): node {node} has neither children "
                        "nor a verdict; finish every trajectory first"
                    )
        node_start = _offsets(len(tree) for tree in trees)
        leaf_start = _offsets(len(tree.leaves) for tree in trees)

        def flat(name: str, dtype: Any, shift: NDArray[np.int64] | None = None) -> NDArray[Any]:
            """One list attribute of all trees end to end; `shift` makes its indices global."""
            lists = [getattr(tree, name) for tree in trees]
            array = np.array(list(chain.from_iterable(lists)), dtype)
            if shift is not None:
                array += np.repeat(shift[:-1], [len(values) for values in lists])
            return array

        def tokens(name: str) -> NDArray[Any]:
            return np.concatenate([chunk for tree in trees for chunk in getattr(tree, name)])

        parent = flat("parent", np.int64, node_start)
        parent[node_start[:-1]] = -1
        return cls(
            task_ids=tuple(tree.task_id for tree in trees),
            infos=tuple(tree.info for tree in trees),
            node_start=node_start,
            parent=parent,
            token_start=_offsets(len(ids) for tree in trees for ids in tree.token_ids),
            reward=flat("reward", np.float64),
            correct=flat("correct", np.int8),
            tool_call=flat("tool_call", np.bool_),
            weight_version=flat("weight_version", np.int64),
            token_ids=tokens("token_ids"),
            agent=tokens("agent"),
            logprob=tokens("logprob"),
            entropy=tokens("entropy"),
            leaf_start=leaf_start,
            leaf_node=flat("leaves", np.int64, node_start),
            ends=tuple(chain.from_iterable(tree.ends for tree in trees)),
            reasons=tuple(chain.from_iterable(tree.reasons for tree in trees)),
            critical_node=flat("critical_node", np.int64, node_start),
            critical_leaf=flat("critical_leaf", np.int64, leaf_start),
            critical_localized=flat("critical_localized", np.bool_),
        )

    def __len__(self) -> int:
        """Number of trees."""
        return len(self.task_ids)

    def nodes(self, tree: int) -> range:
        """Nodes of one tree, the root first, parents before children."""
        return range(int(self.node_start[tree]), int(self.node_start[tree + 1]))

    def leaves(self, tree: int) -> range:
        """Leaves of one tree in sampling order, as indices into the leaf arrays."""
        return range(int(self.leaf_start[tree]), int(self.leaf_start[tree + 1]))

    def path(self, node: int) -> list[int]:
        """Nodes from the root of its tree to `node`, both included."""
        return _path(self.parent, node)

    @cached_property
    def tree(self) -> NDArray[np.int64]:
        """Tree of each node, `[N]`."""
        return np.repeat(np.arange(len(self)), np.diff(self.node_start))

    @cached_property
    def depth(self) -> NDArray[np.int64]:
        """Number of steps from the root to each node, itself included, `[N]`."""
        return ops.path_sum(self.parent, (self.parent >= 0).astype(np.int64))

    @property
    def token_count(self) -> NDArray[np.int64]:
        """Number of tokens of each node, `[N]`."""
        return np.diff(self.token_start)


ARRAYS: dict[str, type[np.generic]] = {
    "node_start": np.int64,
    "parent": np.int64,
    "token_start": np.int64,
    "reward": np.float64,
    "correct": np.int8,
    "tool_call": np.bool_,
    "weight_version": np.int64,
    "token_ids": np.int32,
    "agent": np.uint8,
    "logprob": np.float32,
    "entropy": np.float32,
    "leaf_start": np.int64,
    "leaf_node": np.int64,
    "critical_node": np.int64,
    "critical_leaf": np.int64,
    "critical_localized": np.bool_,
}
"""The array fields of `Forest` and their types."""


def _path(parent: Sequence[int] | NDArray[np.int64], node: int) -> list[int]:
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = int(parent[node])
    return nodes[::-1]


def _offsets(counts: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *counts], dtype=np.int64)


def _validate(forest: Forest) -> None:
    """Hold every invariant that a numba pass relies on: they do not check indices themselves."""
    trees, nodes, leaves = len(forest), len(forest.parent), len(forest.leaf_node)
    searches = len(forest.critical_node)

    def need(holds: Any, problem: str) -> None:
        if not np.all(holds):
            raise TreeError(f"malformed forest: {problem}")

    def need_offsets(name: str, length: int, total: int, smallest: int) -> None:
        start = getattr(forest, name)
        need(
            len(start) == length + 1
            and start[0] == 0
            and start[-1] == total
            and np.all(np.diff(start) >= smallest),
            f"{name} must rise from 0 to {total} in {length} steps of at least {smallest}",
        )

    need(trees > 0, "it has no tree")
    need_offsets("node_start", trees, nodes, 1)
    need_offsets("leaf_start", trees, leaves, 1)
    need_offsets("token_start", nodes, len(forest.token_ids), 0)
    for names, length in (
        (("infos",), trees),
        (("reward", "correct", "tool_call", "weight_version"), nodes),
        (("agent", "logprob", "entropy"), len(forest.token_ids)),
        (("ends", "reasons"), leaves),
        (("critical_leaf", "critical_localized"), searches),
    ):
        for name in names:
            need(len(getattr(forest, name)) == length, f"{name} must have {length} entries")

    index = np.arange(nodes)
    root = np.zeros(nodes, bool)
    root[forest.node_start[:-1]] = True
    first = forest.node_start[forest.tree]
    need(forest.parent[root] == -1, "the first node of a tree must be its root")
    inner = ~root
    need(
        (forest.parent[inner] >= first[inner]) & (forest.parent[inner] < index[inner]),
        "a node's parent must come before it in the same tree",
    )
    childless = np.ones(nodes, bool)
    childless[forest.parent[inner]] = False
    need((forest.leaf_node >= 0) & (forest.leaf_node < nodes), "a leaf index is out of range")
    is_leaf = np.bincount(forest.leaf_node, minlength=nodes)
    need(is_leaf <= 1, "a node is the leaf of two trajectories")
    need(is_leaf == (childless & inner), "exactly the childless nodes must be leaves")
    need(
        np.repeat(np.arange(trees), np.diff(forest.leaf_start)) == forest.tree[forest.leaf_node],
        "a leaf belongs to another tree",
    )
    need(np.isfinite(forest.reward) == is_leaf, "rewards must be finite on leaves, NaN elsewhere")
    need(np.isnan(forest.reward[is_leaf == 0]), "inner nodes must have the reward NaN")
    need(
        np.where(is_leaf, (forest.correct >> 1) == 0, forest.correct == -1),
        "correct must be 0 or 1 on leaves and -1 elsewhere",
    )
    for node, leaf in zip(forest.critical_node, forest.critical_leaf, strict=True):
        need(0 <= leaf < leaves, "a critical step's leaf is out of range")
        need(
            node in forest.path(int(forest.leaf_node[leaf]))[1:],
            "a critical step is not on the path of its leaf",
        )
