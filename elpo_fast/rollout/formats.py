"""How a message calls a tool: what stands around a call, and what it looks like inside."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from elpo_fast import own
from elpo_fast.config import ConfigError
from elpo_fast.types import MalformedCall, ToolCall


class CallFormat(Protocol):
    """A format of tool calls. A subclass has to have `opening`, `closing` and the methods."""

    opening: str  # what a call begins with
    closing: str  # what it ends with, and sampling stops at; "": the end of the message
    # whether the chat template is given the tools, to describe them; else `task.system` has to
    described: bool = False

    @abstractmethod
    def read(self, body: str) -> ToolCall | MalformedCall:
        """The call that stands between `opening` and `closing`."""
        ...

    @abstractmethod
    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """What `read` reads as this call."""
        ...


class Hermes(CallFormat):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`"""

    opening, closing, described = "<tool_call>", "</tool_call>", True

    def read(self, body: str) -> ToolCall | MalformedCall:
        try:
            call = json.loads(body)
        except (ValueError, RecursionError) as error:  # a number, or a nesting, beyond Python's
            return MalformedCall(f"The tool call is not valid JSON: {error}.")
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return MalformedCall('The tool call must be a JSON object with a string "name".')
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return MalformedCall('"arguments" of the tool call must be a JSON object.')
        return ToolCall(call["name"], arguments)

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


class Code(CallFormat):
    """`<code>...</code>`, for the one tool whose only required argument is `code`."""

    opening, closing = "<code>", "</code>"

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        names = [tool["function"]["name"] for tool in tools]
        if len(names) != 1:
            raise ConfigError(
                f"rollout.call_format code needs exactly one tool, got {names}; use hermes for more"
            )
        (self._name,) = names

    def read(self, body: str) -> ToolCall:
        return ToolCall(self._name, {"code": body})

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        return str(arguments["code"])


def make_format(name: str, tools: Sequence[Mapping[str, Any]]) -> CallFormat:
    """The format called `name`, or one's own, for these tools. Raises `ConfigError`."""
    match name:
        case "hermes":
            return Hermes()
        case "code":
            return Code(tools)
    kind = own.find("call_formats", name, "rollout.call_format")
    found = own.bound(kind, ("tools",), {}, "rollout.call_format")(tools=tools)
    own.complete(found, CallFormat, f"rollout.call_format: {name}")
    if not found.opening:
        raise ConfigError(f"rollout.call_format: {name} has no opening; say what calls begin with")
    return found
