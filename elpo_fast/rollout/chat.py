"""Chat rendering: messages to token ids, once, and tool calls out of generated text.

Invariants
- A prefix is never retokenised: a trajectory is the rendered prompt, then alternately the tokens
  the engine returned and the *glue* rendered here (end of the assistant's turn, tool response,
  opening of the next turn). Glue is environment text and carries no loss.
- Glue bytes come from the model's own chat template, found once by rendering two sentinels, so that
  the assembled trajectory equals `apply_chat_template` of the same messages. Templates that do not
  render tool messages are replaced by `TOOL_TEMPLATE` (plain ChatML).
- Tool output cannot forge control tokens: where it contains the text of one, it is encoded as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from elpo_fast.config import ConfigError
from elpo_fast.rollout.formats import make_format
from elpo_fast.types import MalformedCall, Message, ToolCall

TOOL_TEMPLATE = (
    "{%- if tools and messages[0]['role'] != 'system' %}"
    "{%- set messages = [{'role': 'system', 'content': 'You can call tools.'}] + messages %}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{%- if tools and loop.first %}"
    "{{- '\n\nTools, one JSON schema a line:' }}"
    "{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}"
    '{{- \'\nTo call one, write: <tool_call>{"name": ..., "arguments": {...}}</tool_call>\' }}'
    "{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""ChatML with a tool role, for models whose own template has none."""

_ASSISTANT, _RESPONSE = "\u2e22assistant\u2e22", "\u2e22response\u2e22"


class Chat:
    """Renders conversations for one tokenizer and one tool-call format, see `formats`.

    Tools are described to the model by their JSON schemas, or by the task's system message, as the
    format says. `end_token_ids` are the model's own ends of text: they end an assistant message as
    its end of turn does.
    """

    def __init__(
        self,
        tokenizer: Any,
        call_format: str,
        tools: Sequence[Mapping[str, Any]],
        end_token_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.tools = list(tools)
        self.call_format = call_format
        self._format = make_format(call_format, self.tools)
        if not self._renders_tool_messages():
            tokenizer.chat_template = TOOL_TEMPLATE
        rendered = self._render(
            [
                {"role": "user", "content": "-"},
                {"role": "assistant", "content": _ASSISTANT},
                {"role": "tool", "content": _RESPONSE},
            ],
            generate=True,
        )
        after = rendered.partition(_ASSISTANT)[2]
        self._before_response, _, self._after_response = after.partition(_RESPONSE)
        # Some tokenizers list only a few of their special tokens as such, but know all of them.
        special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        first = self.encode(after)[:1]
        if not len(first) or int(first[0]) not in special:
            raise ConfigError(
                "the chat template does not end an assistant message with a special token; "
                "set a chat template that does, for example ChatML"
            )
        self.end_of_turn = int(first[0])
        ends = {self.end_of_turn, tokenizer.eos_token_id, *end_token_ids} - {None}
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(ends))  # end an assistant message
        self._special_texts = list(special.values())

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
        return self.encode(self._render(messages, generate=True))

    def message_text(self, token_ids: np.ndarray) -> str:
        """Text of one generated assistant message, the token that ended it left out."""
        ended = len(token_ids) > 0 and int(token_ids[-1]) in self.stop_token_ids
        return self.decode(token_ids[:-1] if ended else token_ids)

    def response_glue(self, generated: np.ndarray, response: str) -> np.ndarray:
        """Tokens between one generated message that called a tool and the next one, `int32 [N]`:
        end of turn (unless generated), the tool's response, the opening of the next turn."""
        if any(special in response for special in self._special_texts):
            glue = np.concatenate(
                [
                    self.encode(self._before_response),
                    self.encode(response, as_text=True),
                    self.encode(self._after_response),
                ]
            )
        else:
            glue = self.encode(self._before_response + response + self._after_response)
        return glue[1:] if self._ended(generated) else glue

    def response_text(self, glue: np.ndarray) -> str:
        """The tool's response in what `response_glue` made of it."""
        before, text = self._before_response, self.decode(glue)
        end = self.decode([self.end_of_turn])  # of the turn, which may have been generated
        text = text.removeprefix(end).removeprefix(before.removeprefix(end))
        return text.removesuffix(self._after_response)

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

    def _render(self, messages: Sequence[Message], *, generate: bool) -> str:
        return self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=self.tools if self._format.described else None,
            tokenize=False,
            add_generation_prompt=generate,
        )

    def _renders_tool_messages(self) -> bool:
        """Whether the template knows tool responses: it must treat the role on its own, not print
        any role's name, which is how templates without tool support render it."""
        template = self.tokenizer.chat_template
        return isinstance(template, str) and bool(re.search(r"""['"]tool['"]""", template))
