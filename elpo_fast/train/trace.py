"""A trace in Chrome's format, which Perfetto (ui.perfetto.dev) and chrome://tracing draw.

Tracks: the steps, the trainer, the engine, the collector, tool calls and grading, trajectories, and
a GPU's streams. Spans of one thread of work lie in each other; tool calls and trajectories that
overlap lie side by side, in as many lanes as it takes.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elpo_fast.regions import COLLECTOR, ENGINE, TOOLS, TRAINER, Event

STEPS, TRAJECTORIES, GPU = "steps", "trajectories", "gpu"
TRACKS = (STEPS, TRAINER, ENGINE, COLLECTOR, TOOLS, TRAJECTORIES, GPU)
_APART = (TOOLS, TRAJECTORIES)  # what overlaps there is not within one another
_LANES = 10_000  # at most, of one track
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def device_events(trace: dict[str, Any]) -> tuple[list[Event], int]:
    """What a GPU did, from a trace of PyTorch's profiler, in seconds of `perf_counter`, and how
    often the host waited for it."""
    # Its times count from a moment that it says in Unix time.
    offset = trace["baseTimeNanoseconds"] / 1e9 - (time.time() - time.perf_counter())
    found, waits = [], 0
    for event in trace["traceEvents"]:
        if event.get("cat") in _DEVICE:
            began = offset + event["ts"] / 1e6
            ended, stream = began + event["dur"] / 1e6, f"stream {event['tid']}"
            found.append(Event(event["name"], GPU, began, ended, stream, {}))
        waits += event.get("cat") == "cuda_runtime" and "Synchronize" in event["name"]
    return found, waits


def write_trace(events: Iterable[Event], path: Path) -> None:
    """Write the events, from the earliest on, as compressed JSON."""
    ordered = sorted(events, key=lambda event: (event.began, -event.ended))
    zero = ordered[0].began if ordered else 0.0
    records: list[dict[str, Any]] = []
    for number, track in enumerate(TRACKS):
        mine = [event for event in ordered if event.track == track]
        lanes = _lanes(mine, apart=track in _APART)
        for lane in sorted(set(lanes)):
            tid = number * _LANES + lane
            name = f"{track} {lane}" if lane else track
            if track == GPU:
                name = f"gpu {mine[lanes.index(lane)].detail}"
            for what, args in (
                ("thread_name", {"name": name}),
                ("thread_sort_index", {"sort_index": tid}),
            ):
                records.append({"ph": "M", "pid": 1, "tid": tid, "name": what, "args": args})
        for event, lane in zip(mine, lanes, strict=True):
            records.append(
                {
                    "ph": "X",
                    "pid": 1,
                    "tid": number * _LANES + lane,
                    "cat": track,
                    "name": event.name,
                    "ts": round(1e6 * (event.began - zero), 3),
                    "dur": round(1e6 * (event.ended - event.began), 3),
                    "args": {"detail": event.detail, **event.counts},
                }
            )
    text = json.dumps({"traceEvents": records, "displayTimeUnit": "ms"})
    path.write_bytes(gzip.compress(text.encode("utf-8")))


def _lanes(events: Sequence[Event], *, apart: bool) -> list[int]:
    """The lane of each event, the first in which it overlaps nothing, or, unless `apart`, lies
    within what it overlaps. Streams of a GPU have one each."""
    lanes: list[list[float]] = []  # when the spans end that are open there
    streams: dict[str, int] = {}

    def free(ends: list[float], event: Event) -> bool:
        while ends and ends[-1] <= event.began:
            ends.pop()
        return not ends or (not apart and event.ended <= ends[-1])

    def lane_of(event: Event) -> int:
        if event.track == GPU:
            return streams.setdefault(event.detail, len(streams))
        lane = next((i for i, ends in enumerate(lanes) if free(ends, event)), len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append(event.ended)
        return lane

    return [lane_of(event) for event in events]
