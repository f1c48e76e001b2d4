"""Conversations in the forms in which they are published: one meaning, and all faults at once."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from elpo_fast.config import ConfigError
from elpo_fast.tasks.conversations import Conversation, read_conversations

CODE = "print(6 * 7)"
SCHEMA = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "description": "Runs Python.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
    },
}


def call(arguments: Any, name: str = "code_interpreter", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is 6 times 7?"}]},
        {
            "role": "assistant",
            "content": "I calculate.",
            "reasoning_content": "Easy.",
            "tool_calls": [call(json.dumps({"code": CODE}), id="a")],
        },
        {"role": "tool", "tool_call_id": "a", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ],
    "tools": [SCHEMA],
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "What is 6 times 7?"},
        {"from": "gpt", "value": "<think>\nEasy.\n</think>\n\nI calculate."},
        {
            "from": "function_call",
            "value": json.dumps({"name": "code_interpreter", "arguments": {"code": CODE}}),
        },
        {"from": "observation", "value": "<tool_response>\n42\n</tool_response>"},
        {"from": "gpt", "value": "It is 42."},
    ],
    "system": "Be brief.",
    "tools": json.dumps([SCHEMA["function"]]),
}
AGENTRL = {  # Open-AgentRL's: arguments are objects, and Parquet gives every message every field
    "messages": [
        {"role": "system", "content": "Be brief.", "tool_calls": None},
        {"role": "user", "content": "What is 6 times 7?", "tool_calls": None},
        {
            "role": "assistant",
            "content": "<think>\nEasy.\n</think>\n\nI calculate.",
            "tool_calls": [call({"code": CODE, "timeout": None})],
        },
        {"role": "tool", "content": "42", "tool_calls": None},
        {"role": "assistant", "content": "It is 42.", "tool_calls": None},
    ],
    "tools": [SCHEMA],
}


def read(folder: Path, rows: list[Any], name: str = "chats.jsonl") -> list[Conversation]:
    path = folder / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return read_conversations(str(path))


@pytest.mark.parametrize(
    "row, name",
    [
        (OPENAI, "chats.jsonl"),
        (SHAREGPT, "chats.jsonl.gz"),
        (AGENTRL, "chats.parquet"),
        (AGENTRL, "chats.json"),
    ],
    ids=["OpenAI", "ShareGPT", "Open-AgentRL, Parquet", "Open-AgentRL, JSON"],
)
def test_all_forms_mean_the_same(row: Any, name: str, tmp_path: Path) -> None:
    (found,) = read(tmp_path, [row], name)
    system, user, calls, result, answer = found.messages
    assert (system["role"], system["content"]) == ("system", "Be brief.")
    assert (user["role"], user["content"]) == ("user", "What is 6 times 7?")
    assert calls["content"] == "<think>\nEasy.\n</think>\n\nI calculate."
    (made,) = calls["tool_calls"]
    assert made["function"] == {"name": "code_interpreter", "arguments": {"code": CODE}}
    assert (result["role"], result["content"]) == ("tool", "42")
    assert answer == {"role": "assistant", "content": "It is 42."}
    assert found.tools == (SCHEMA,)
    assert str(tmp_path / name) in found.place and found.place.endswith(("line 1", "row 0"))


def test_calls_at_once_become_one_after_another_by_their_ids(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Both?"},
        {"role": "assistant", "content": "Yes.", "tool_calls": [call({}, "f", id="1"),
                                                                call({}, "g", id="2")]},
        {"role": "tool", "tool_call_id": "2", "content": "of g"},
        {"role": "tool", "tool_call_id": "1", "content": "of f"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks."},
    ]  # fmt: skip
    (found,) = read(tmp_path, [{"messages": messages}])
    said = [(m["role"], m["content"], [c["function"]["name"] for c in m.get("tool_calls", ())])
            for m in found.messages]  # fmt: skip
    assert said == [
        ("user", "Both?", []),
        ("assistant", "Yes.", ["f"]),
        ("tool", "of f", []),
        ("assistant", "", ["g"]),
        ("tool", "of g", []),
        ("assistant", "Done.", []),  # what the user says last has no answer to learn
    ]
    assert found.tools is None


def test_equal_prompts_under_other_system_messages_have_one_hash(tmp_path: Path) -> None:
    def row(*said: tuple[str, str]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    one, two, three = read(
        tmp_path,
        [
            row(("user", "a  b"), ("assistant", "c")),
            row(("system", "s"), ("user", "a b\n"), ("assistant", "d"), ("user", "e"),
                ("assistant", "f")),
            row(("user", "a"), ("assistant", "c")),
        ],
    )  # fmt: skip
    assert one.prompt == two.prompt != three.prompt


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, *messages], **columns}


FAULTS = {
    "has none of the columns messages, conversations; it has text": {"text": "Hi"},
    "message 2: its role is 'bot'; use system, user": chat({"role": "bot", "content": "Hi"}),
    "has no message of the assistant": chat(),
    "begins with the assistant": {"messages": [{"role": "assistant", "content": "Hi"}]},
    "message 2: has a part of type image_url": chat(
        {"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}
    ),
    "message 2: the arguments of a call must be JSON": chat(
        {"role": "assistant", "tool_calls": [call("{")]}
    ),
    "message 2: tool_calls must be a list, not int": chat({"role": "assistant", "tool_calls": 3}),
    "must be an object, not list": chat({"role": "assistant", "tool_calls": [call("[1]")]}),
    "2 calls have 1 results": chat(
        {"role": "assistant", "tool_calls": [call({}), call({})]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "Hi"},
    ),
    "1 calls have 0 results": chat(
        {"role": "assistant", "tool_calls": [call({})]},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "Hi"},
    ),
    "a tool's result stands where nothing": chat(
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "Hi"}
    ),
    "message 2: is the assistant's and has neither": chat({"role": "assistant", "content": " "}),
    "tools must be OpenAI function schemas": chat(
        {"role": "assistant", "content": "Hi"}, tools=[{"type": "function"}]
    ),
    "messages must be a list of messages, not an empty list": {"messages": []},
    "with a weight but 0": chat({"role": "assistant", "content": "Hi", "weight": 0}),
    "must be an object, not int": 3,
}


@pytest.mark.parametrize("said", FAULTS, ids=list(FAULTS))
def test_faults(said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, [FAULTS[said]])
    assert said in str(caught.value)


def test_all_faults_of_a_file_are_one_message(tmp_path: Path) -> None:
    good = chat({"role": "assistant", "content": "Hi"})
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, [3, good, *FAULTS.values()])
    first, *lines, expected = str(caught.value).splitlines()
    assert first.endswith(f"{len(FAULTS) + 1} of {len(FAULTS) + 2} rows cannot be used:")
    assert len(lines) == 11 and lines[-1].endswith(f"and {len(FAULTS) - 10} other faults")
    assert lines[0] == "  line 1 and 1 more: must be an object, not int"
    assert lines[2] == (
        "  line 4 message 2: its role is 'bot'; use system, user, assistant or tool "
        "(ShareGPT: human, gpt, function_call, observation)"
    )
    assert expected.startswith('expected rows such as {"messages": [{"role": "user"')


def test_files_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data file .*absent.jsonl does not exist$"):
        read_conversations(str(tmp_path / "absent.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match="has no rows"):
        read_conversations(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ConfigError, match=r"sft\.split=train is for folders"):
        read_conversations(str(tmp_path / "empty.jsonl"), "train")
