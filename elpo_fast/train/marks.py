"""Regions on a GPU's own clock: CUDA events between the trainer's, NVTX ranges and profiler marks
around each span."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch.profiler import record_function


class CudaMarks:
    """`regions.Device` of the current GPU and stream."""

    def __init__(self) -> None:
        self._turns: list[tuple[torch.cuda.Event, str | None]] = []

    def enter(self, name: str) -> record_function:
        torch.cuda.nvtx.range_push(name)
        mark = record_function(name)
        mark.__enter__()
        return mark

    def exit(self, mark: record_function) -> None:
        mark.__exit__(None, None, None)
        torch.cuda.nvtx.range_pop()

    def turn(self, name: str | None) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._turns.append((event, name))

    def seconds(self) -> Mapping[str, float]:
        found: dict[str, float] = {}
        if self._turns:
            self._turns[-1][0].synchronize()
        for (begins, name), (ends, _) in pairwise(self._turns):
            if name is not None:
                found[name] = found.get(name, 0.0) + begins.elapsed_time(ends) / 1e3
        self._turns = self._turns[-1:]  # what is open goes on
        return found
