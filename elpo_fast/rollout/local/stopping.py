"""Stop strings on token streams, at the price of one table look-up for nearly every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class TokenTexts:
    """The text every vocabulary id adds after ordinary text (a first token may lose its space)."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        known = min(vocab_size, len(tokenizer))
        anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
        skip = len(self.decode([anchor]))
        pairs = tokenizer.batch_decode(
            [[anchor, i] for i in range(known)],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        self.texts = [pair[skip:] for pair in pairs] + [""] * (vocab_size - known)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class StopStrings:
    """Whether the newest token completed one of the strings.

    `candidate[id]` says whether the token's text contains a string, or starts with the rest of one;
    only then the last tokens are decoded. Tokens of partial characters are always candidates.
    """

    def __init__(self, texts: TokenTexts, strings: Sequence[str]) -> None:
        self._texts, self._strings = texts, tuple(strings)
        rests = tuple({s[i:] for s in strings for i in range(len(s))})
        self.candidate = np.array(
            [
                t.startswith(rests) or "\ufffd" in t or any(s in t for s in strings)
                for t in texts.texts
            ]
        )
        # A token carries at least one byte, save for special tokens that decode to nothing.
        self._tail = max(len(s.encode()) for s in strings) + 8

    def completed(self, token_ids: np.ndarray) -> bool:
        """Whether the text of `token_ids`, whose last token is new, contains a stop string."""
        if not self.candidate[token_ids[-1]]:
            return False
        text = self._texts.decode(token_ids[-self._tail :].tolist())
        return any(s in text for s in self._strings)
