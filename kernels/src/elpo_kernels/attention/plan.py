"""The ancestor relation of packed trees, and the forms in which backends want to know it.

Several trees lie end to end on one row of tokens in preorder. A query sees its ancestors and
itself, which in preorder is one comparison per pair,

    allowed(q, k) = k <= q < end[k],

with `end[k]` the first position after the subtree of `k`. Under a sliding window it sees those of
them less than `window` positions above, `position[q] - position[k] < window`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from elpo_kernels.attention.blocks import NO_WINDOW, BlockLists, Trees, block_lists, tree_blocks_op
from elpo_kernels.attention.tiles import Tiles

T = TypeVar("T")


class Chain(NamedTuple):
    """Queries `start:stop` that follow each other on a path, and the slices of what they see."""

    start: int
    stop: int
    path: list[slice]  # up to `stop`, in order; ends with the run itself

    @property
    def length(self) -> int:
        """Keys on the path."""
        return sum(part.stop - part.start for part in self.path)


class TreePlan:
    """Packed trees and what is derived of them, made when first asked for and kept, so that one
    batch's layers share it."""

    def __init__(
        self, end: Tensor, position: Tensor | None = None, host_end: Tensor | None = None
    ) -> None:
        """`end [T]`: first index after the subtree of each token. `position [T]`: depth of each
        token in its tree, needed for windows only. Both int32 or int64, and not to be changed
        afterwards. `host_end`: `end` in main memory; `None`: read when it is needed."""
        for name, values in (("end", end), ("position", position)):
            if values is None:
                continue
            if values.ndim != 1 or values.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"{name} must be int32 or int64 [T], got {values.dtype} {list(values.shape)}"
                )
        if position is not None and position.shape != end.shape:
            raise ValueError(f"position has {len(position)} tokens and end {len(end)}; give equal")
        self.end = end.to(torch.int32).contiguous()
        self.position = None if position is None else position.to(torch.int32).contiguous()
        self._host_end = host_end
        self._kept: dict[object, object] = {}
        self._blocks: dict[tuple[int, ...], Tensor] = {}

    def windowed(self) -> Tensor:
        """`position`, where a window asks for it."""
        if self.position is None:
            raise ValueError("a window needs positions; make TreePlan(end, position)")
        return self.position

    def trees(self, window: int = NO_WINDOW) -> Trees:
        return Trees(self.end, self.windowed() if window else None, window)

    def blocks(self, tiles: Tiles, window: int = NO_WINDOW) -> Tensor:
        """What `tree_blocks_op` makes for these tiles."""
        key = *tiles.sizes, window
        if key not in self._blocks:
            self._blocks[key] = tree_blocks_op(*self.trees(window), list(tiles.sizes))
        return self._blocks[key]

    def lists(self, rows: int, columns: int, window: int, *, by_column: bool) -> BlockLists:
        """Column blocks of every row block, or the other way round."""
        return self.kept(
            (rows, columns, window, by_column),
            lambda: block_lists(self.trees(window), rows, columns, by_column=by_column),
        )

    def kept(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returns, made once for each `key`."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])

    @cached_property
    def ends(self) -> list[int]:
        """`end` in main memory."""
        end = self.end if self._host_end is None else self._host_end
        return cast(list[int], end.tolist())

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Half-open ranges that see nothing of each other: the trees, in order.

        A root's first token spans its whole tree; a tree whose root has no tokens falls into its
        first steps, which do not see each other either.
        """
        ends = self.ends
        spans, start = [], 0
        while start < len(ends):
            spans.append((start, ends[start]))
            start = ends[start]
        return spans

    @cached_property
    def chains(self) -> list[Chain]:
        """All queries, in order; token `t` goes on with the path of `t - 1` if `t < end[t - 1]`."""
        end, chains = self.ends, []
        path: list[slice] = []
        start = 0
        for stop in (t for t in range(1, len(end) + 1) if t == len(end) or end[t - 1] <= t):
            while path:  # what ends before `start` is no longer above
                last = path.pop()
                above = last.stop
                while above > last.start and end[above - 1] <= start:
                    above -= 1
                if above > last.start:
                    path.append(slice(last.start, above))
                    break
            path.append(slice(start, stop))
            chains.append(Chain(start, stop, list(path)))
            start = stop
        return chains

    def pieces(self, size: int, window: int | None) -> list[Chain]:
        """Runs cut to at most `size` queries, without keys that the window hides from all."""

        def cut() -> list[Chain]:
            pieces = []
            for chain in self.chains:
                for start in range(chain.start, chain.stop, size):
                    stop = min(start + size, chain.stop)
                    path = [*chain.path[:-1], slice(chain.start, stop)]
                    if window is not None:
                        path = _last(path, stop - start + window - 1)
                    pieces.append(Chain(start, stop, path))
            return pieces

        return self.kept(("pieces", size, window), cut)

    def allowed(self, window: int = NO_WINDOW, start: int = 0, stop: int | None = None) -> Tensor:
        """Bool `[stop - start, stop - start]` of tokens that see nothing outside these; for
        references and small `T`."""

        def make() -> Tensor:
            end = self.end[start:stop]
            index = torch.arange(start, start + len(end), device=end.device)
            seen = (index <= index[:, None]) & (index[:, None] < end)
            if window:
                position = self.windowed()[start:stop]
                seen &= position[:, None] - position < window
            return seen

        return self.kept(("allowed", start, stop, window), make)


def _last(path: list[slice], count: int) -> list[slice]:
    """The last `count` tokens of a path."""
    kept: list[slice] = []
    for part in reversed(path):
        if count <= 0:
            break
        kept.append(slice(max(part.start, part.stop - count), part.stop))
        count -= part.stop - part.start
    return kept[::-1]
