"""Which token sees which in packed trees, and the forms in which backends want to know it.

Several trees lie end to end on one row of tokens in preorder. A query sees its ancestors and
itself, which in preorder is one comparison per pair,

    allowed(q, k) = k <= q < end[k],

with `end[k]` the first position after the subtree of `k`'s node. Under a sliding window it sees
those of them less than `window` positions above, `position[q] - position[k] < window`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from elpo_kernels import TreePlan
from numpy.typing import NDArray

T = TypeVar("T")


class Run(NamedTuple):
    """Queries `start:stop` that follow each other on a path, and the slices of what they see."""

    start: int
    stop: int
    path: list[slice]  # up to `stop`, in order; ends with the run itself

    @property
    def length(self) -> int:
        """Keys on the path."""
        return sum(part.stop - part.start for part in self.path)


class TreeMask(TreePlan):
    """The ancestor relation of packed trees, block lists for kernels included.

    What a backend derives of it is kept, so that one micro-batch's layers share it.
    """

    position: torch.Tensor

    def __init__(
        self, end: torch.Tensor, position: torch.Tensor, host_end: torch.Tensor | None = None
    ) -> None:
        """Integer `[N]` all. `host_end`: `end` in main memory; `None`: read when it is needed."""
        super().__init__(end, position)
        self._kept: dict[object, object] = {} if host_end is None else {"ends": host_end.numpy()}

    def kept(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returns, made once for each `key`."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])

    @property
    def ends(self) -> NDArray[np.integer]:
        """`end` in main memory."""
        return self.kept("ends", lambda: self.end.cpu().numpy())

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Half-open ranges that see nothing of each other: the trees, in order.

        A root's first token spans its whole tree; a tree whose root has no tokens falls into its
        first steps, which do not see each other either.
        """
        ends = self.ends.tolist()
        spans, start = [], 0
        while start < len(ends):
            spans.append((start, ends[start]))
            start = ends[start]
        return spans

    @cached_property
    def runs(self) -> list[Run]:
        """All queries, in order; token `t` goes on with the path of `t - 1` if `t < end[t - 1]`."""
        end = self.ends
        index = np.arange(len(end))
        runs = []
        for tree_start, tree_stop in self.spans:
            inner = index[tree_start + 1 : tree_stop]
            starts = [tree_start, *inner[end[inner - 1] == inner].tolist()]
            for start, stop in zip(starts, [*starts[1:], tree_stop], strict=True):
                above = tree_start + np.flatnonzero(end[tree_start:start] > start)
                breaks = np.flatnonzero(np.diff(above) != 1) + 1
                path = [slice(int(p[0]), int(p[-1]) + 1) for p in np.split(above, breaks) if len(p)]
                runs.append(Run(start, stop, [*path, slice(start, stop)]))
        return runs

    def pieces(self, size: int, window: int | None) -> list[Run]:
        """Runs cut to at most `size` queries, without keys that the window hides from all."""

        def cut() -> list[Run]:
            pieces = []
            for run in self.runs:
                for start in range(run.start, run.stop, size):
                    stop = min(start + size, run.stop)
                    path = [*run.path[:-1], slice(run.start, stop)]
                    if window is not None:
                        path = _last(path, stop - start + window - 1)
                    pieces.append(Run(start, stop, path))
            return pieces

        return self.kept(("pieces", size, window), cut)

    def dense(self, start: int, stop: int, window: int | None) -> torch.Tensor:
        """`allowed` of one span, bool `[stop - start, stop - start]`."""

        def make() -> torch.Tensor:
            index = torch.arange(start, stop, device=self.end.device)
            allowed = (index <= index[:, None]) & (index[:, None] < self.end[start:stop])
            if window is not None:
                position = self.position[start:stop]
                allowed &= position[:, None] - position < window
            return allowed

        return self.kept(("dense", start, window), make)


def _last(path: list[slice], count: int) -> list[slice]:
    """The last `count` tokens of a path."""
    kept: list[slice] = []
    for part in reversed(path):
        if count <= 0:
            break
        kept.append(slice(max(part.start, part.stop - count), part.stop))
        count -= part.stop - part.start
    return kept[::-1]
