"""The small tokenizer: exact round trips, single marks, single digits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from elpo_fast.model.tokenizer import CHAT_MARKS, TOOL_MARKS, VOCABULARY, train_tokenizer

TEXTS = [
    f'Add {number} to the balance. <tool_call>{{"name": "python", "arguments": 1}}</tool_call>\n'
    for number in range(50)
]
TOKENIZER = train_tokenizer(TEXTS)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "  two\n\n\ttabs ", " 'll n't . , !", "é☃🙂", "<tool_call> <answer>7</answer>"],
)
def test_awkward_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("mark", [*CHAT_MARKS, *TOOL_MARKS])
def test_mark_is_one_token_wherever_it_stands(mark: str) -> None:
    number = TOKENIZER.convert_tokens_to_ids(mark)
    assert TOKENIZER.encode(mark) == [number]
    assert TOKENIZER.encode(f"balance{mark} 12").count(number) == 1


def test_tool_marks_survive_decoding_without_special_tokens() -> None:
    ids = TOKENIZER.encode("<tool_call>1</tool_call><|im_end|>")
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<tool_call>1</tool_call>"


def test_digits_stay_apart_and_words_do_not() -> None:
    assert TOKENIZER.tokenize("12345") == list("12345")
    assert len(TOKENIZER.tokenize(" balance")) == 1


def test_size_is_bounded_and_training_repeats() -> None:
    assert 256 + len(CHAT_MARKS) + len(TOOL_MARKS) < len(TOKENIZER) <= VOCABULARY
    assert train_tokenizer(TEXTS).get_vocab() == TOKENIZER.get_vocab()


def test_saved_tokenizer_is_the_same(tmp_path: object) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|pad|>")
