"""The terminal view of a rollout tree: figures, marks, excerpts, cropping."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from elpo_fast.algo import score
from elpo_fast.config import AlgoConfig
from elpo_fast.report.tree_view import (
    LOCALIZED,
    NOT_LOCALIZED,
    abbreviate_message,
    abbreviate_response,
    render_tree,
)
from elpo_fast.tree.io import read
from elpo_fast.tree.store import Forest, Tree

FIGURE4 = Path(__file__).parent.parent / "data" / "figure4.json"


def draw(forest: Forest, tree: int = 0, decode=None, width: int = 160, **console) -> list[str]:
    out = io.StringIO()
    scored = score(forest, AlgoConfig())
    Console(file=out, width=width, **console).print(render_tree(forest, tree, scored, decode))
    return out.getvalue().splitlines()


def codes(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], np.int32)


def decode(ids: np.ndarray) -> str:
    return "".join(map(chr, ids))


def add(tree: Tree, parent: int, said: str, heard: str = "") -> int:
    """One step whose tokens are characters."""
    ids = codes(said + heard)
    agent = np.arange(len(ids)) < len(said)
    nothing = np.zeros(len(ids))
    return tree.add_step(parent, ids, agent, nothing, nothing, tool_call=bool(heard))


def glue(response: str) -> str:
    return f"<|im_end|>\n<|im_start|>tool\n{response}<|im_end|>\n<|im_start|>assistant\n"


def small_tree(localized: bool = True) -> Tree:
    tree = Tree(codes("<|im_start|>user\nadd 7\ndouble it<|im_end|>\n<|im_start|>assistant\n"))
    right = add(tree, 0, "<code>x+=7;x</code>", glue("22"))
    wrong = add(tree, 0, "<code>x+=8;x</code>", glue("23"))
    last = [
        add(tree, node, "<code>x*=2;x</code>", glue(value))
        for node, value in ((right, "44"), (wrong, "46"))
    ]
    good = add(tree, last[0], "<answer>44</answer><|im_end|>")
    bad = add(tree, last[1], "<answer>46</answer><|im_end|>")
    tree.finish(bad, reward=-1, correct=False, end="answer", reason="answered 46, expected 44")
    tree.finish(good, reward=1, correct=True, end="answer")
    tree.mark_critical(wrong, 0, localized)
    return tree


def test_figure4_has_a_line_a_node_with_the_printed_values():
    lines = draw(read(FIGURE4))
    forest = read(FIGURE4)
    assert len(lines) == len(forest.nodes(0))
    assert lines[0] == "task · 2/16 correct · node reward r -0.94 · advantage A +0.00"
    marked = [line for line in lines if "◀" in line]
    assert marked == [
        f"├── step 1 {LOCALIZED} · 0/3 · r -1.10 · A -0.37",
        f"│   └── step 2 {LOCALIZED} · 0/4 · r -1.10 · A -0.90",
    ]
    assert sum("✓ #" in line for line in lines) == 2
    assert sum("✗ #" in line for line in lines) == 14
    assert "│   ├── step 2 · 1/1 · r 1.00 · A +1.68 · ✓ #8 answer" in lines


def test_steps_show_what_was_said_and_heard():
    lines = draw(Forest.from_trees([small_tree()]), decode=decode)
    assert lines == [
        "task · 1/2 correct · node reward r 0.00 · advantage A +0.00 · "
        "user add 7 double it assistant",
        "├── step 1 · 1/1 · r 1.00 · A +1.00 · x+=7;x → 22",
        "│   └── step 2 · 1/1 · r 1.00 · A +1.00 · x*=2;x → 44",
        "│       └── step 3 · 1/1 · r 1.00 · A +1.00 · ✓ #1 answer · <answer>44</answer>",
        f"└── step 1 {LOCALIZED} · 0/1 · r -1.00 · A -1.00 · x+=8;x → 23",
        "    └── step 2 · 0/1 · r -1.00 · A -1.00 · x*=2;x → 46",
        "        └── step 3 · 0/1 · r -1.00 · A -1.00 · ✗ #0 answered 46, expected 44 · "
        "<answer>46</answer>",
    ]


def test_later_trees_number_their_own_leaves_and_steps():
    lines = draw(Forest.from_trees([small_tree(), small_tree(localized=False)]), tree=1)
    assert [line for line in lines if "✗" in line] == [
        "        └── step 3 · 0/1 · r -1.00 · A -1.00 · ✗ #0 answered 46, expected 44"
    ]
    assert lines[4] == f"└── step 1 {NOT_LOCALIZED} · 0/1 · r -1.00 · A -1.00"


def test_a_step_localized_by_any_search_is_localized():
    tree = small_tree(localized=False)
    tree.mark_critical(2, 0, True)
    tree.mark_critical(2, 0, False)
    text = "\n".join(draw(Forest.from_trees([tree])))
    assert LOCALIZED in text and NOT_LOCALIZED not in text


@pytest.mark.parametrize("width", [40, 60, 80])
def test_lines_are_cropped_to_the_terminal_and_never_wrapped(width):
    forest = Forest.from_trees([small_tree()])
    lines = draw(forest, decode=decode, width=width)
    assert len(lines) == len(forest.nodes(0))
    assert max(map(len, lines)) == width
    assert all(line.endswith("…") for line in lines if len(line) == width)
    assert sum("◀" in line for line in lines) == 1


def test_colour_adds_nothing_but_escapes():
    forest = Forest.from_trees([small_tree()])
    plain = draw(forest, decode=decode)
    coloured = draw(forest, decode=decode, force_terminal=True, color_system="truecolor")
    assert any("\x1b[1;31m" in line and "◀" in line for line in coloured)
    assert not any("\x1b" in line for line in plain)
    from rich.text import Text

    assert [Text.from_ansi(line).plain for line in coloured] == plain


def test_output_cannot_steer_the_terminal_or_the_markup():
    tree = Tree(codes("x"))
    node = add(tree, 0, "\x1b[2J\x07 [bold]\u202eevil", glue("\x1b]0;title\x07"))
    tree.finish(node, reward=0, correct=False, end="answer", reason="\x1b[31mred")
    text = "\n".join(draw(Forest.from_trees([tree]), decode=decode))
    assert not set("\x1b\x07\u202e") & set(text)
    assert "[bold]" in text


def test_steps_without_tokens_have_a_line():
    tree = Tree([])
    tree.finish(add(tree, 0, ""), reward=1, correct=True, end="answer")
    assert draw(Forest.from_trees([tree]), decode=decode)[1] == (
        "└── step 1 · 1/1 · r 1.00 · A +0.00 · ✓ #0 answer"
    )


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("<code>x+=7;x</code>", "x+=7;x"),
        ("First.\n<code>a = 1\na</code><|im_end|>", "First. a = 1 a"),
        (
            '<tool_call>{"name": "python", "arguments": {"code": "x+=7;x"}}</tool_call>',
            "python(x+=7;x)",
        ),
        ('<tool_call>{"name": "f", "arguments": {"a": 1, "b": "z"}}', "f(1, z)"),
        ("<tool_call>{broken</tool_call>", "{broken"),
        ("<tool_call>[1]</tool_call>", "[1]"),
        ("", ""),
        ("w" * 100 + "<code>" + "c" * 100 + "</code>", "w" * 59 + "… " + "c" * 59 + "…"),
    ],
    ids=["code", "words", "hermes", "two arguments", "broken", "no object", "empty", "long"],
)
def test_abbreviate_message_keeps_words_and_call(text, short):
    assert abbreviate_message(text) == short


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (glue("22"), "22"),
        ("<|im_start|>user\n<tool_response>\n22\n</tool_response><|im_end|>", "22"),
        ("<|eot_id|><|start_header_id|>tool<|end_header_id|>\n\n22<|eot_id|>", "22"),
        (glue("Traceback\n  user error"), "Traceback user error"),
        (glue(""), ""),
        ("", ""),
        (glue("9" * 99), "9" * 39 + "…"),
    ],
    ids=["chatml", "tagged", "llama", "two lines", "no output", "empty", "long"],
)
def test_abbreviate_response_keeps_the_response(text, short):
    assert abbreviate_response(text) == short
