"""A tokenizer's chat template, as published, and how a conversation with tools goes into it.

Templates differ in what they take. Each is asked once, by rendering short conversations:

- *Own way.* It has a tool role, describes the tools, writes a call as `rollout.call_format` does,
  and renders what came before a message as it did without that message: then messages and tools
  are handed to it as they are.
- *Tags.* Else a tool's response is a user message in `<tool_response>` tags and the tools are
  described in the system message.
- Where it takes no system message, or moves it when messages are added, that one goes in front of
  the first user message.
- What it puts between its generation prompt and an assistant's text, such as a header of its own,
  is part of the opening of a turn; blanks and thinking are the model's to write.

`notes` says in words what was found. What renders earlier messages otherwise than it did, thinking
mostly, is said there too: a trajectory keeps its tokens as they were sampled.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elpo_fast.config import ConfigError
from elpo_fast.types import Message

_REMEDY = "set model.chat_template to the file or text of another, or to chatml"
_SYSTEM, _ASSISTANT, _RESPONSE = (f"\u2e22{said}\u2e22" for said in ("told", "said", "found"))
_CALL: dict[str, Any] = {"name": "probe_of_calls", "arguments": {"code": "1"}}
_ID = "call00001"  # of nine characters, as some templates want it
_THINKING = re.compile(r"(<think>.*?)?</think>", re.DOTALL)
_MARKS = re.compile(r"think|reason|analysis", re.IGNORECASE)


class Template:
    """The template of `tokenizer` for conversations with `tools`, which it describes unless they
    are none. `kwargs` are variables that it reads; `write_calls` is the text of an assistant
    message in OpenAI form, and `reads` whether a text is such a call.

    Raises `ConfigError` for a template that a conversation with tools does not fit into.
    """

    own_way: bool
    before: str  # from the end of an assistant's text that called a tool to the response
    after: str  # from there to the next assistant's text

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any],
        write_calls: Callable[[Message], str],
        reads: Callable[[str, Mapping[str, Any]], bool],
    ) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(f"the model's tokenizer has no chat template; {_REMEDY}")
        self._tokenizer, self._tools, self._kwargs = tokenizer, tools, kwargs
        self._write_calls = write_calls
        self._takes_system = True
        self._opening = self._blank = ""
        self.own_way = True
        if not self._own_way_fits(reads):
            self.own_way = False
            self._study()
        self.notes = self._notes()

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> Template:
        """The same for a conversation that has other tools."""
        other = copy.copy(self)
        other._tools = tools
        return other

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation so far and the opening of the assistant's turn."""
        return self._apply(self._with_system(self._roles(messages))) + self._opening

    def response(self, text: str) -> str:
        """What the template makes of a tool's response `text`, between `before` and `after`."""
        rendered = self._after_call(text)
        assert rendered.startswith(self.before) and rendered.endswith(self.after)
        return rendered[len(self.before) : len(rendered) - len(self.after)]

    def _roles(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in roles that the template has."""
        if self.own_way:
            return [dict(message) for message in messages]
        fitted: list[Message] = []
        earlier = None
        for message in messages:
            role, text = message["role"], message.get("content") or ""
            if role == "tool":
                text = f"<tool_response>\n{text}\n</tool_response>"
                if earlier == "tool":
                    text = f"{fitted.pop()['content']}\n{text}"
            elif role == "assistant":
                text = self._write_calls(message)
            fitted.append({"role": "user" if role == "tool" else role, "content": text})
            earlier = role
        return fitted

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """The system message where the template wants it, with the tools if it does not itself."""
        told = [message["content"] for message in messages[:1] if message["role"] == "system"]
        rest = messages[len(told) :]
        if self._tools and not self.own_way:
            told.append(description(self._tools, self._write_calls))
        if not told:
            return rest
        system = "\n\n".join(told)
        if self._takes_system or not rest or rest[0]["role"] != "user":
            return [{"role": "system", "content": system}, *rest]
        return [{**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]

    def _apply(self, messages: Sequence[Message]) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=(self._tools or None) if self.own_way else None,
                tokenize=False,
                add_generation_prompt=True,
                **self._kwargs,
            )
        except Exception as error:  # whatever a foreign template provokes, a person reads one line
            roles = ", ".join(message["role"] for message in messages)
            said = " ".join(str(error).split())
            raise ConfigError(
                f"the chat template refuses messages of {roles}: {said}; {_REMEDY}"
            ) from error

    def _after_call(self, response: str) -> str:
        """What follows an assistant's text that called a tool, up to the next one's."""
        rendered = self._apply(self._roles(_conversation(response)))
        return rendered.partition(_ASSISTANT)[2] + self._opening

    def _study(self) -> None:
        """Find the opening of a turn, the place of the system message, and what surrounds a
        response."""
        self._opening = ""
        prompt = self._apply(self._roles(_conversation()[:1]))
        head, said, _ = self._apply(self._roles(_conversation())).partition(_ASSISTANT)
        extra = head.removeprefix(prompt) if head.startswith(prompt) else ""
        self._blank = extra if not extra.strip() else ""
        self._opening = extra if extra.strip() and not _MARKS.search(extra) else ""
        self.before, shown, self.after = self._after_call(_RESPONSE).partition(_RESPONSE)
        if not (said and shown):
            lost = "a tool's response" if said else "an assistant's message"
            raise ConfigError(f"the chat template loses {lost}; {_REMEDY}")
        system: Message = {"role": "system", "content": _SYSTEM}
        try:
            text = self._apply([system, *self._roles(_conversation())])
            self._takes_system = _SYSTEM in text.partition(_ASSISTANT)[0]
        except ConfigError:
            self._takes_system = False

    def _own_way_fits(self, reads: Callable[[str, Mapping[str, Any]], bool]) -> bool:
        try:
            self._study()
            text = self._apply(_conversation())
            if self._tools and not all(tool["function"]["name"] in text for tool in self._tools):
                return False
            if self._tools and not self._calls_are_read(reads):
                return False
            sampled, rendered = self._two_ways()
        except ConfigError:
            return False
        return _said(sampled) == _said(rendered) and self._has_tool_role()

    def _has_tool_role(self) -> bool:
        """Whether the template does something for that role that it does not do for any other."""
        other = "another"
        *some, response = _conversation()
        try:
            text = self._apply([*some, {**response, "role": other}])
        except ConfigError:
            return True
        changed, known = (t.partition(_ASSISTANT)[2] for t in (text, self._apply(_conversation())))
        return changed != known.replace("tool", other)

    def _calls_are_read(self, reads: Callable[[str, Mapping[str, Any]], bool]) -> bool:
        """Whether calls, if the template writes any, are in the format that is read here."""
        user, _, response = _conversation()
        call = {"id": _ID, "type": "function", "function": _CALL}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        text = self._apply([user, called, {**response, "tool_call_id": _ID}])
        return _CALL["name"] not in text or reads(text, _CALL)

    def _two_ways(self) -> tuple[str, str]:
        """A conversation of two calls as a trajectory has it, and as the template renders it."""
        messages: list[Message] = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
        ]
        text = self.render(messages)
        for turn in "12":
            said = f"<think>\n{turn}\n</think>\n\nCall {turn}."
            text += self._blank + said + self.before + turn + self.after
            messages += [
                {"role": "assistant", "content": said},
                {"role": "tool", "content": turn, "tool_call_id": _ID, "name": "probe"},
            ]
        return text, self.render(messages)

    def _notes(self) -> list[str]:
        if self.own_way:
            notes = [
                "tool responses" + " and tools" * bool(self._tools) + " go into it its own way"
            ]
        else:
            notes = [
                "tool responses go into it as user messages in <tool_response> tags"
                + ", and tools are described in the system message" * bool(self._tools)
            ]
        if not self._takes_system:
            notes.append("a system message goes in front of the first user message")
        if self._opening:
            notes.append(f"assistant messages begin with {self._opening!r}")
        sampled, rendered = self._two_ways()
        if sampled != rendered:
            only_thinking = _said(sampled) == _said(rendered)
            what = "the thinking of earlier messages" if only_thinking else "earlier messages"
            notes.append(
                f"it leaves out or changes {what}, which trajectories keep as they were sampled; "
                "to serve the model as it was trained, set model.chat_template to one that keeps "
                "them"
            )
        return notes


_EXAMPLES = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}


def description(tools: Sequence[Mapping[str, Any]], write_calls: Callable[[Message], str]) -> str:
    """The tools in words for a system message, and how to call the first of them."""
    first = tools[0]["function"]
    schema = first.get("parameters", {})
    kinds = {name: each.get("type") for name, each in schema.get("properties", {}).items()}
    needed = schema.get("required", ())
    arguments = {name: _EXAMPLES.get(str(kinds.get(name)), "...") for name in needed}
    call = {"name": first["name"], "arguments": arguments}
    example = write_calls({"role": "assistant", "tool_calls": [{"function": call}]})
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You can call tools. Their JSON schemas, one a line:\n{schemas}\n"
        f"To call one, write for example: {example}\n"
        "Its result comes in <tool_response></tool_response>."
    )


def _said(text: str) -> str:
    """A rendered conversation without its thinking, and without blanks: these go with it."""
    return "".join(_THINKING.sub("", text).split())


def _conversation(response: str = _RESPONSE) -> list[Message]:
    return [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": _ASSISTANT},
        {"role": "tool", "content": response, "tool_call_id": _ID, "name": "probe"},
    ]
