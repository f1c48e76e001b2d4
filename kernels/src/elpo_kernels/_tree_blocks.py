"""Which blocks of a tree's attention matrix there is anything to compute in.

Packed trees stand in preorder, where a query sees its ancestors and itself,

    allowed(q, k) = k <= q < end[k]   and, with a window, position[q] - position[k] < window.

A block of rows times columns is dead, partial or full by the extremes of `end` and `position` in
it. No `[T, T]` matrix is made, nothing is read back from the device, and the lists, made once a
batch, serve every layer.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

PARTIAL, FULL, DEAD = 0, 1, 2
NO_WINDOW = 0


class BlockLists(NamedTuple):
    """For each of `n` blocks of one side the blocks of the other side to visit."""

    blocks: Tensor  # int32 [n, m], in each row first the partial blocks, then the full ones
    counts: Tensor  # int32 [n, 2], how many partial and full ones
    order: Tensor  # int32 [n], the longest row first, so that no program starts late and ends last


class TreePlan:
    """The ancestor relation of packed trees and its block lists, made when first asked for.

    `end [T]`: first index after the subtree of each token. `position [T]`: depth of each token in
    its tree, needed for windows only. Both int32 or int64, and not to be changed afterwards.
    """

    _latest: ClassVar[TreePlan | None] = None

    def __init__(self, end: Tensor, position: Tensor | None = None) -> None:
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
        self._lists: dict[tuple[int, int, int, bool], BlockLists] = {}
        TreePlan._latest = self

    @classmethod
    def of(cls, end: Tensor, position: Tensor | None) -> Self:
        """The plan whose `end` and `position` these tensors are, if it was the last one made; else
        a new one of them.

        An operator is given tensors alone. One micro-batch's layers find their plan all the same,
        and that plan's tensors, being kept alive, are at addresses that no others have.
        """
        latest = TreePlan._latest
        if isinstance(latest, cls) and _same(latest.end, end) and _same(latest.position, position):
            return latest
        return cls(end, position)

    def allowed(self, window: int = NO_WINDOW) -> Tensor:
        """Bool `[T, T]`, for references and small `T`."""
        index = torch.arange(len(self.end), device=self.end.device)
        seen = (index <= index[:, None]) & (index[:, None] < self.end)
        if window:
            position = self.windowed()
            seen &= position[:, None] - position < window
        return seen

    def windowed(self) -> Tensor:
        """`position`, where a window asks for it."""
        if self.position is None:
            raise ValueError("a window needs positions; make TreePlan(end, position)")
        return self.position

    def lists(self, rows: int, columns: int, window: int, *, by_column: bool) -> BlockLists:
        """Column blocks of every row block, or the other way round."""
        key = rows, columns, window, by_column
        if key not in self._lists:
            classes = self.classes(rows, columns, window)
            self._lists[key] = _listed(classes.t() if by_column else classes)
        return self._lists[key]

    def classes(self, rows: int, columns: int, window: int = NO_WINDOW) -> Tensor:
        """`PARTIAL`, `FULL` or `DEAD` for each block, int32 `[T / rows, T / columns]`."""
        size = len(self.end)
        shortest, longest = _extremes(self.end, columns)
        row = torch.arange(0, size, rows, device=self.end.device)[:, None]
        last_row = (row + rows).clamp_max(size) - 1
        column = torch.arange(0, size, columns, device=self.end.device)
        dead = (column > last_row) | (longest <= row)
        full = (column + columns - 1 <= row) & (shortest > last_row)
        if window:
            low_row, high_row = (x[:, None] for x in _extremes(self.windowed(), rows))
            low, high = _extremes(self.windowed(), columns)
            dead |= low_row - high >= window
            full &= high_row - low < window
        return torch.where(dead, DEAD, torch.where(full, FULL, PARTIAL)).to(torch.int32)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape


def _listed(classes: Tensor) -> BlockLists:
    ranked, index = classes.sort(dim=1, stable=True)
    counts = torch.stack([(ranked == PARTIAL).sum(1), (ranked == FULL).sum(1)], 1)
    order = counts.sum(1).argsort(descending=True, stable=True)
    return BlockLists(*(x.to(torch.int32).contiguous() for x in (index, counts, order)))


def _extremes(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each run of `size` values; the last one may be shorter."""
    missing = -len(values) % size
    limits = torch.iinfo(values.dtype)
    low = F.pad(values, (0, missing), value=limits.max).view(-1, size).amin(1)
    high = F.pad(values, (0, missing), value=limits.min).view(-1, size).amax(1)
    return low, high
