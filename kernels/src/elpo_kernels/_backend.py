"""Choice of the backend; asking for one that cannot run raises."""

from __future__ import annotations

import functools
import logging

import torch

from elpo_kernels._engine import Tiles
from elpo_kernels._head import Head
from elpo_kernels._torch_tiles import TorchTiles

logger = logging.getLogger("elpo_kernels")

BACKENDS = ("auto", "torch")


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs: `auto` picks by device and logs its choice once."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    return _automatic(device.type) if backend == "auto" else backend


@functools.cache
def _automatic(device_type: str) -> str:
    chosen = "torch"
    logger.info("backend for %s tensors: %s", device_type, chosen)
    return chosen


def make_tiles(head: Head, backend: str) -> Tiles:
    """Tile arithmetic of the resolved `backend`."""
    return TorchTiles(head)
