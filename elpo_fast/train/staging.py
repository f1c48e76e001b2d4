"""Between main memory and the device: there in one copy, back in one.

Invariants: nobody waits for what goes there, which lies in pinned memory until it has gone. What
comes back waits for all that the device was given before, so it is asked for once an update.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from elpo_fast.model.forward import bucket, padded
from elpo_fast.tree.pack import PackedBatch

_ALIGNMENT = 16  # bytes: kernels are compiled anew for addresses that are less aligned


class Staged(NamedTuple):
    """A micro-batch on the device: `N` prefixes to compute, and `T` chosen tokens to predict."""

    token_ids: torch.Tensor  # int32 [N]
    position: torch.Tensor  # int32 [N]
    end: torch.Tensor  # int32 [N]
    before: torch.Tensor  # int32 [T], the prefix that predicts each
    targets: torch.Tensor  # int32 [T]
    columns: list[torch.Tensor]  # [T] each
    host_end: torch.Tensor  # `end` in main memory


def stage(
    batch: PackedBatch,
    chosen: NDArray[np.int64],
    columns: Sequence[NDArray[Any]],
    device: torch.device,
) -> Staged:
    """The batch, its tokens `chosen` `[T]` and `columns` `[T]` of theirs.

    On a GPU the prefixes are followed by ones of one token, up to one of few lengths.
    """
    trie = batch.trie
    token_ids, position, end = map(torch.from_numpy, (trie.token_ids, trie.position, trie.end))
    if device.type != "cpu":
        token_ids, position, end = padded(token_ids, position, end, bucket(len(trie)))
    before = trie.row[np.maximum(batch.pred[chosen], 0)]  # nothing predicts a first token
    rows = map(torch.from_numpy, (before, batch.token_ids[chosen], *columns))
    given = [token_ids, position, end, *rows]
    token_ids, position, ends, preceding, targets, *moved = to_device(given, device)
    # What compiled blocks read is no view: to them views and other tensors are different code.
    return Staged(token_ids, position.clone(), ends.clone(), preceding, targets, moved, end)


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """These contiguous tensors of the main memory on `device`."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    starts = [0, *itertools.accumulate(sizes)]
    pinned = device.type == "cuda"
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)

    def views(flat: torch.Tensor) -> list[torch.Tensor]:
        return [
            flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=False)
        ]

    for view, tensor in zip(views(buffer), tensors, strict=True):
        view.copy_(tensor)
    # The allocator gives pinned memory to nobody else before the copy is through.
    return views(buffer.to(device, non_blocking=True))


def to_host(tensors: Sequence[torch.Tensor]) -> list[NDArray[Any]]:
    """Tensors `[n]` of one device as arrays. Waits for the device."""
    if not tensors:
        return []
    lengths = [len(tensor) for tensor in tensors]
    values = torch.cat([*tensors]).cpu().numpy()
    return np.split(values, np.cumsum(lengths)[:-1])
