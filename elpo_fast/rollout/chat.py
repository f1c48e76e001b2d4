"""Chat rendering: messages to token ids, once, and tool calls out of generated text.

Invariants
- A prefix is never retokenised: a trajectory is the rendered prompt, then alternately the tokens
  the engine returned and the *glue* rendered here (end of the assistant's turn, tool response,
  opening of the next turn). Glue is environment text and carries no loss.
- Glue bytes come from the model's own chat template (see `elpo_fast.rollout.template`), so that the
  assembled trajectory equals `apply_chat_template` of the same messages wherever the template
  renders earlier messages as it did before.
- Tool output cannot forge control tokens: where it contains the text of one, it is encoded as text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from elpo_fast.config import ConfigError
from elpo_fast.rollout.formats import make_format
from elpo_fast.rollout.template import Template
from elpo_fast.types import MalformedCall, Message, ToolCall, valid_text


class Chat:
    """Renders conversations for one tokenizer and one tool-call format, see `formats`.

    Tools are described to the model by their JSON schemas, or by the task's system message, as the
    format says. `end_token_ids` are the model's own ends of text: they end an assistant message as
    its end of turn does. `template_kwargs` are variables of the chat template, such as
    `enable_thinking`.

    Raises `ConfigError` for tools or a chat template that cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        call_format: str,
        tools: Sequence[Mapping[str, Any]],
        end_token_ids: Iterable[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tools = list(tools)
        self.call_format = call_format
        self._format = make_format(call_format, self.tools)
        self.template = Template(
            tokenizer,
            self.tools if self._format.described else None,
            template_kwargs or {},
            self.call_text,
            self._reads,
        )
        # Some tokenizers list only a few of their special tokens as such, but know all of them.
        special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        before = self.encode(self.template.before)
        at = next((i for i, token in enumerate(before) if int(token) in special), None)
        if at is None:
            raise ConfigError(
                "the chat template does not end an assistant message with a special token; "
                "set model.chat_template to the file or text of one that does, or to chatml"
            )
        self.end_of_turn = int(before[at])
        self._turn_end = before[: at + 1]
        ends = {self.end_of_turn, tokenizer.eos_token_id, *end_token_ids} - {None}
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(ends))  # end an assistant message
        self._special_texts = list(special.values())

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> Chat:
        """The same for a conversation in which these are described to the model."""
        other = copy.copy(self)
        other.tools = list(tools)
        if self._format.described:
            other.template = self.template.with_tools(other.tools)
        return other

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an assistant message: the end of a tool call."""
        return (self._format.closing,) if self._format.closing else ()

    def encode(self, text: str, *, as_text: bool = False) -> np.ndarray:
        """Token ids `int32 [N]` without added tokens; `as_text` reads special tokens as letters."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_text).input_ids
        return np.asarray(ids, dtype=np.int32)

    def decode(self, token_ids: np.ndarray | Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """The rendered conversation so far and the opening of the assistant's turn, `int32 [N]`."""
        return self.encode(self.template.render(messages))

    def shown(self, messages: Sequence[Message]) -> str:
        """What was found about the template, and a conversation that begins with `messages`, with
        one call of a tool in it, as the model sees it."""
        template = self.template
        seen = (
            template.render(messages),
            "[a message with a call]",
            template.before,
            "[the tool's response]",
            template.after,
        )
        return valid_text("\n".join([*template.notes, "", "".join(seen), ""]))

    def message_text(self, token_ids: np.ndarray) -> str:
        """Text of one generated assistant message, the token that ended it left out."""
        ended = len(token_ids) > 0 and int(token_ids[-1]) in self.stop_token_ids
        return self.decode(token_ids[:-1] if ended else token_ids)

    def response_glue(self, generated: np.ndarray, response: str) -> np.ndarray:
        """Tokens between one generated message that called a tool and the next one, `int32 [N]`:
        end of turn (unless generated), the tool's response, the opening of the next turn."""
        parts = (self.template.before, self.template.response(response), self.template.after)
        if any(special in response for special in self._special_texts):
            glue = np.concatenate(
                [self.encode(part, as_text=place == 1) for place, part in enumerate(parts)]
            )
        else:
            glue = self.encode("".join(parts))
        return glue[len(self._turn_end) :] if self._ended(generated) else glue

    def response_text(self, glue: np.ndarray) -> str:
        """The tool's response in what `response_glue` made of it."""
        before, text = self.template.before, self.decode(glue)
        end = self.decode(self._turn_end)  # which may have been generated
        text = text.removeprefix(end).removeprefix(before.removeprefix(end))
        return text.removesuffix(self.template.after)

    def call_text(self, message: Message) -> str:
        """Assistant text of a message in OpenAI form, its tool calls written in this format."""
        text = message.get("content") or ""
        for call in message.get("tool_calls") or ():
            function = call["function"]
            arguments = function["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            body = self._format.write(function["name"], arguments)
            text += f"{self._format.opening}{body}{self._format.closing}"
        return text

    def parse_call(self, text: str) -> ToolCall | MalformedCall | None:
        """The tool call in an assistant message, what is wrong with it, or `None` without one."""
        _, opened, rest = text.partition(self._format.opening)
        if not opened:
            return None
        closing = self._format.closing
        if closing not in rest:
            return MalformedCall(f"The tool call is not closed with {closing}.")
        return self._format.read(rest.partition(closing)[0] if closing else rest)

    def _ended(self, token_ids: np.ndarray) -> bool:
        return len(token_ids) > 0 and int(token_ids[-1]) == self.end_of_turn

    def _reads(self, text: str, call: Mapping[str, Any]) -> bool:
        """Whether `text` ends with `call` in this format."""
        start = text.rfind(self._format.opening, 0, text.rfind(call["name"]))
        try:
            return start >= 0 and self.parse_call(text[start:]) == ToolCall(**call)
        except Exception:  # of one's own format, on text that it is not made for
            return False
