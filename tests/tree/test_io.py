"""Saved forests and JSON trees: round trips, and one clear sentence for every kind of fault."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from elpo_fast.tree import io
from elpo_fast.tree.store import ARRAYS, Forest, Tree, TreeError

from .twin import random_forest

FIGURE = Path(__file__).parents[1] / "data" / "figure4.json"


def write(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_round_trip(tmp_path):
    forest = random_forest(3, trees=4)
    path = tmp_path / "trees.npz"
    io.save(forest, path)
    again = io.read(path)
    for field in dataclasses.fields(Forest):
        before, after = getattr(forest, field.name), getattr(again, field.name)
        if field.name in ARRAYS:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after, err_msg=field.name)
        else:
            assert before == after
    assert os.listdir(tmp_path) == ["trees.npz"]


def test_texts_of_any_language_survive(tmp_path):
    tree = Tree([1], task_id="π/2 ≠ ½", info={"nested": {"list": [1, None, "é"]}})
    node = tree.add_step(0, [2], [1], [0], [0], tool_call=False)
    tree.finish(node, reward=0, correct=False, end="answer", reason="erwartet: „4“")
    io.save(Forest.from_trees([tree]), tmp_path / "t.npz")
    again = io.load(tmp_path / "t.npz")
    assert again.task_ids == ("π/2 ≠ ½",)
    assert again.infos == ({"nested": {"list": [1, None, "é"]}},)
    assert again.reasons == ("erwartet: „4“",)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "trees.npz"
    io.save(random_forest(1), path)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space left"):
        io.save(random_forest(2), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["trees.npz"]


def test_info_that_is_not_json_is_refused(tmp_path):
    tree = Tree([1], info={"array": np.zeros(2)})
    node = tree.add_step(0, [2], [1], [0], [0], tool_call=False)
    tree.finish(node, reward=0, correct=False, end="answer")
    with pytest.raises(TreeError, match="info must be plain JSON"):
        io.save(Forest.from_trees([tree]), tmp_path / "t.npz")
    assert os.listdir(tmp_path) == []


def test_damaged_files_are_refused(tmp_path):
    """Whatever byte is wrong: a `TreeError`, or the damage did not matter."""
    path = tmp_path / "trees.npz"
    io.save(random_forest(0, trees=1, leaves=2), path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in [*range(300), *rng.integers(0, len(good), 300)]:
        bad = bytearray(good)
        bad[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            io.load(path)
        except TreeError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 300
    for length in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(TreeError, match="damaged"):
            io.load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, meta=np.frombuffer(b'{"format": "other"}', np.uint8), parent=np.zeros(1))
    with pytest.raises(TreeError, match="not a saved forest"):
        io.load(path)
    np.savez(path, wrong=np.zeros(1))
    with pytest.raises(TreeError, match="not a saved forest"):
        io.load(path)
    np.save(tmp_path / "x.npy", np.zeros(1))
    (tmp_path / "x.npy").rename(path)
    with pytest.raises(TreeError, match="not a saved forest"):
        io.load(path)
    with pytest.raises(TreeError, match=r"cannot read .*: No such file"):
        io.load(tmp_path / "missing.npz")


def test_missing_texts_are_refused(tmp_path):
    forest = random_forest(0)
    arrays = {name: getattr(forest, name) for name in ARRAYS}
    for meta, message in (
        ({"format": "elpo-forest-1"}, "texts are incomplete"),
        ({"format": "elpo-forest-0"}, "not a saved forest of this version"),
        ([], "not a saved forest of this version"),
    ):
        text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(tmp_path / "x.npz", meta=text, **arrays)
        with pytest.raises(TreeError, match=message):
            io.load(tmp_path / "x.npz")


def test_flat_and_nested_forms_agree(tmp_path):
    nested = {
        "tree": {
            "id": "r",
            "children": [
                {"id": 1, "children": [{"id": "x", "reward": 1}, {"id": "y", "reward": -1.1}]},
                {"id": "z", "reward": 0, "correct": True},
            ],
        },
        "task_id": "t",
    }
    flat = {
        "nodes": [
            {"id": "x", "parent": 1, "reward": 1},
            {"id": "r", "parent": None},
            {"id": 1, "parent": "r"},
            {"id": "y", "parent": "1", "reward": -1.1},
            {"id": "z", "parent": "r", "reward": 0, "correct": True},
        ],
        "task_id": "t",
    }
    one, two = (io.read(write(tmp_path / "t.json", data)) for data in (nested, flat))
    for name in ("parent", "reward", "correct", "leaf_node", "tool_call"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert one.infos == two.infos == ({"node_names": ["r", "1", "x", "y", "z"]},)
    assert one.correct.tolist() == [-1, -1, 1, 0, 1]
    assert one.task_ids == ("t",)


def test_figure_reads_in_sampling_order():
    data = json.loads(FIGURE.read_text())
    forest = io.read(FIGURE)
    names = forest.infos[0]["node_names"]
    assert forest.reward[forest.leaf_node].tolist() == data["rewards"]
    by_leaf = [names[node] for node in forest.leaf_node]
    assert [by_leaf[i] for i in (0, 9, 15)] == ["leaf0", "leaf9", "leaf15"]
    assert [names[node] for node in forest.critical_node] == ["a", "c5"]
    assert forest.critical_leaf.tolist() == [0, 5]


def leaf(name: object, **more: object) -> dict[str, object]:
    return {"id": name, "reward": 1.0, **more}


def nested(*children: object, **top: object) -> dict[str, object]:
    return {"tree": {"id": "r", "children": list(children)}, **top}


def flat(*nodes: tuple[object, object], reward: object = 1.0) -> dict[str, object]:
    return {"nodes": [{"id": i, "parent": p, "reward": reward} for i, p in nodes]}


MALFORMED = {
    "not-json": ("{", "is not JSON"),
    "empty": ("", "is not JSON"),
    "huge-integer": ("[" + "9" * 5000 + "]", "is not JSON"),
    "too-deep": ("[" * 100_000, "nested too deeply"),
    "list": ([], "the file must be a JSON object, not list"),
    "number": ("3", "the file must be a JSON object, not int"),
    "neither-form": ({}, 'either "tree"'),
    "both-forms": ({"tree": {}, "nodes": []}, 'either "tree"'),
    "tree-is-a-list": ({"tree": []}, "every node must be a JSON object"),
    "no-nodes": ({"nodes": []}, "a root and at least one step"),
    "nodes-is-an-object": ({"nodes": {}}, "nodes must be a JSON list"),
    "node-is-a-text": ({"nodes": ["a"]}, "every node must be a JSON object, not str"),
    "children-is-a-text": (
        nested({"id": "a", "children": "b"}),
        "children of a must be a JSON list",
    ),
    "root-only": ({"tree": leaf("r")}, "a root and at least one step"),
    "no-id": (nested({"reward": 1.0}), "id must be a text or an integer, not None"),
    "odd-id": (nested(leaf([1])), "id must be a text or an integer"),
    "same-id": (nested(leaf("a"), leaf("a")), "'a' is used twice"),
    "same-id-by-number": (nested(leaf("1"), leaf(1)), "'1' is used twice"),
    "no-parent-key": ({"nodes": [{"id": "r"}]}, "'r' has no \"parent\""),
    "unknown-parent": (flat(("r", None), ("a", "q")), "'a' has the parent 'q'"),
    "two-roots": (flat(("r", None), ("s", None)), "one root, but 'r' and 's'"),
    "cycle": (
        {
            "nodes": [
                {"id": "r", "parent": None},
                {"id": "c", "parent": "r", "reward": 1},
                {"id": "a", "parent": "b"},
                {"id": "b", "parent": "a"},
            ]
        },
        "'a' .* form a cycle",
    ),
    "own-parent": ({"nodes": [{"id": "r", "parent": None}, {"id": "a", "parent": "a"}]}, "a cycle"),
    "only-a-cycle": (flat(("a", "b"), ("b", "a")), "a cycle"),
    "no-reward": (nested({"id": "a"}), "leaf 'a' has no reward"),
    "null-reward": (nested({"id": "a", "reward": None}), "leaf 'a' has no reward"),
    "nan": ('{"tree": {"id": "r", "children": [{"id": "a", "reward": NaN}]}}', "must be finite"),
    "infinite": ('{"tree": {"id": "r", "children": [{"id": "a", "reward": -Infinity}]}}', "finite"),
    "beyond-floats": (nested({"id": "a", "reward": 10**400}), "must be finite"),
    "text-reward": (nested({"id": "a", "reward": "1"}), "reward '1', which is not a number"),
    "bool-reward": (nested({"id": "a", "reward": True}), "reward True, which is not a number"),
    "inner-reward": (nested({"id": "a", "reward": 1, "children": [leaf("b")]}), "'a' has children"),
    "inner-leaf": (
        nested({"id": "a", "leaf": 0, "children": [{"id": "b", "leaf": 0}]}, rewards=[1]),
        "'a' has children",
    ),
    "text-correct": (nested(leaf("a", correct="yes")), "correct of a must be a JSON true or false"),
    "text-tool-call": (nested(leaf("a", tool_call=1)), "tool_call of a must be a JSON true or fal"),
    "no-leaf-index": (nested({"id": "a"}, rewards=[1]), "'a' has no reward: it lacks"),
    "both-rewards": (nested(leaf("a", leaf=0), rewards=[1]), "its own reward although"),
    "leaf-too-large": (nested({"id": "a", "leaf": 1}, rewards=[1]), "is leaf 1, but there are 1"),
    "leaf-negative": (nested({"id": "a", "leaf": -1}, rewards=[1]), "is leaf -1, but there are"),
    "leaf-is-a-text": (nested({"id": "a", "leaf": "0"}, rewards=[1]), "is leaf '0', but there"),
    "leaf-twice": (
        nested({"id": "a", "leaf": 0}, {"id": "b", "leaf": 0}, rewards=[1, 1]),
        "leaf 0 is used twice, by 'a' and 'b'",
    ),
    "leaf-unused": (nested({"id": "a", "leaf": 0}, rewards=[1, 1]), "reward 1 belongs to no leaf"),
    "rewards-is-a-number": (
        nested({"id": "a", "leaf": 0}, rewards=1),
        "rewards must be a JSON lis",
    ),
    "critical-leaf": (nested(leaf("a"), critical_steps={"1": 1}), "the leaf '1', which does not"),
    "critical-name": (nested(leaf("a"), critical_steps={"a": 1}), "the leaf 'a', which does not"),
    "critical-step": (nested(leaf("a"), critical_steps={"0": 2}), "step 2 of leaf 0 is not a step"),
    "critical-root": (nested(leaf("a"), critical_steps={"0": 0}), "step 0 of leaf 0 is not a step"),
    "critical-list": (nested(leaf("a"), critical_steps=[1]), "critical_steps must be a JSON obj"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_json_trees_are_refused(tmp_path, name):
    data, message = MALFORMED[name]
    path = write(tmp_path / "tree.json", data)
    with pytest.raises(TreeError, match=message) as caught:
        io.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(TreeError, match="No such file"):
        io.read(tmp_path / "none.json")
    with pytest.raises(TreeError, match="Is a directory"):
        io.read(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TreeError, match="neither UTF-8 text nor"):
        io.read(tmp_path / "bytes.json")
