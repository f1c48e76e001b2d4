"""`elpo tree html`: what the page is made of, and that nothing in it is fetched or run."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from elpo_fast import cli
from elpo_fast.algo import score
from elpo_fast.algo.bel_bayes import BayesPlanner
from elpo_fast.config import AlgoConfig
from elpo_fast.model.tokenizer import train_tokenizer
from elpo_fast.report.readable import read_message, read_prompt, read_response
from elpo_fast.report.search import rounds
from elpo_fast.report.tree_page import Pieces, write_tree_page
from elpo_fast.tree import io
from elpo_fast.tree.store import Forest, Tree

FIGURE4 = Path(__file__).parent.parent / "data" / "figure4.json"


def element(text: str, name: str) -> str:
    return re.search(f'<script type="text/plain" id="{name}">(.*?)</script>', text, re.DOTALL)[1]


def unpacked(line: str) -> list[dict]:
    return [json.loads(each) for each in gzip.decompress(base64.b64decode(line)).splitlines()]


def step(tree: Tree, parent: int, call: bool = True) -> int:
    return tree.add_step(parent, [7, 8], [1, 0], [-0.5, 0], [0.25, 0], tool_call=call)


def chain(tree: Tree, parent: int, calls: int, correct: bool) -> list[int]:
    """A trajectory below `parent` of so many tool calls and an answer; its nodes."""
    nodes = []
    for at in range(calls + 1):
        parent = step(tree, parent, call=at < calls)
        nodes.append(parent)
    tree.finish(parent, reward=float(correct), correct=correct, end="answer")
    return nodes


def searched() -> Tree:
    """Four tool calls, the third one wrong: probes after the second and the third."""
    tree = Tree([1, 2], task_id="searched")
    reference = chain(tree, 0, 4, correct=False)
    chain(tree, 0, 1, correct=True)
    chain(tree, reference[1], 2, correct=False)
    chain(tree, reference[1], 2, correct=True)
    chain(tree, reference[2], 1, correct=False)
    tree.mark_critical(reference[2], 0, True)
    return tree


def test_rounds_retrace_the_search():
    tree = searched()
    forest = Forest.from_trees([searched(), tree])
    start = forest.nodes(1).start
    full, later, here = rounds(forest, 1)
    assert (full.node - start, full.first, full.count, full.correct) == (0, 0, 2, 1)
    assert full.search is None and full.suspects == ()
    # 2 of 4 is the middle; one continuation recovered, so that the third or fourth call is to blame
    assert (later.node - start, later.first, later.count, later.correct) == (2, 2, 2, 1)
    assert later.search == 0 and [node - start for node in later.suspects] == [3, 4]
    assert (here.node - start, here.first, here.count, here.correct) == (3, 4, 1, 0)
    assert here.search == 0 and [node - start for node in here.suspects] == [3]


@pytest.mark.parametrize("bayes", [False, True], ids=["bel", "bel_bayes"])
@pytest.mark.parametrize("seed", range(20))
def test_rounds_are_what_the_planner_asked_for(grow, seed, bayes):
    growth = grow(seed, BayesPlanner(16, 3, 1, 3, 5.0, 0.8) if bayes else None)
    asked: list[list[int]] = []
    for request in growth.requests:
        if asked and request.node == asked[-1][0]:
            asked[-1][1] += request.count
        else:
            asked.append([request.node, request.count])
    found = rounds(Forest.from_trees([growth.tree]), 0)
    assert [[each.node, each.count] for each in found] == asked
    assert all(each.search is not None for each in found if each.node != 0)
    for search, critical in enumerate(growth.planner.critical):
        probes = [each for each in found if each.search == search]
        assert bool(probes) == bool(critical.probes) and len(probes) <= critical.probes
        if not bayes:  # which may ask twice in a row from one node
            assert len(probes) == critical.probes
        if critical.localized and probes and not bayes:
            assert probes[-1].suspects == (critical.node,)


def test_rounds_without_a_search_are_not_given_to_one():
    tree = Tree([1])
    first = chain(tree, 0, 2, correct=False)
    chain(tree, first[0], 1, correct=False)
    found = rounds(Forest.from_trees([tree]), 0)
    assert [(each.node, each.count, each.search) for each in found] == [(0, 1, None), (1, 1, None)]


def test_rounds_of_a_single_call_need_no_probe():
    tree = Tree([1])
    first = chain(tree, 0, 1, correct=False)
    second = chain(tree, 0, 2, correct=False)
    chain(tree, second[0], 1, correct=False)
    tree.mark_critical(first[0], 0, True)
    tree.mark_critical(second[0], 1, True)
    assert [each.search for each in rounds(Forest.from_trees([tree]), 0)] == [None, 1]


def test_page_has_the_figures_of_the_paper(tmp_path):
    out = tmp_path / "figure4.html"
    assert cli.main(["tree", "html", str(FIGURE4), "--out", str(out)]) == 0
    text = out.read_text()
    index = json.loads(element(text, "index"))
    assert index["trees"]["outcomes"] == ["0000000011000000"]
    assert index["trees"]["localized"] == [2] and index["trees"]["step"] == [None]
    figures, texts = unpacked(element(text, "details"))
    scored = score(io.read(FIGURE4), AlgoConfig())
    for name in ("node_reward", "branch", "trajectory", "advantage", "eps_low"):
        assert figures[name] == pytest.approx(getattr(scored, name), rel=1e-3, abs=1e-9)
    assert texts["names"][figures["critical"][0]["node"]] == "a"
    assert [each["first"] for each in figures["rounds"]] == [0, 3, 5, 8, 10, 13]


def test_page_fetches_nothing_and_texts_stay_texts(tmp_path):
    tree = Tree([1], task_id="</script><script>alert(1)</script>")
    node = step(tree, 0, call=False)
    tree.finish(node, reward=0, correct=False, end="answer", reason="</script>")
    io.save(Forest.from_trees([tree]), tmp_path / "trees.npz")
    out, _ = write_tree_page(tmp_path / "trees.npz")
    assert out == tmp_path / "trees.html"
    text = out.read_text()
    assert "alert(1)</script>" not in text
    assert json.loads(element(text, "index"))["trees"]["task"] == [tree.task_id]
    own = re.sub(r"http://www.w3.org/2000/svg", "", text)
    assert not re.search(r"https?:|<link|<img|src=|@import|url\(", own)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "trees").mkdir(parents=True)
    (folder / "config.yaml").write_text("algo: {n_total: 4, clip: {eps_low: 0.1}}\n")
    for number in (1, 2, 10):
        forest = Forest.from_trees([searched()] * number)
        io.save(forest, folder / "trees" / f"step_{number:06d}.npz")
    return folder


def test_page_of_a_run_has_its_steps_and_scores(run, monkeypatch):
    monkeypatch.setattr(
        "elpo_fast.report.tree_page.decoder", lambda _: lambda ids: "".join(f"<{i}>" for i in ids)
    )
    out, trees = write_tree_page(run, steps=(2, 10))
    assert (out, trees) == (run / "trees.html", 12)
    text = out.read_text()
    index = json.loads(element(text, "index"))["trees"]
    assert index["step"] == [2] * 2 + [10] * 10 and index["tree"] == [0, 1, *range(10)]
    figures, texts = unpacked(element(text, "details").splitlines()[3])
    assert figures["eps_low"][1] == 0.1 and max(figures["eps_low"]) == 0.215
    assert texts["words"][1] == "<7>" and texts["response"][1] == "<8>"
    (rows,) = unpacked(element(text, "tokens").splitlines()[3])
    assert rows[0] is None and rows[1] == [["<7>"], [-0.5], [0.25], None]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "cannot read nowhere"),
        (["run", "--steps", "3-9"], "has no trees of the steps 3-9; it has 1 to 10"),
        ([str(FIGURE4), "--out", "no/folder/page.html"], "cannot write no/folder/page.html"),
        (["."], "is not a run folder"),
    ],
    ids=["missing", "steps", "out", "folder"],
)
def test_faults_are_one_line(arguments, said, run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr("elpo_fast.report.tree_page.decoder", lambda _: None)
    assert cli.main(["tree", "html", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_file_outside_a_run_is_read_by_a_tokenizer(grow, characters, tmp_path, monkeypatch):
    io.save(Forest.from_trees([grow(3).tree]), tmp_path / "some.npz")
    monkeypatch.setattr("elpo_fast.report.tree_page.tokenizer_of", {"a/model": characters}.get)
    monkeypatch.setattr("elpo_fast.report.tree_page.decoder_of", lambda tokenizer: tokenizer)
    arguments = ["tree", "html", str(tmp_path / "some.npz")]
    assert cli.main([*arguments, "--tokenizer", "a/model"]) == 0
    text = (tmp_path / "some.html").read_text()
    assert unpacked(element(text, "details"))[1]["prompt"][0]["content"].startswith("Add 7")
    assert cli.main(arguments) == 0
    assert unpacked(element((tmp_path / "some.html").read_text(), "details"))[1]["prompt"] == []


def test_chats_of_other_frameworks_are_drawn_as_trees(tmp_path, capsys):
    train_tokenizer(["Add 3 to 12 print(15)"] * 3).save_pretrained(tmp_path / "model")
    rows = [{"prompt": "Add 3 to 12", "completion": str(n), "reward": n / 15} for n in (15, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["tree", "html", str(tmp_path / "rows.jsonl")]
    assert cli.main([*arguments, "--tokenizer", str(tmp_path / "model")]) == 0
    assert "1 tree:" in capsys.readouterr().out
    _, texts = unpacked(element((tmp_path / "rows.html").read_text(), "details"))
    assert texts["prompt"][-1]["content"] == "Add 3 to 12"
    assert cli.main(arguments) == 2
    assert "--tokenizer MODEL says whose tokens" in capsys.readouterr().err


def test_what_is_not_finite_has_a_place(characters, tmp_path, monkeypatch):
    tree = Tree([1], info={"share": math.nan})
    node = tree.add_step(0, [65, 66], [1, 1], [math.nan, -0.5], [0, math.inf], tool_call=False)
    tree.finish(node, reward=0, correct=False, end="answer")
    run = tmp_path / "run"
    (run / "trees").mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    io.save(Forest.from_trees([tree]), run / "trees" / "step_000001.npz")
    monkeypatch.setattr("elpo_fast.report.tree_page.decoder", lambda _: characters)
    text = write_tree_page(run)[0].read_text()
    (rows,) = unpacked(element(text, "tokens"))
    assert rows[1] == [["A", "B"], [None, -0.5], [0.0, None], None]
    assert unpacked(element(text, "details"))[1]["info"] == '{"share": NaN}'


def test_ratios_are_computed_on_demand(characters, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    (run / "trees").mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    io.save(Forest.from_trees([searched()]), run / "trees" / "step_000001.npz")
    monkeypatch.setattr("elpo_fast.report.tree_page.decoder", lambda _: characters)
    ratios = lambda forest, scored: np.arange(len(forest.token_ids)) / 4  # noqa: E731
    monkeypatch.setattr("elpo_fast.report.ratios.ratios_of", lambda _: ratios)
    assert cli.main(["tree", "html", str(run), "--ratios"]) == 0
    (rows,) = unpacked(element((run / "trees.html").read_text(), "tokens"))
    assert [row[3] for row in rows[1:3]] == [[0.5], [1.0]]
    assert cli.main(["tree", "html", str(FIGURE4), "--ratios"]) == 2
    assert "is no run folder: ratios need a checkpoint" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path, grow, capsys):
    io.save(Forest.from_trees([grow(3).tree]), tmp_path / "some.npz")
    arguments = ["tree", "html", str(tmp_path / "some.npz"), "--tokenizer", str(tmp_path)]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert f"cannot load the tokenizer of {tmp_path}" in said and said.count("\n") == 1


def test_pieces_add_up_where_a_token_is_part_of_a_character():
    data = "né 日本!".encode()
    decode = lambda ids: bytes(ids.tolist()).decode(errors="replace")  # noqa: E731
    found = Pieces(decode)(np.array(list(data), np.int32))
    assert found == ["n", "", "é", " ", "", "", "日", "", "", "本", "!"]


def test_pieces_keep_blanks_that_a_first_token_loses():
    words = ["▁add", "▁seven", "s"]
    decode = lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")  # noqa: E731
    assert Pieces(decode)(np.array([0, 1, 2], np.int32)) == ["add", " seven", "s"]


@pytest.mark.parametrize(
    ("text", "words", "call", "malformed"),
    [
        ("so:<code>x = 1\nx</code><|im_end|>", "so:", "x = 1\nx", False),
        ("<code>x = 1", "", "x = 1", True),
        (
            'a <tool_call>{"name": "py", "arguments": {"code": "x"}}</tool_call>',
            "a ",
            "x",
            False,
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": 1, "b": "ü"}}</tool_call>',
            "",
            'f(a=1, b="ü")',
            False,
        ),
        ("<tool_call>{broken</tool_call>", "", "{broken", True),
        ('<tool_call>{"name": "f", "arguments": {}}', "", "f()", True),
    ],
    ids=["code", "open", "one argument", "two", "broken", "unclosed"],
)
def test_messages_are_read(text, words, call, malformed):
    said = read_message(text)
    assert (said.words, str(said.call), said.call.malformed) == (words, call, malformed)


def test_words_alone_have_no_call():
    assert read_message("nothing to run<|im_end|>") == ("nothing to run", None)


def test_prompt_and_response_are_read_from_templates():
    chatml = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ntwo\nlines<|im_end|>\n"
    assert read_prompt(chatml + "<|im_start|>assistant\n") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "two\nlines"},
    ]
    llama = "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    assert read_prompt(llama) == [{"role": "user", "content": "hello"}]
    assert read_response("<|im_end|>\n<|im_start|>tool\n1\n2<|im_end|>\n") == "1\n2"
