"""What every engine refuses before it computes anything, with the reason."""

from __future__ import annotations

import numpy as np

from elpo_fast.types import Sampling


def check_request(
    prefix_ids: np.ndarray, n: int, sampling: Sampling, *, vocab_size: int, room: int, because: str
) -> np.ndarray:
    """`prefix_ids` as an integer array `[N]`, 1 <= N, whose completions fit into `room` tokens,
    prefix included (`because` says where that limit comes from). Raises `ValueError`."""
    prefix = check_tokens(prefix_ids, vocab_size)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    s = sampling
    for right, name, value, wanted in (
        (s.max_tokens >= 1, "max_tokens", s.max_tokens, "at least 1"),
        (0 <= s.temperature < np.inf, "temperature", s.temperature, "finite and at least 0"),
        (0 < s.top_p <= 1, "top_p", s.top_p, "in (0, 1]"),
        (s.top_k >= 0, "top_k", s.top_k, "at least 0 (0: off)"),
        (0 <= s.min_p <= 1, "min_p", s.min_p, "in [0, 1]"),
    ):
        if not right:
            raise ValueError(f"sampling.{name} must be {wanted}, got {value}")
    if not all(s.stop):
        raise ValueError("a stop string must not be empty")
    if len(prefix) + s.max_tokens > room:
        raise ValueError(
            f"{len(prefix)} prefix tokens and {s.max_tokens} new ones exceed the {room} that "
            f"{because} allow"
        )
    return prefix


def check_tokens(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`token_ids` as an integer array `[N]`, 1 <= N, of known ids. Raises `ValueError`."""
    tokens = np.asarray(token_ids)
    if tokens.ndim != 1 or len(tokens) == 0:
        raise ValueError(
            f"a prefix needs at least one token in one dimension, got shape {tokens.shape}"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"a prefix is made of token ids, got an array of {tokens.dtype}")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise ValueError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}")
    return tokens
