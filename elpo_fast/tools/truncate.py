"""Cut a long tool result to a number of tokens: beginning and end stay, the cut is marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_MARK = "\n...[{} tokens cut]...\n"


def truncate(
    text: str,
    limit: int,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> str:
    """`text` if it has at most `limit` tokens, else its head, a mark and its tail, together at most
    `limit` tokens when encoded again. The tail gets the odd token and, where `limit` is too small
    for a mark, everything: the last line of a traceback says most. `ValueError` if `limit < 1`.
    """
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1 token")
    ids = encode(text)
    if len(ids) <= limit:
        return text
    room = limit - len(encode(_MARK.format(len(ids))))
    while room >= 2:
        head, tail = ids[: room // 2], ids[len(ids) - (room - room // 2) :]
        mark = _MARK.format(len(ids) - room)
        # A cut inside a character leaves replacement characters at the seam.
        result = decode(head).rstrip("\ufffd") + mark + decode(tail).lstrip("\ufffd")
        excess = len(encode(result)) - limit  # tokens may split anew at the seams
        if excess <= 0:
            return result
        room -= excess
    for kept in range(limit, 0, -1):
        result = decode(ids[len(ids) - kept :]).lstrip("\ufffd")
        if len(encode(result)) <= limit:
            return result
    return ""
