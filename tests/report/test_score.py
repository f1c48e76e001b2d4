"""`elpo tree score`: the printed figure, full precision as JSON, and one line for every fault."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from elpo_fast.report.score import score_command
from elpo_fast.tree import io
from elpo_fast.tree.store import Forest, Tree

FILE = Path(__file__).parents[1] / "data" / "figure4.json"


def test_table_shows_every_number_of_the_figure(capsys):
    assert score_command(FILE, 0.5, as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == [
        "node", "node reward", "branch", "trajectory", "hierarchical",
    ]  # fmt: skip
    shown = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    expected = json.loads(FILE.read_text())["expected"]
    assert set(shown) == {"root", *expected}
    for name, numbers in expected.items():
        assert shown[name] == [f"{number:.3f}" for number in numbers], name
    assert "-0.000" not in " ".join(lines)


def test_json_has_full_precision(capsys):
    assert score_command(str(FILE), 0.25, as_json=True) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["lambda"] == 0.25
    (tree,) = output["trees"]
    node = tree["nodes"]["c5"]
    assert node["parent"] == "c"
    assert tree["nodes"]["root"]["parent"] is None
    assert node["branch"] == pytest.approx(-1.4142, abs=1e-4)
    assert node["trajectory"] == pytest.approx(-1 / 7**0.5, abs=1e-5)
    blend = 0.25 * node["branch"] + 0.75 * node["trajectory"]
    assert node["hierarchical"] == pytest.approx(blend, rel=1e-14)
    assert node["node_reward"] == pytest.approx(-1.1, rel=1e-14)


@pytest.mark.parametrize("as_json", [False, True])
def test_saved_forests_are_scored_tree_by_tree(tmp_path, capsys, as_json):
    trees = []
    for task, rewards in (("first", (1.0, 0.0)), ("second", (0.0, 0.0, 1.0))):
        tree = Tree([1], task_id=task)
        for reward in rewards:
            node = tree.add_step(0, [2], [1], [-1], [1], tool_call=False)
            tree.finish(node, reward=reward, correct=reward == 1, end="answer")
        trees.append(tree)
    io.save(Forest.from_trees(trees), tmp_path / "trees.npz")
    assert score_command(tmp_path / "trees.npz", 0.5, as_json) == 0
    out = capsys.readouterr().out
    if as_json:
        output = json.loads(out)["trees"]
        assert [tree["task_id"] for tree in output] == ["first", "second"]
        advantages = [node["hierarchical"] for node in output[1]["nodes"].values()]
        expected = [0, -(0.5**0.5), -(0.5**0.5), 2**0.5]
        np.testing.assert_allclose(advantages, expected, atol=1e-5)
        assert output[1]["nodes"]["3"]["parent"] == "0"
    else:
        assert "tree 0: first" in out
        assert "tree 1: second" in out
        assert out.splitlines()[-1].split() == ["3", "1.000", "1.414", "1.414", "1.414"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"nodes": [{"id": 1, "parent": null}, {"id": 2, "parent": null}]}', "one root"),
        ('{"nodes": [{"id": 1, "parent": 2}, {"id": 2, "parent": 1}]}', "cycle"),
        ('{"tree": {"id": 0, "children": [{"id": 1}]}}', "has no reward"),
        ('{"tree": {"id": 0, "children": [{"id": 1, "reward": NaN}]}}', "must be finite"),
    ],
)
def test_faults_are_one_line_and_exit_code_2(tmp_path, capsys, text, message):
    path = tmp_path / "tree.json"
    path.write_text(text)
    assert score_command(path, 0.5, as_json=False) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("lam", [-0.1, 1.5, float("nan")])
def test_lambda_outside_its_range(capsys, lam):
    assert score_command(FILE, lam, as_json=False) == 2
    assert "is not between 0 and 1" in capsys.readouterr().err


def test_missing_file(tmp_path, capsys):
    assert score_command(tmp_path / "none.json", 0.5, as_json=True) == 2
    assert capsys.readouterr().err.endswith("No such file or directory\n")
