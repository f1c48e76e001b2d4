"""One part of `bench.gpu`: its rows, its faults, its clock."""

from __future__ import annotations

import gc
import gzip
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

GIB = 1 << 30
LEAST_ROUNDS = 3
QUEUE_CYCLES = 20_000_000  # about 10 ms: longer than the host takes to launch an attention


class Part:
    """Rows and faults go to `out` as they come. `tiny`: on a CPU, for the code's sake. `ahead`:
    everything once, to compile it; what it yields is thrown away."""

    def __init__(self, out: Path, seconds: float, *, tiny: bool, ahead: bool) -> None:
        self.tiny, self.ahead = tiny, ahead
        self.device = "cpu" if tiny else "cuda"
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.rounds = 1 if tiny or ahead else 7
        self.out, self.deadline = out, time.perf_counter() + seconds
        self.rows: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self._write()

    def row(self, line: str, **values: Any) -> None:
        """`line`: what a person reads of it."""
        self.rows.append({"line": line, **values})
        self._write()

    def fault(self, text: str) -> None:
        self.faults.append(text)
        self._write()

    def _write(self) -> None:
        self.out.write_text(json.dumps({"rows": self.rows, "faults": self.faults}))

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.perf_counter()

    def attempt(self, what: str, do: Callable[[], Any]) -> Any:
        """The result, or None where it fails: that is noted, and the others go on."""
        if self.left < 0:
            self.fault(f"{what}: not begun, time was up")
            return None
        try:
            return do()
        except Exception as error:
            traceback.print_exc()
            self.fault(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if not self.tiny:
                gc.collect()
                torch.cuda.empty_cache()
            return None

    def clock(self, do: Callable[[], Any], *, queued: bool = False) -> float:
        """Milliseconds. `queued`: without the host's time, which launches while the GPU waits."""
        if self.tiny:
            began = time.perf_counter()
            do()
            return 1e3 * (time.perf_counter() - began)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if queued:
            torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        do()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    def interleaved(
        self,
        what: str,
        variants: dict[str, Callable[[], Any]],
        *,
        warmup: int = 2,
        rounds: int | None = None,
        seconds: float = math.inf,
        queued: bool = False,
    ) -> dict[str, list[float]]:
        """Milliseconds of each variant that runs, by round. No round begins when `seconds` are up
        and there are `LEAST_ROUNDS`, or the part's are and there is one."""
        live = dict(variants)
        times: dict[str, list[float]] = {name: [] for name in variants}
        until = time.perf_counter() + seconds
        warmup = 0 if self.tiny or self.ahead else warmup
        for number in range(-warmup, min(self.rounds, rounds or self.rounds)):
            late = time.perf_counter() > until
            if (number >= LEAST_ROUNDS and late) or (number >= 1 and self.left < 0):
                break
            for name in list(live):
                took = self.attempt(
                    f"{what} {name}", partial(self.clock, live[name], queued=queued)
                )
                if took is None:
                    del live[name]
                elif number >= 0:
                    times[name].append(took)
        return {name: times[name] for name in live if times[name]}

    def peak(self, do: Callable[[], Any]) -> float:
        """GiB of the GPU's memory at most, while it runs; 0 on a CPU."""
        if self.tiny:
            do()
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        do()
        return torch.cuda.max_memory_allocated() / GIB

    def profiled(self, what: str, do: Callable[[], Any], top: int = 14) -> None:
        """Rows of how long the device works and waits in one call, and on what; on a GPU the trace
        goes beside the parts' folder."""
        kinds = [ProfilerActivity.CPU] + ([] if self.tiny else [ProfilerActivity.CUDA])
        with profile(activities=kinds) as profiler:
            do()
            if not self.tiny:
                torch.cuda.synchronize()
        if not self.tiny:
            file = self.out.parent.parent / f"trace_{what}.json"
            profiler.export_chrome_trace(str(file))
            file.with_suffix(".json.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
        events = profiler.events() or []
        spans = sorted(
            (e.time_range.start, e.time_range.end, e.name)
            for e in events
            if e.device_type == DeviceType.CUDA and not e.is_user_annotation
        )
        waits = sum("Synchronize" in event.name for event in events)
        by_name: dict[str, list[float]] = {}
        for start, end, name in spans:
            by_name.setdefault(name, []).append((end - start) / 1e3)
        busy = sum(map(sum, by_name.values()))
        span = (spans[-1][1] - spans[0][0]) / 1e3 if spans else 0.0
        self.row(
            f"{what} traced: {len(spans)} kernels work {busy:.1f} of {span:.1f} ms; {waits} waits",
            kernels=len(spans),
            busy_ms=busy,
            span_ms=span,
            waits=waits,
        )
        for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]:
            line = f"  {sum(times):7.2f} ms in {len(times):4} x {name[:80]}"
            self.row(line, ms=sum(times), calls=len(times))


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def judged(value: float, goal: float, *, least: bool = False) -> str:
    """`value` beside the most, or the least, that it should be."""
    met = value >= goal if least else value <= goal
    return f"{value:.2f} (goal {'≥' if least else '≤'} {goal}{'' if met else ', missed'})"
