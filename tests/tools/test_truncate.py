"""Cutting tool results by tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elpo_fast.tools.truncate import truncate


def encode_bytes(text: str) -> list[int]:
    return list(text.encode())


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def encode_pairs(text: str) -> list[int]:
    """Two characters a token: where a text is cut changes how the rest is split."""
    return [ord(a) << 21 | (ord(b) if b else 0) for a, b in zip_pairs(text)]


def zip_pairs(text: str) -> list[tuple[str, str]]:
    return [(text[i], text[i + 1 : i + 2]) for i in range(0, len(text), 2)]


def decode_pairs(ids: Sequence[int]) -> str:
    return "".join(chr(i >> 21) + (chr(i & 0x1FFFFF) if i & 0x1FFFFF else "") for i in ids)


CODECS = {"bytes": (encode_bytes, decode_bytes), "pairs": (encode_pairs, decode_pairs)}


@pytest.mark.parametrize("codec", CODECS)
def test_short_text_is_untouched(codec: str) -> None:
    encode, decode = CODECS[codec]
    assert truncate("hello", 5, encode, decode) == "hello"
    assert truncate("", 1, encode, decode) == ""


@pytest.mark.parametrize("codec", CODECS)
def test_long_text_keeps_head_tail_and_a_mark(codec: str) -> None:
    encode, decode = CODECS[codec]
    text = "start " + "x" * 1000 + " ValueError: end"
    cut = truncate(text, 100, encode, decode)
    assert cut.startswith("start x") and cut.endswith("x ValueError: end")
    assert " tokens cut]" in cut
    assert 90 <= len(encode(cut)) <= 100


def test_mark_says_how_much_is_missing() -> None:
    text = "".join(chr(97 + i % 26) for i in range(500))
    cut = truncate(text, 101, encode_bytes, decode_bytes)
    head, rest = cut.split("\n...[")
    number, tail = rest.split(" tokens cut]...\n")
    assert text.startswith(head) and text.endswith(tail)
    assert len(head) + len(tail) + int(number) == 500


def test_characters_are_not_cut_in_half() -> None:
    assert "\ufffd" not in truncate("é" * 500, 64, encode_bytes, decode_bytes)


def test_tiny_limit_keeps_the_tail() -> None:
    assert truncate("x" * 50 + "end", 3, encode_bytes, decode_bytes) == "end"


def test_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit=0"):
        truncate("abc", 0, encode_bytes, decode_bytes)


@given(st.text(max_size=400), st.integers(1, 120), st.sampled_from(sorted(CODECS)))
def test_limit_holds_for_any_text(text: str, limit: int, codec: str) -> None:
    encode, decode = CODECS[codec]
    cut = truncate(text, limit, encode, decode)
    assert len(encode(cut)) <= limit
    if len(encode(text)) <= limit:
        assert cut == text
