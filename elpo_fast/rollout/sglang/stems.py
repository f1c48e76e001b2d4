"""Which prefixes a server has computed or is computing, as far as we asked for them ourselves.

SGLang shares what earlier requests left in its cache, but requests that arrive together each
compute their common prefix. So whoever asks for tokens that nobody has computed holds them until
they are there, and everyone else waits for just those. The same knowledge sends the branches of a
tree to the server that has its trunk. What the server evicts is not followed: the price is a wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

BLOCK = 8
"""Tokens are compared in blocks of so many; what is left over is not tracked."""

_MOST_BLOCKS = 1 << 20


class Stems:
    """A prefix is known block by block, each block by the hash of all tokens up to its end."""

    def __init__(self) -> None:
        self._blocks: dict[int, asyncio.Event | None] = {}  # None: computed

    def known(self, tokens: np.ndarray) -> int:
        """How many leading tokens are computed or being computed."""
        count = 0
        for key in _keys(tokens):
            if key not in self._blocks:
                break
            count += 1
        return count * BLOCK

    def add(self, tokens: np.ndarray) -> None:
        """These tokens have been computed."""
        if len(self._blocks) > _MOST_BLOCKS:
            self._blocks = {k: held for k, held in self._blocks.items() if held is not None}
        for key in _keys(tokens):
            self._blocks.setdefault(key, None)

    @asynccontextmanager
    async def compute(self, tokens: np.ndarray) -> AsyncIterator[None]:
        """Wait for leading tokens that others are computing, and hold the rest meanwhile."""
        keys = _keys(tokens)
        at = 0
        while at < len(keys) and keys[at] in self._blocks:
            held = self._blocks[keys[at]]
            if held is None:
                at += 1
            else:
                await held.wait()  # then look again: it may have failed
        mine, event = keys[at:], asyncio.Event()
        self._blocks |= dict.fromkeys(mine, event)
        try:
            yield
        except BaseException:
            for key in mine:
                del self._blocks[key]
            raise
        else:
            self._blocks |= dict.fromkeys(mine)
        finally:
            event.set()


def _keys(tokens: np.ndarray) -> list[int]:
    whole = np.ascontiguousarray(tokens[: len(tokens) // BLOCK * BLOCK], np.int32)
    keys, key = [], 0
    for block in whole.reshape(-1, BLOCK):
        key = hash((key, block.tobytes()))
        keys.append(key)
    return keys
