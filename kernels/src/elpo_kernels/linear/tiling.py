"""How the `[T, V]` matrix is cut, so that nothing ever holds it: tokens into blocks of rows, the
vocabulary into strips of columns."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

MIB = 1 << 20

# Powers that a GPU holds between forward and backward, in bytes.
GPU_KEPT = 1200 * MIB


@dataclass(frozen=True, slots=True)
class Tiling:
    """`rows * strip` is the tile of one matrix product, `kept` the number of rows whose whole
    vocabulary is held between the forward and the backward, `update` the rows of the weight's
    gradient that are brought up to date at once. `sums_fit`: beside `kept` there is room for sums
    of the weights' gradients wider than their results. `grain`: what numbers of rows are a multiple
    of where they can be. `block`: rows that are taken before the host looks at them. `whole`: up to
    so many rows are held all at once, which needs no such sum. `rounded`: as `update`, where the
    product is rounded to the result at once. `piece`: rows of a wider sum that have memory of
    their own, which is given back as soon as they are done."""

    rows: int
    strip: int
    kept: int
    update: int
    sums_fit: bool = True
    grain: int = 1
    block: int = 0  # 0: `rows`
    whole: int = 0
    rounded: int = 0  # 0: `update`
    piece: int = 0  # 0: all

    @property
    def at_once(self) -> int:
        """Rows between two looks of the host."""
        return self.block or self.rows

    def held(self, count: int) -> int:
        """Most rows whose whole vocabulary is held, of `count`."""
        return count if self.kept < count <= self.whole else self.kept

    @staticmethod
    def of(
        shape: tuple[int, int], dtype: torch.dtype, device: torch.device, sums: int = 0
    ) -> Tiling:
        """For a weight `[V, H]` and products in `dtype`; `sums`: bytes that sums of gradients take
        beyond their results.

        Measured: a GPU wants products that fill it, see `whole_waves`, and to be waited for seldom;
        it holds at most `GPU_KEPT` of powers, and as much more as sums would take where that makes
        them unnecessary."""
        if device.type == "cpu":
            from elpo_kernels.linear import cpu

            return cpu.tiling(shape, dtype, sums)
        vocabulary = shape[0]
        row_bytes = max(1, vocabulary * dtype.itemsize)
        rows, strip = whole_waves(*_chip(device))
        kept = max(rows, GPU_KEPT // row_bytes // rows * rows)
        # A bfloat16 gradient's sum takes twice of what it takes beyond its result.
        return Tiling(
            rows=rows,
            strip=strip,
            kept=kept,
            update=max(1, vocabulary),
            grain=rows,
            block=1 << 62,
            whole=(GPU_KEPT + 2 * sums) // row_bytes,
        )


def whole_waves(processors: int, cache_bytes: int) -> tuple[int, int]:
    """Rows and columns of a product with float32 results for a GPU with so many multiprocessors:
    its tiles of 128 x 256, one a multiprocessor at a time, end together, and the result stays in
    the second-level cache. Measured on an H100 (132, 50 MB): 2048 x 6144 at 719 TFLOP/s, 2048 x
    4096 at 681, 2048 x 8192 at 671, 1408 x 4096 at 660."""
    rows = 2048

    def full(columns: int) -> float:
        tiles = rows // 128 * columns
        return tiles / (-(-tiles // processors) * processors)

    fits = range(1, max(1, cache_bytes // (rows * 256 * 4)) + 1)
    good = [columns for columns in fits if full(columns) >= 0.95]
    return rows, 256 * (max(good) if good else max(fits, key=full))


@functools.cache
def _chip(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and bytes of second-level cache, as `whole_waves` takes them."""
    if device.type != "cuda":
        return 132, 50 * MIB
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.L2_cache_size
