"""What a CPU does otherwise: the dtype of its products and the size of its tiles.

Its arithmetic is `torch_tiles`, as on any device without Triton.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from elpo_kernels.backend import widens_bfloat16
from elpo_kernels.linear.tiling import MIB, Tiling

# Least size of a piece of a weight's sum: from 32 MiB on, glibc gives each back to the system.
PIECE_BYTES = 34 * MIB


def products_dtype(dtype: torch.dtype, group: dist.ProcessGroup | None) -> torch.dtype:
    """In what hidden states of `dtype` are multiplied: bfloat16 in float32 where any of the group's
    processes is faster in that, for shards must share their anchors."""
    if dtype != torch.bfloat16:
        return dtype
    widens = widens_bfloat16()
    if group is not None:
        flag = torch.tensor(int(widens))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        widens = bool(flag)
    return torch.float32 if widens else dtype


def tiling(shape: tuple[int, int], dtype: torch.dtype, sums: int) -> Tiling:
    """See `Tiling.of`. Measured: a CPU wants tiles in its last-level cache, but few of them,
    because each wakes its threads, and of bfloat16 updates in its second-level cache; it keeps at
    most 200 MiB of powers and sums, and beside sums fewer than 384 rows cost more than a second
    pass."""
    vocabulary, width = shape
    row_bytes = max(1, vocabulary * dtype.itemsize)
    whole = row_bytes + 24 * width  # with hidden state, target's weight, gradient, products
    beside_sums = (200 * MIB - sums) // whole
    sums_fit = not sums or beside_sums >= 384
    alone = min(200 * MIB // row_bytes, 220 * MIB // whole)
    kept = min(1024, max(64, beside_sums if sums and sums_fit else alone))
    strip = 4096 if dtype == torch.bfloat16 or width <= 1024 else 2048
    pieces = max(1, vocabulary * width * 4 // PIECE_BYTES)
    rows, update = 1024, max(1, vocabulary)
    if dtype == torch.bfloat16:
        rows = max(64, min(256, kept // 2))
        update = max(128, 400_000 // max(1, width) // 32 * 32)
    return Tiling(
        rows, strip, kept, update, sums_fit, rounded=strip, piece=max(1, -(-vocabulary // pieces))
    )
