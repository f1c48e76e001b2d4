"""Which blocks of a tree's attention matrix there is anything to compute in.

Packed trees stand in preorder, where a query sees its ancestors and itself,

    allowed(q, k) = k <= q < end[k]   and, with a window, position[q] - position[k] < window.

A block of rows times columns is dead, partial or full by the extremes of `end` and `position` in
it. No `[T, T]` matrix is made, nothing is read back from the device, and the lists, made once a
batch, serve every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

PARTIAL, FULL, DEAD = 0, 1, 2
NO_WINDOW = 0


class Trees(NamedTuple):
    """The ancestor relation of packed trees, each int32 `[T]`, and how far up a query sees."""

    end: Tensor
    position: Tensor | None
    window: int = NO_WINDOW


class BlockLists(NamedTuple):
    """For each of `n` blocks of one side the blocks of the other side to visit."""

    blocks: Tensor  # int32 [n, m], in each row first the partial blocks, then the full ones
    counts: Tensor  # int32 [n, 2], how many partial and full ones
    order: Tensor  # int32 [n], the longest row first, so that no program starts late and ends last


def classes(trees: Trees, rows: int, columns: int) -> Tensor:
    """`PARTIAL`, `FULL` or `DEAD` for each block, int32 `[T / rows, T / columns]`."""
    end, position, window = trees
    size = len(end)
    shortest, longest = _extremes(end, columns)
    row = torch.arange(0, size, rows, device=end.device)[:, None]
    last_row = (row + rows).clamp_max(size) - 1
    column = torch.arange(0, size, columns, device=end.device)
    dead = (column > last_row) | (longest <= row)
    full = (column + columns - 1 <= row) & (shortest > last_row)
    if window:
        assert position is not None
        low_row, high_row = (x[:, None] for x in _extremes(position, rows))
        low, high = _extremes(position, columns)
        dead |= low_row - high >= window
        full &= high_row - low < window
    return torch.where(dead, DEAD, torch.where(full, FULL, PARTIAL)).to(torch.int32)


def block_lists(trees: Trees, rows: int, columns: int, *, by_column: bool) -> BlockLists:
    """Column blocks of every row block, or the other way round."""
    found = classes(trees, rows, columns)
    ranked, index = (found.t() if by_column else found).sort(dim=1, stable=True)
    counts = torch.stack([(ranked == PARTIAL).sum(1), (ranked == FULL).sum(1)], 1)
    order = counts.sum(1).argsort(descending=True, stable=True)
    return BlockLists(*(x.to(torch.int32).contiguous() for x in (index, counts, order)))


@library.custom_op("elpo_kernels::tree_blocks", mutates_args=())
def tree_blocks_op(
    end: Tensor, position: Tensor | None, window: int, sizes: Sequence[int]
) -> Tensor:
    """Block lists one after the other in one int32 tensor: by row, by row and by column, for as
    many tiles, `sizes` rows and columns of each."""
    made: dict[tuple[int, int, bool], Tensor] = {}
    for key in _sides(sizes):
        if key not in made:
            rows, columns, by_column = key
            lists = block_lists(Trees(end, position, window), rows, columns, by_column=by_column)
            made[key] = torch.cat([part.flatten() for part in lists])
    return torch.cat([made[key] for key in _sides(sizes)])


@tree_blocks_op.register_fake
def _(end: Tensor, position: Tensor | None, window: int, sizes: Sequence[int]) -> Tensor:
    shapes = [_shape(end.shape[0], *key) for key in _sides(sizes)]
    return end.new_empty(sum(n * (m + 3) for n, m in shapes))


def unpacked(packed: Tensor, tokens: int, sizes: Sequence[int]) -> list[BlockLists]:
    """The lists that `tree_blocks_op` made."""
    lists, at = [], 0
    for key in _sides(sizes):
        n, m = _shape(tokens, *key)
        blocks, counts, order = packed[at : at + n * (m + 3)].split([n * m, 2 * n, n])
        lists.append(BlockLists(blocks.view(n, m), counts.view(n, 2), order))
        at += n * (m + 3)
    return lists


def _sides(sizes: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Rows, columns and whether lists are by column, of each tile."""
    return [(sizes[2 * i], sizes[2 * i + 1], i == 2) for i in range(3)]


def _shape(tokens: int, rows: int, columns: int, by_column: bool) -> tuple[int, int]:
    """Lists, and length of each."""
    shape = -(-tokens // rows), -(-tokens // columns)
    return shape[::-1] if by_column else shape


def _extremes(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each run of `size` values; the last one may be shorter."""
    missing = -len(values) % size
    limits = torch.iinfo(values.dtype)
    low = F.pad(values, (0, missing), value=limits.max).view(-1, size).amin(1)
    high = F.pad(values, (0, missing), value=limits.min).view(-1, size).amax(1)
    return low, high
