"""The output layer as the engine sees it, and the cutting of its work into tiles.

Nothing here or in the engine ever holds `[T, V]`: tokens are cut into blocks of rows, the
vocabulary into strips of columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

LOG2E = 1 / math.log(2)
LN2 = math.log(2)
MIB = 1 << 20

# Powers that a GPU holds between forward and backward, in bytes.
GPU_KEPT = 1200 * MIB

LOOSE_LIMIT = 32.0  # powers of two, of anchors that float32 can do without


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the `[T, V]` matrix is cut. `rows * strip` is the tile of one matrix product, `kept`
    the number of rows whose whole vocabulary is held between the forward and the backward,
    `update` the rows of the weight's gradient that are brought up to date at once. `sums_fit`:
    beside `kept` there is room for sums of the weights' gradients wider than their results.
    `grain`: what numbers of rows are a multiple of where they can be. `block`: rows that are taken
    before the host looks at them. `whole`: up to so many rows are held all at once, which needs no
    such sum."""

    rows: int
    strip: int
    kept: int
    update: int
    sums_fit: bool = True
    grain: int = 1
    block: int = 0  # 0: `rows`
    whole: int = 0

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
        beyond their results. Measured: a CPU wants tiles in its last-level cache, but few of them,
        because each wakes its threads, and of bfloat16 updates in its second-level cache; it keeps
        at most 200 MiB of powers and sums, and beside sums fewer than 384 rows cost more than a
        second pass. A GPU wants products that fill it, see `whole_waves`, and to be waited for
        seldom; it holds at most `GPU_KEPT` of powers, and as much more as sums would take where
        that makes them unnecessary."""
        vocabulary, width = shape
        row_bytes = max(1, vocabulary * dtype.itemsize)
        if device.type == "cpu":
            whole = row_bytes + 24 * width  # with hidden state, target's weight, gradient, products
            beside_sums = (200 * MIB - sums) // whole
            sums_fit = not sums or beside_sums >= 384
            alone = min(200 * MIB // row_bytes, 220 * MIB // whole)
            kept = min(1024, max(64, beside_sums if sums and sums_fit else alone))
            strip = 4096 if dtype == torch.bfloat16 or width <= 1024 else 2048
            if dtype != torch.bfloat16:
                return Tiling(1024, strip, kept, max(1, vocabulary), sums_fit)
            update = max(128, 400_000 // max(1, width) // 32 * 32)
            return Tiling(max(64, min(256, kept // 2)), strip, kept, update, sums_fit)
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


@dataclass(frozen=True, slots=True)
class Head:
    """Logits are Σ_i x_i W_iᵀ + bias, then soft-capped, then divided by the temperature. The sum
    over i has a second member where a low-rank update lies beside the base weight.

    A vocabulary-sharded head holds rows `first … first + V` of the whole; `group` connects the
    shards."""

    weights: tuple[Tensor, ...]  # each [V, H_i]
    dtype: torch.dtype  # of the matrix products; weights of another are converted strip by strip
    bias: Tensor | None  # [V], accumulation dtype
    softcap: float  # 0: none
    inv_temperature: float | Tensor  # Tensor: [T, 1]
    first: int
    group: dist.ProcessGroup | None
    tiling: Tiling

    @property
    def vocabulary(self) -> int:
        return self.weights[0].shape[0]

    @property
    def plain(self) -> bool:
        """Anchor, scale and logits come out of a single matrix product."""
        return self.bias is None and not self.softcap and isinstance(self.inv_temperature, float)

    def strips(self, width: int | None = None) -> Iterator[slice]:
        """The vocabulary in pieces of `width`, by default a tile's."""
        return cut(0, self.vocabulary, width or self.tiling.strip)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Elementwise sum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def all_max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values


def cut(start: int, stop: int, size: int) -> Iterator[slice]:
    """`start … stop` in slices of `size`."""
    for low in range(start, stop, size):
        yield slice(low, min(low + size, stop))


def blocks(index: Tensor, rows: int) -> Sequence[Tensor]:
    """`index` in pieces of `rows`; none where it is empty."""
    return index.split(rows) if len(index) else ()


def column(inv_temperature: float | Tensor) -> float | Tensor:
    """The inverse temperature as a factor for `[R]` arrays."""
    return inv_temperature[:, 0] if isinstance(inv_temperature, Tensor) else inv_temperature


@dataclass(slots=True)
class Rows:
    """One block of tokens on its way through the head. Its logits are held as base-2 logarithms
    relative to an anchor near the row's log-sum-exp: L_v = log2(e) · l_v + offset. A product of
    bfloat16 operands that is rounded to bfloat16 then loses nothing where it matters, at L ≈ 0."""

    xs: tuple[Tensor, ...]  # each [R, H_i]
    column: Tensor  # [R] target's column in this shard, -1 where another shard holds it
    raw: Tensor  # [R] target's logit before bias, soft cap and temperature
    logit: Tensor  # [R] target's logit
    inv_temperature: float | Tensor  # Tensor: [R, 1]
    anchor: Tensor | None  # [R, 1] added inside the product, in its dtype; None: 0 for all
    offset: Tensor  # [R]
    target: Tensor  # [R] L of the target, once `anchored`


def guessed(rows: Rows, logprob: Tensor) -> Tensor:
    """log2 Σ e^l `[R]` of rows whose targets have this log-prob `[R]`."""
    return LOG2E * rows.logit - LOG2E * logprob


def anchored(head: Head, rows: Rows, log_sum: Tensor, *, loose: bool = False) -> Rows:
    """The same rows anchored where log2 Σ e^l is thought to be, `log_sum` [R]. `loose`: where
    products are not rounded and every anchor is small, none is added, which saves a sweep over the
    tile."""
    level, offset = LOG2E * rows.logit, -log_sum
    anchor: Tensor | None
    if head.plain:
        anchor = offset.to(head.dtype)
        if loose and anchor.dtype == offset.dtype and not (anchor.abs() > LOOSE_LIMIT).any():
            anchor, offset = None, torch.zeros_like(offset)
        else:
            offset = anchor.to(offset.dtype)
    else:
        anchor = LN2 * (level + offset) / column(rows.inv_temperature) - rows.raw
        anchor = anchor.to(head.dtype)
    return replace(
        rows,
        anchor=None if anchor is None else anchor[:, None],
        offset=offset,
        target=level + offset,
    )


def subset(rows: Rows, index: Tensor | slice) -> Rows:
    """Rows `index` of a block."""
    scale = rows.inv_temperature
    return Rows(
        tuple(x[index] for x in rows.xs),
        rows.column[index],
        rows.raw[index],
        rows.logit[index],
        scale[index] if isinstance(scale, Tensor) else scale,
        None if rows.anchor is None else rows.anchor[index],
        rows.offset[index],
        rows.target[index],
    )
