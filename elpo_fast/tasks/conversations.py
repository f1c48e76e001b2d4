"""Conversations to learn from, in the forms in which they are published (see `docs/sft.md`).

Columns `messages` (OpenAI: `role`, `content`, `tool_calls`; so is Open-AgentRL's) or
`conversations` (ShareGPT: `from`, `value`), optionally `tools` and `system`.

Invariants
- A message makes one call at most, as in rollouts: several calls at once with their results become
  one after another. Calls without any result end the conversation.
- Fields of calls and tools that are null are left out: Parquet has every row's fields in each row.
- A row that cannot be used is refused, all of them in one message, with the places they stand at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elpo_fast.config import ConfigError
from elpo_fast.tasks.common import asked
from elpo_fast.tasks.records import Faults, Record, kind, read
from elpo_fast.types import Message, valid_text

COLUMNS = ("messages", "conversations")
_CALLS = "calls"  # a message of the assistant that is calls and nothing else
_SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), _CALLS),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
}
_THINKING = ("reasoning_content", "reasoning", "thinking")
_WRAPPED = re.compile(
    r"\s*<tool_response>\s*((?:(?!<tool_response>).)*?)\s*</tool_response>\s*", re.S
)
_EXPECTED = (
    'expected rows such as {"messages": [{"role": "user", "content": "What is 6 times 7?"}, '
    '{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": '
    '"code_interpreter", "arguments": {"code": "6 * 7"}}}]}, {"role": "tool", "content": "42"}, '
    '{"role": "assistant", "content": "It is 42."}]}, or {"conversations": [{"from": "human", '
    '"value": "What is 6 times 7?"}, {"from": "gpt", "value": "It is 42."}]}'
)


class ConversationError(ValueError):
    """Why a conversation cannot be used; `message` says in which of its messages, from 1."""

    def __init__(self, problem: str, message: int | None = None) -> None:
        super().__init__(problem)
        self.where = "" if message is None else f" message {message}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in OpenAI form: `content` is text, thinking included, an assistant's message has
    one of `tool_calls` at most, unless it is the last one, and the last one is the assistant's.
    An assistant's message of `weight` 0 is not learned."""

    place: str  # "FILE line N" or "FILE row N", for people
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None  # OpenAI schemas; None: the row does not say

    @property
    def prompt(self) -> str:
        """Hash of what is said first, as `asked`."""
        roles = [message["role"] for message in self.messages]
        return asked(self.messages[: roles.index("assistant")])

    @property
    def calls(self) -> list[Mapping[str, Any]]:
        """Name and arguments of all tool calls."""
        return [call["function"] for m in self.messages for call in m.get("tool_calls", ())]


def read_conversations(path: str, split: str | None = None) -> list[Conversation]:
    """All conversations of a file, a folder or `hf:org/name` (see `elpo_fast.tasks.records`).

    Raises `ConfigError` with all that is wrong with them.
    """
    faults = Faults(path)
    found: list[Conversation] = []
    for place, record in read(path, split, faults, section="sft"):
        try:
            found.append(read_conversation(record, f"{path} {place}"))
        except ConversationError as error:
            faults.add(f"{place}{error.where}", str(error))
    check(faults, len(found))
    if not found:
        raise ConfigError(f"{path} has no rows")
    return found


def check(faults: Faults, good: int) -> None:
    """`ConfigError` for the faults found beside so many `good` conversations, if there are any."""
    faults.check(good + len(faults), _EXPECTED)


def read_conversation(record: Record, place: str) -> Conversation:
    """Raises `ConversationError`."""
    column = next((name for name in COLUMNS if record.get(name) is not None), None)
    if column is None:
        has = ", ".join(record) or "nothing"
        raise ConversationError(f"has none of the columns {', '.join(COLUMNS)}; it has {has}")
    rows = _parsed(record[column], column)
    if not isinstance(rows, Sequence) or not rows:
        raise ConversationError(f"{column} must be a list of messages, not {kind(rows)}")
    messages = _messages(rows)
    system = record.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ConversationError("has no message of the assistant")
    if all(m.get("weight") == 0 for m in messages if m["role"] == "assistant"):
        raise ConversationError("has no message of the assistant with a weight but 0")
    if messages[0]["role"] == "assistant":
        raise ConversationError("begins with the assistant, which has nothing to answer")
    return Conversation(place, tuple(_one_call_each(messages)), _tools(record.get("tools")))


def _messages(rows: Sequence[Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        try:
            message = _message(row)
        except ConversationError as error:
            raise ConversationError(str(error), number) from None
        if message["role"] != _CALLS:
            messages.append(message)
        elif messages and messages[-1]["role"] == "assistant":  # of what was said just now
            calls = [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]
            messages[-1]["tool_calls"] = calls
        else:
            messages.append(message | {"role": "assistant"})
    return messages


def _message(row: Any) -> dict[str, Any]:
    """One message in OpenAI form, of role `_CALLS` where it is calls alone."""
    if not isinstance(row, Mapping):
        raise ConversationError(f"must be an object, not {kind(row)}")
    speaker = row.get("role") or row.get("from")
    role = _SPEAKERS.get(str(speaker).lower())
    if role is None:
        raise ConversationError(
            f"its role is {speaker!r}; use system, user, assistant or tool (ShareGPT: human, gpt, "
            "function_call, observation)"
        )
    content = row.get("content", row.get("value"))
    if role == _CALLS:
        calls = _parsed(content, "the call")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": role, "content": "", "tool_calls": [_call(call) for call in calls]}
    text = _text(content)
    if role == "tool":
        wrapped = _WRAPPED.fullmatch(text)  # the template wraps it again
        message = {"role": role, "content": wrapped[1] if wrapped else text}
        return message | {"tool_call_id": row.get("tool_call_id")}
    if role != "assistant":
        return {"role": role, "content": text}
    thinking = next((row[name] for name in _THINKING if row.get(name)), None)
    if thinking is not None:
        text = f"<think>\n{_text(thinking).strip()}\n</think>\n\n{text}"
    called = _parsed(row.get("tool_calls"), "tool_calls") or []
    if not isinstance(called, list):
        raise ConversationError(f"tool_calls must be a list, not {kind(called)}")
    if row.get("function_call"):
        called = [*called, row["function_call"]]
    message = {"role": role, "content": text}
    if called:
        message["tool_calls"] = [_call(call) for call in called]
    elif not text.strip():
        raise ConversationError("is the assistant's and has neither text nor a call")
    if row.get("weight") == 0:
        message["weight"] = 0
    return message


def _text(content: Any) -> str:
    """Text of a message: as it is, of its parts, or of an object that a tool returned."""
    if content is None:
        return ""
    if isinstance(content, str):
        return valid_text(content)
    if isinstance(content, list) and all(isinstance(p, Mapping) and "type" in p for p in content):
        others = sorted({str(part["type"]) for part in content} - {"text"})
        if others:
            raise ConversationError(f"has a part of type {', '.join(others)}; only text is read")
        return valid_text("".join(str(part.get("text") or "") for part in content))
    return json.dumps(content, ensure_ascii=False)


def _call(call: Any) -> dict[str, Any]:
    """A call in OpenAI form, its arguments an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConversationError('a call must be an object with "name" and "arguments"')
    arguments = _parsed(function.get("arguments"), "the arguments of a call")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ConversationError(
            f"the arguments of the call of {function['name']} must be an object, "
            f"not {kind(arguments)}"
        )
    named = {"name": function["name"], "arguments": _without_nulls(arguments or {})}
    return {"type": "function", "id": call.get("id"), "function": named}


def _one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several calls of one message with their results as one after another."""
    single: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        if message["role"] == "tool":
            raise ConversationError("a tool's result stands where nothing can have called it")
        results = []
        while message["role"] == "assistant" and at < len(messages):
            if messages[at]["role"] != "tool":
                break
            results.append(messages[at])
            at += 1
        calls = message.get("tool_calls", ())
        fits = len(results) == len(calls)
        if not calls:
            fits = len(results) < 2  # of a call that is written in the text
        elif at == len(messages):
            fits = fits or not results
        if not fits:
            raise ConversationError(f"{len(calls)} calls have {len(results)} results")
        if len(calls) < 2 or not results:
            single += [message, *results]
            continue
        by_id = {result["tool_call_id"]: result for result in results}
        if all(call["id"] in by_id for call in calls) and len(by_id) == len(calls):
            results = [by_id[call["id"]] for call in calls]
        for call, result in zip(calls, results, strict=True):
            single += [message | {"tool_calls": [call]}, result]
            message = message | {"content": ""}
    return single


def _tools(value: Any) -> tuple[Mapping[str, Any], ...] | None:
    tools = _parsed(value, "tools") if value != "" else None
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise ConversationError(f"tools must be a list of schemas, not {kind(tools)}")
    found = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ConversationError("tools must be OpenAI function schemas, each with a name")
        found.append({"type": "function", "function": _without_nulls(function)})
    return tuple(found)


def _parsed(value: Any, what: str) -> Any:
    """A value that may be written as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ConversationError(f"{what} must be JSON") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
