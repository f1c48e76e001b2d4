"""What people read of a step's text: words, tool call and response without the template's tokens.

Templates differ, and a tree may come without the configuration that made it; so this goes by the
tags of the built-in call formats and by what control tokens look like. A call in a format of one's
own stays among the words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from elpo_fast.rollout.formats import Code, Hermes
from elpo_fast.tree.store import Forest
from elpo_fast.types import Message, ToolCall

Decode = Callable[[np.ndarray], str]
"""Token ids `[N]` to text."""

CONTROL_TOKEN = re.compile(r"<\|[^|<>]*\|>")
_ROLE = re.compile(r"\s*(system|user|assistant|tool|ipython)\s*(?:\n|$)")
_OPENING = re.compile(f"({Hermes.opening}|{Code.opening}|$)")
_CLOSING = re.compile(f"{Hermes.closing}|{Code.closing}")


class Call(NamedTuple):
    """A tool call; `arguments` are `None` where it cannot be read, and `text` is what it says."""

    name: str  # "" where the format names none
    arguments: Mapping[str, Any] | None
    text: str
    malformed: bool

    def __str__(self) -> str:
        """The code of a tool that takes nothing else; else the name and the arguments."""
        if self.arguments is None:
            return self.text
        if len(self.arguments) == 1:
            (value,) = self.arguments.values()
            if isinstance(value, str):
                return value
        given = (
            f"{name}={json.dumps(v, ensure_ascii=False)}" for name, v in self.arguments.items()
        )
        return f"{self.name}({', '.join(given)})"


class Said(NamedTuple):
    """An assistant's message."""

    words: str
    call: Call | None


def node_text(forest: Forest, node: int, decode: Decode | None, *, agent: bool) -> str:
    """What the agent, or its environment, wrote in a node; "" where nobody can read it."""
    if decode is None:
        return ""
    span = slice(*forest.token_start[node : node + 2])
    return decode(forest.token_ids[span][forest.agent[span] == agent])


def read_message(text: str) -> Said:
    """An assistant's message, its call in `<tool_call>` or `<code>` tags if it has one."""
    words, tag, rest = _OPENING.split(CONTROL_TOKEN.sub("", text), maxsplit=1)
    if not tag:
        return Said(words, None)
    body, *after = _CLOSING.split(rest, maxsplit=1)
    call = Hermes().read(body) if tag == Hermes.opening else ToolCall("", {"code": body})
    if isinstance(call, ToolCall):
        read = Call(call.name, call.arguments, body, malformed=not after)
    else:
        read = Call("", None, body, malformed=True)
    return Said(words + "".join(after), read)


def read_response(text: str) -> str:
    """A tool's response in what the chat template made of it."""
    if tagged := re.search(r"<tool_response>(.*?)</tool_response>", text, re.DOTALL):
        return tagged[1].strip("\n")
    pieces = (_ROLE.sub("", piece, count=1) for piece in CONTROL_TOKEN.split(text))
    return next((piece.strip("\n") for piece in pieces if piece.strip()), "")


def read_prompt(text: str) -> list[Message]:
    """The messages of a rendered prompt; what stands before the first role is the user's."""
    messages: list[Message] = []
    role = "user"
    for piece in CONTROL_TOKEN.split(text):
        if found := _ROLE.match(piece):
            role, piece = found[1], piece[found.end() :]
        if piece.strip():
            messages.append({"role": role, "content": piece.strip("\n")})
    return messages
