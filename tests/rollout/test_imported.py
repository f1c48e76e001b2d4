"""Trajectories that others wrote down, as trees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elpo_fast.config import ConfigError
from elpo_fast.model.tokenizer import train_tokenizer
from elpo_fast.rollout.chat import Chat
from elpo_fast.rollout.imported import read_trees
from elpo_fast.tree.store import Tree

TOOL = {
    "type": "function",
    "function": {"name": "do", "parameters": {"properties": {"code": {"type": "string"}}}},
}
ASK = [{"role": "system", "content": "Go."}, {"role": "user", "content": "Add 3 to 12."}]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(["Add 3 to 12 print(15)\n"] * 3), "hermes", [TOOL])


def call(code: str) -> dict[str, Any]:
    function = {"name": "do", "arguments": json.dumps({"code": code})}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


ROWS: list[dict[str, Any]] = [
    {"task": "a", "messages": [*ASK, call("12+3"), tool("15"), says("15")], "reward": 1.0},
    {"task": "a", "messages": [*ASK, call("12+3"), tool("15"), says("16")], "reward": -1},
    {"messages": [*ASK, call("12-3"), tool("9"), says("9")], "reward": 0.2, "correct": False},
    {"prompt": "Hello", "completion": "Yes.", "reward": 0.7, "end": "length", "reason": "ok"},
    {"example_id": 7, "prompt": ASK[1:], "completion": [says("15")], "reward": 0},
]


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(tree: Tree, node: int, chat: Chat) -> tuple[str, str]:
    """What the agent wrote in a step, and what followed."""
    tokens, agent = tree.token_ids[node], tree.agent[node].astype(bool)
    return chat.message_text(tokens[agent]), chat.response_text(tokens[~agent])


def test_rows_become_trees_by_prompt_with_equal_steps_as_one(chat: Chat, tmp_path: Path) -> None:
    first, second, third = read_trees(written(tmp_path, ROWS), chat)
    assert [tree.task_id for tree in (first, second, third)] == ["a", "line 4", "7"]
    np.testing.assert_array_equal(first.token_ids[0], chat.prompt(ASK))
    assert first.parent == [-1, 0, 1, 1, 0, 4]
    assert said(first, 1, chat)[1] == "15" and chat.parse_call(said(first, 1, chat)[0])
    assert [said(first, node, chat)[0] for node in (2, 3, 5)] == ["15", "16", "9"]
    assert first.tool_call == [False, True, False, False, True, False]
    assert [first.reward[leaf] for leaf in first.leaves] == [1.0, -1.0, 0.2]
    assert [first.correct[leaf] for leaf in first.leaves] == [1, 0, 0]
    assert second.correct[second.leaves[0]] == 1
    assert (second.ends, second.reasons) == (["length"], ["ok"])
    assert third.parent == [-1, 0]


def test_a_path_is_what_the_template_makes_of_the_messages(chat: Chat, tmp_path: Path) -> None:
    tree = read_trees(written(tmp_path, ROWS[:1]), chat)[0]
    messages = [{**m, "content": chat.call_text(m)} for m in ROWS[0]["messages"]]
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    rendered = chat.tokenizer.apply_chat_template(plain, tools=[TOOL], tokenize=False)
    assert chat.decode(tree.path_tokens(tree.leaves[0])) == rendered.removesuffix("\n")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": [*ASK, says("x")]}, "its reward must be a number, not None"),
        ({"messages": [*ASK, says("x")], "reward": True}, "must be a number, not True"),
        ({"messages": [*ASK, says("x")], "reward": float("nan")}, "must be a number, not nan"),
        ({"messages": [*ASK, says("x"), *ASK, says("y")], "reward": 1}, "more than once"),
        ({"prompt": 3, "completion": "x", "reward": 1}, "prompt must be text or a list"),
        ({"reward": 1}, "has none of the columns messages"),
    ],
)
def test_faults_are_said_with_their_place(
    row: dict[str, Any], fault: str, chat: Chat, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="1 of 2 rows cannot be used") as caught:
        read_trees(written(tmp_path, [ROWS[0], row]), chat)
    assert "line 2" in str(caught.value) and fault in str(caught.value)


def test_an_empty_file_is_refused(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no rows"):
        read_trees(written(tmp_path, []), chat)
