"""Growing trees, concatenating them, and refusing malformed ones."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from elpo_fast.tree.store import ARRAYS, Forest, Tree, TreeError

from .twin import random_forest, random_tree


def small() -> Tree:
    """root(2) - a(3) - b(1) leaf 0 correct, a - c(0) leaf 1 wrong."""
    tree = Tree([7, 8], task_id="sum", info={"level": 3})
    a = tree.add_step(0, [1, 2, 3], [1, 1, 0], [-0.1, -0.2, 0], [0.5, 0.6, 0], tool_call=True)
    b = tree.add_step(a, [4], [1], [-0.3], [0.7], tool_call=False, weight_version=5)
    c = tree.add_step(a, [], [], [], [], tool_call=False)
    assert (tree.finish(b, reward=1.0, correct=True, end="answer", reason="right"), c) == (0, 3)
    assert tree.finish(c, reward=-1.1, correct=False, end="length") == 1
    return tree


def test_paths_and_their_tokens():
    tree = small()
    assert tree.path(2) == [0, 1, 2]
    assert tree.path_tokens(2).tolist() == [7, 8, 1, 2, 3, 4]
    assert tree.path_tokens(2).dtype == np.int32
    assert [tree.path_length(node) for node in range(4)] == [2, 5, 6, 5]
    assert tree.depth == [0, 1, 2, 2]
    assert len(tree) == 4


def test_steps_copy_what_they_are_given():
    tree, ids = Tree([1]), np.array([5, 6], np.int32)
    node = tree.add_step(0, ids, [1, 1], [0, 0], [0, 0], tool_call=False)
    ids[:] = 0
    assert tree.token_ids[node].tolist() == [5, 6]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda t: t.add_step(2, [], [], [], [], tool_call=False), "is finished"),
        (lambda t: t.add_step(9, [], [], [], [], tool_call=False), "does not exist"),
        (lambda t: t.add_step(-1, [], [], [], [], tool_call=False), "does not exist"),
        (lambda t: t.add_step(1, [1], [1, 1], [0], [0], tool_call=False), "one common length"),
        (lambda t: t.add_step(1, [[1]], [[1]], [[0]], [[0]], tool_call=False), "common length"),
        (lambda t: t.finish(2, reward=0, correct=False, end="answer"), "already the leaf"),
        (lambda t: t.finish(1, reward=0, correct=False, end="answer"), "has children"),
        (lambda t: t.finish(0, reward=0, correct=False, end="answer"), "root cannot be a leaf"),
        (lambda t: t.finish(7, reward=0, correct=False, end="answer"), "does not exist"),
        (lambda t: t.mark_critical(2, 1, True), "not a step on the path"),
        (lambda t: t.mark_critical(0, 1, True), "not a step on the path"),
        (lambda t: t.mark_critical(1, 2, True), "leaf 2 does not exist"),
        (lambda t: t.path(4), "does not exist"),
        (lambda t: t.path_length(-1), "does not exist"),
    ],
)
def test_misuse_is_refused_and_changes_nothing(act, message):
    tree = small()
    with pytest.raises(TreeError, match=message):
        act(tree)
    assert (len(tree), len(tree.leaves), tree.critical_node) == (4, 2, [])


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_rewards_must_be_finite(reward):
    tree = Tree([1])
    node = tree.add_step(0, [2], [1], [0], [0], tool_call=False)
    with pytest.raises(TreeError, match="must be finite"):
        tree.finish(node, reward=reward, correct=False, end="answer")


def test_forest_holds_what_the_trees_hold():
    rng = np.random.default_rng(0)
    trees = [random_tree(rng, task_id=f"t{i}") for i in range(4)]
    forest = Forest.from_trees(trees)
    assert forest.task_ids == ("t0", "t1", "t2", "t3")
    for t, tree in enumerate(trees):
        nodes = forest.nodes(t)
        first = nodes[0]
        assert len(nodes) == len(tree)
        for node in range(len(tree)):
            here = first + node
            tokens = slice(forest.token_start[here], forest.token_start[here + 1])
            for name in ("token_ids", "agent", "logprob", "entropy"):
                assert (getattr(forest, name)[tokens] == getattr(tree, name)[node]).all()
            assert forest.token_count[here] == len(tree.token_ids[node])
            assert forest.path(here) == [first + up for up in tree.path(node)]
            assert (forest.tree[here], forest.depth[here]) == (t, tree.depth[node])
            assert forest.tool_call[here] == tree.tool_call[node]
            assert forest.weight_version[here] == tree.weight_version[node]
            assert forest.correct[here] == tree.correct[node]
            assert forest.reward[here] == tree.reward[node] or np.isnan(forest.reward[here])
        leaves = forest.leaves(t)
        assert (forest.leaf_node[leaves] - first).tolist() == tree.leaves
        assert list(forest.ends[leaves[0] : leaves[-1] + 1]) == tree.ends
        assert list(forest.reasons[leaves[0] : leaves[-1] + 1]) == tree.reasons
        mine = forest.tree[forest.critical_node] == t
        assert (forest.critical_node[mine] - first).tolist() == tree.critical_node
        assert (forest.critical_leaf[mine] - leaves[0]).tolist() == tree.critical_leaf
        assert forest.critical_localized[mine].tolist() == tree.critical_localized


def test_forest_is_immutable():
    forest = random_forest(1)
    with pytest.raises(ValueError, match="read-only"):
        forest.reward[0] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        forest.reward = forest.reward


def test_unfinished_branches_are_refused():
    tree = small()
    tree.add_step(1, [3], [1], [0], [0], tool_call=False)
    with pytest.raises(TreeError, match=r"task 'sum'.*node 4 has neither children nor a verdict"):
        Forest.from_trees([tree])
    with pytest.raises(TreeError, match="node 0 has neither"):
        Forest.from_trees([Tree([1])])
    with pytest.raises(TreeError, match="at least one tree"):
        Forest.from_trees([])


def changed(name: str, index: int, value: object) -> Forest:
    """The small tree as a forest with one array entry changed."""
    forest = Forest.from_trees([small(), small()])
    array = getattr(forest, name).copy()
    array[index] = value
    return dataclasses.replace(forest, **{name: array})


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("parent", 1, 1, "parent must come before"),
        ("parent", 1, 3, "parent must come before"),
        ("parent", 1, -1, "parent must come before"),
        ("parent", 5, 0, "parent must come before"),
        ("parent", 0, 0, "must be its root"),
        ("node_start", 1, 0, "node_start must rise"),
        ("node_start", 0, 1, "node_start must rise"),
        ("leaf_start", 1, 0, "leaf_start must rise"),
        ("leaf_start", 1, 1, "another tree"),
        ("token_start", 2, 99, "token_start must rise"),
        ("leaf_node", 0, 99, "out of range"),
        ("leaf_node", 0, -1, "out of range"),
        ("leaf_node", 0, 3, "leaf of two"),
        ("leaf_node", 0, 1, "childless nodes must be leaves"),
        ("reward", 2, math.nan, "finite on leaves"),
        ("reward", 2, math.inf, "finite on leaves"),
        ("reward", 1, 1.0, "finite on leaves"),
        ("reward", 1, math.inf, "must have the reward NaN"),
        ("correct", 2, -1, "correct must be"),
        ("correct", 2, 2, "correct must be"),
        ("correct", 1, 0, "correct must be"),
    ],
)
def test_malformed_forests_are_refused(name, index, value, message):
    with pytest.raises(TreeError, match=message):
        changed(name, index, value)


@pytest.mark.parametrize(
    ("node", "leaf", "message"),
    [(1, 9, "leaf is out of range"), (2, 1, "not on the path"), (0, 0, "not on the path")],
)
def test_malformed_critical_records_are_refused(node, leaf, message):
    tree = small()
    tree.mark_critical(1, 0, True)
    forest = Forest.from_trees([tree])
    with pytest.raises(TreeError, match=message):
        dataclasses.replace(forest, critical_node=np.array([node]), critical_leaf=np.array([leaf]))


@pytest.mark.parametrize("name", list(ARRAYS))
def test_wrong_types_and_lengths_are_refused(name):
    forest = random_forest(2)
    array = getattr(forest, name)
    with pytest.raises(TreeError, match=f"{name} is complex64"):
        dataclasses.replace(forest, **{name: array.astype(np.complex64)})
    with pytest.raises(TreeError, match=f"{name} is .* expected one dimension"):
        dataclasses.replace(forest, **{name: array[None]})
    with pytest.raises(TreeError, match="malformed forest"):
        dataclasses.replace(forest, **{name: np.append(array, array[-1:])})
