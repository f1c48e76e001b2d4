"""The blocks of the attention matrix that each Triton kernel takes at once, by chip.

No Triton here: the public function looks them up before anything is compiled or interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """Block of the attention matrix of one program, and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """One tile for each kernel."""

    forward: Tile
    query: Tile
    key: Tile

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows and columns of each."""
        return tuple(
            n for tile in (self.forward, self.query, self.key) for n in (tile.rows, tile.columns)
        )


# float32 is for checks: small tiles that compile without spills everywhere.
EXACT = {
    (4, 64): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    (4, 128): Tiles(*[Tile(16, 16, 4, 1)] * 3),
}
# Those that run: by chip, then by bytes of an element and head dimension; `aot` compiles every one.
TILES: dict[str, dict[tuple[int, int], Tiles]] = {
    "sm_80": {  # within the 99 KiB that the smaller cards of its kind have
        (2, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2)),
        (2, 128): Tiles(Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        (2, 256): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 2)),
        **EXACT,
    },
    "sm_90": {
        (2, 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        (2, 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        (2, 256): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        **EXACT,
    },
    "sm_100": {
        (2, 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        (2, 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
        (2, 256): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 2)),
        **EXACT,
    },
    "gfx942": {
        (2, 64): Tiles(Tile(128, 64, 4, 1), Tile(128, 64, 4, 1), Tile(64, 64, 4, 1)),
        (2, 128): Tiles(Tile(128, 64, 8, 1), Tile(128, 32, 8, 1), Tile(32, 64, 4, 1)),
        (2, 256): Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        **EXACT,
    },
}


# What a measurement decides between, for two-byte elements: by chip, head dimension and kernel.
# What `TILES` has is among them. All fit the shared memory; a larger tile may be worth some spills.
CANDIDATES: dict[str, dict[int, dict[str, tuple[Tile, ...]]]] = {
    "sm_80": {
        64: {
            "forward": (Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2)),
            "query": (Tile(128, 32, 8, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
            "key": (Tile(32, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 128, 8, 2)),
        },
        128: {
            "forward": (Tile(128, 32, 8, 3), Tile(128, 64, 8, 2)),
            "query": (Tile(64, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 32, 8, 2)),
            "key": (Tile(32, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
        },
        256: {"key": (Tile(32, 32, 8, 2), Tile(16, 64, 8, 2))},
    },
    "sm_90": {
        64: {
            "forward": (Tile(128, 64, 4, 3), Tile(128, 128, 4, 3), Tile(128, 128, 8, 3)),
            "query": (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
            "key": (Tile(64, 128, 8, 3), Tile(64, 64, 4, 3), Tile(128, 128, 8, 2)),
        },
        128: {
            "forward": (Tile(128, 64, 8, 3), Tile(128, 128, 8, 2)),
            "query": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
            "key": (Tile(32, 128, 8, 2), Tile(64, 128, 8, 3), Tile(64, 64, 4, 2)),
        },
        256: {
            "forward": (Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
            "key": (Tile(32, 32, 8, 2), Tile(16, 64, 8, 2)),
        },
    },
    "sm_100": {
        64: {
            "forward": (Tile(128, 64, 4, 3), Tile(128, 128, 8, 3)),
            "query": (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
            "key": (Tile(64, 128, 8, 3), Tile(64, 64, 4, 3)),
        },
        128: {
            "forward": (Tile(128, 64, 8, 3), Tile(128, 128, 8, 2)),
            "query": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3)),
            "key": (Tile(64, 64, 8, 1), Tile(32, 128, 8, 2), Tile(64, 128, 8, 3)),
        },
    },
    "gfx942": {
        64: {
            "forward": (Tile(128, 64, 4, 1), Tile(128, 64, 4, 2), Tile(128, 128, 4, 1)),
            "query": (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), Tile(128, 64, 8, 1)),
            "key": (Tile(64, 64, 4, 1), Tile(64, 128, 4, 1)),
        },
        128: {
            "forward": (Tile(128, 64, 8, 1), Tile(128, 64, 4, 1)),
            "query": (Tile(128, 32, 8, 1), Tile(64, 64, 4, 1)),
            "key": (Tile(32, 64, 4, 1), Tile(64, 64, 4, 1)),
        },
    },
}


def tiles(device: torch.device, dtype: torch.dtype, dim: int) -> Tiles:
    """The tiles for a head dimension; `ValueError` where none are shipped."""
    found = TILES[chip(device)].get((dtype.itemsize, _padded(dim)))
    if found is None:
        most = 128 if dtype == torch.float32 else 256
        raise ValueError(
            f"backend 'triton' takes {dtype} head dimensions up to {most}, got {dim}; use 'torch'"
        )
    return found


def candidates(device: torch.device, dim: int) -> list[tuple[str, Tile]]:
    """Kernels (fields of `Tiles`) and tiles worth timing here for a head dimension."""
    found = CANDIDATES[chip(device)].get(_padded(dim), {})
    return [(kernel, tile) for kernel, some in found.items() for tile in some]


@contextmanager
def trial(
    device: torch.device, dtype: torch.dtype, dim: int, kernel: str, tile: Tile
) -> Iterator[None]:
    """Within the block a kernel takes another tile than that of `TILES`."""
    of_chip, key = TILES[chip(device)], (dtype.itemsize, _padded(dim))
    own = of_chip[key]
    of_chip[key] = replace(own, **{kernel: tile})
    try:
        yield
    finally:
        of_chip[key] = own


def _padded(dim: int) -> int:
    """By comparisons alone, which a compiler of the caller settles when it traces them."""
    for size in (64, 128):
        if dim <= size:
            return size
    return 256 if dim <= 256 else dim


@torch.compiler.assume_constant_result
def chip(device: torch.device) -> str:
    """Name of the row of `TILES`. Chips without one of their own take the smallest tiles."""
    if device.type != "cuda":  # the interpreter
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    own = {9: "sm_90", 10: "sm_100"}
    return own.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def precision(chip: str) -> str:
    """Three products of TF32 halves come close to float32 and run on tensor cores."""
    return "ieee" if chip == "gfx942" else "tf32x3"
