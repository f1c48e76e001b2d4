"""A small byte-level BPE tokenizer for models trained from scratch.

Any text round-trips exactly, digits stay single tokens (arithmetic is learned digit by digit), and
the marks of chat and tool calls are one token each. The same texts give the same vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_MARKS = ("<|im_start|>", "<|im_end|>", "<|pad|>")
TOOL_MARKS = (
    "<code>",
    "</code>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<answer>",
    "</answer>",
)
VOCABULARY = 512
CHATML = (
    "{%- if tools and messages[0]['role'] != 'system' %}"
    "{%- set messages = [{'role': 'system', 'content': 'You can call tools.'}] + messages %}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{- raise_exception('there is no role ' + message['role']) }}"
    "{%- endif %}"
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
"""ChatML with a tool role: `model.chat_template: chatml`, and that of models from scratch."""


def train_tokenizer(texts: Iterable[str], size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Learn merges from `texts`; at most `size` tokens, all 256 bytes and all marks included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Marks occur in the texts too; as special tokens of the trainer they take part in no merge.
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*CHAT_MARKS, *TOOL_MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Tool marks are text that a model writes and a parser reads: decoding must never skip them.
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in TOOL_MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
