"""Where the time of a step goes: named regions, always on.

    with region("packing"):
        ...

Every moment of a run belongs to one region: of those that are open the one with the highest rank
in `REGIONS`, and of these the last opened. So the `seconds` of all regions add up to the wall time
in which any was open, however many threads and tool calls run at once: a tool call that is hidden
behind decoding has none, `Total.covered` tells that it ran. What a region did (tokens, attended
pairs, rows of logits, passes over the weights) is counted by who does it, and priced elsewhere.

On a GPU the host only launches. There the time of the trainer's regions is divided as the device
took it (`Device`), and each span is marked for the profilers that look at the device.

Invariants: a span costs microseconds and waits for nothing; spans may be opened in any thread and
held across `await`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Any, NamedTuple, Protocol

TRAINER, ENGINE, COLLECTOR, TOOLS = "trainer", "engine", "collector", "tools"


class Kind(NamedTuple):
    """Who works in a region, and which region a moment belongs to where several are open."""

    track: str
    rank: int


REGIONS: Mapping[str, Kind] = {
    # what an update computes
    **dict.fromkeys(("forward", "loss", "backward", "optimizer"), Kind(TRAINER, 6)),
    # around it: rewards and advantages, micro-batches, arrays of trees, files
    **dict.fromkeys(("scoring", "packing", "trees", "saving"), Kind(TRAINER, 6)),
    **dict.fromkeys(("weight_sync", "checkpoint"), Kind(TRAINER, 6)),
    # the engine: what it computes, and the order it makes
    **dict.fromkeys(("prefill", "decode", "sampling", "batching"), Kind(ENGINE, 5)),
    # planners, chat template and growing trees, while neither of these works
    "planning": Kind(COLLECTOR, 4),
    "chat": Kind(COLLECTOR, 3),
    "tool": Kind(TOOLS, 2),
    "grading": Kind(TOOLS, 1),
    # for any of these, while collecting
    "waiting": Kind(COLLECTOR, 0),
}
COMPUTED = ("forward", "loss", "backward", "optimizer")
"""What a device computes for the trainer."""


@dataclass(slots=True)
class Total:
    """One region over a while. Counts are those that its spans state."""

    seconds: float = 0.0  # wall time that is its own
    busy: float = 0.0  # of all its spans, each counted
    covered: float = 0.0  # in which at least one tool call was open; of tools alone
    calls: int = 0
    tokens: float = 0  # computed
    pairs: float = 0  # of a token and one that it attends to
    rows: float = 0  # multiplied with the head, or sampled from
    passes: float = 0  # over all weights

    def minus(self, other: Total) -> Total:
        return Total(*(getattr(self, x) - getattr(other, x) for x in _FIELDS))

    def copy(self) -> Total:
        return Total(*(getattr(self, x) for x in _FIELDS))


_FIELDS = tuple(field.name for field in fields(Total))


class Event(NamedTuple):
    """One span of a trace, in seconds of `perf_counter`."""

    name: str
    track: str
    began: float
    ended: float
    detail: str
    counts: Mapping[str, float]


class Device(Protocol):
    """Marks on a device's own clock."""

    def enter(self, name: str) -> Any:
        """Begin a range; what it returns ends it."""

    def exit(self, mark: Any) -> None: ...

    def turn(self, name: str | None) -> None:
        """What is launched from now on belongs to this region."""

    def seconds(self) -> Mapping[str, float]:
        """Of each region since the last call; waits for the device."""


class Span:
    """One stay in a region, as a context manager."""

    __slots__ = ("_clock", "_mark", "began", "counts", "detail", "kind", "name", "parts", "seconds")

    def __init__(self, clock: Clock, name: str, detail: str, counts: dict[str, float]) -> None:
        self._clock, self.name, self.detail, self.counts = clock, name, detail, counts
        self.kind = REGIONS[name]
        self.seconds = self.began = 0.0
        self.parts: dict[str, dict[str, float]] = {}
        self._mark: Any = None

    def shares(self, name: str, **counts: float) -> None:
        """Part of the span is another region's: as much of its time as of their `tokens`."""
        self.parts[name] = counts

    def __enter__(self) -> Span:
        self._clock._enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._clock._exit(self)


class Clock:
    """The regions of one process. `events`: where spans are recorded, or `None`; `began`: when
    `take` was called last."""

    def __init__(self) -> None:
        self.events: list[Event] | None = None
        self.device: Device | None = None
        self._lock = threading.Lock()
        self._totals = {name: Total() for name in REGIONS}
        self._before = {name: Total() for name in REGIONS}
        tools = (name for name, kind in REGIONS.items() if kind.track == TOOLS)
        self._open: dict[str, tuple[int, float]] = dict.fromkeys(tools, (0, 0.0))
        self._spans: list[dict[Span, None]] = [{} for _ in range(7)]  # by rank, in order
        self._top: Span | None = None
        self._since = self.began = perf_counter()

    def span(self, name: str, detail: str = "", /, **counts: float) -> Span:
        """A stay in the region `name`, to be entered once; `detail` is shown in traces."""
        return Span(self, name, detail, counts)

    def note(self, name: str, track: str, began: float, detail: str) -> None:
        """Record an event that ends now and is no region."""
        if self.events is not None:
            self.events.append(Event(name, track, began, perf_counter(), detail, {}))

    def take(self) -> tuple[float, dict[str, Total]]:
        """Seconds since the last call, and what regions took of them, those that were entered."""
        device = self.device.seconds() if self.device else {}
        with self._lock:
            now = perf_counter()
            self._turn(now)
            passed, self.began = now - self.began, now
            taken = {name: total.minus(self._before[name]) for name, total in self._totals.items()}
            self._before = {name: total.copy() for name, total in self._totals.items()}
        _divide(taken, device)
        return passed, {name: total for name, total in taken.items() if total.calls}

    def _enter(self, span: Span) -> None:
        if self.device and span.kind.track in (TRAINER, ENGINE):
            span._mark = self.device.enter(span.name)
        with self._lock:
            now = span.began = perf_counter()
            self._spans[span.kind.rank][span] = None
            if self._top is None or span.kind.rank >= self._top.kind.rank:
                self._turn(now)
                self._top = span
            if span.kind.track == TOOLS:
                count, since = self._open[span.name]
                self._open[span.name] = (count + 1, since if count else now)
        if self.device:
            self._turned(self.device, span)

    def _exit(self, span: Span) -> None:
        with self._lock:
            now = perf_counter()
            del self._spans[span.kind.rank][span]
            if span is self._top:
                self._turn(now)
                self._top = self._next()
            if span.kind.track == TOOLS:
                count, since = self._open[span.name]
                self._open[span.name] = (count - 1, since)
                if count == 1:
                    self._totals[span.name].covered += now - since
            if span.parts:
                self._share(span, now - span.began)
            else:
                self._count(span.name, span.counts, span.seconds, now - span.began)
        if self.events is not None:
            event = Event(
                "+".join((span.name, *span.parts)),
                span.kind.track,
                span.began,
                now,
                span.detail,
                span.counts,
            )
            self.events.append(event)
        if self.device:
            self._turned(self.device, span)
            if span._mark is not None:
                self.device.exit(span._mark)

    def _turn(self, now: float) -> None:
        """What passed since the last turn was the top span's."""
        if self._top is not None:
            self._top.seconds += now - self._since
        self._since = now

    def _turned(self, device: Device, span: Span) -> None:
        if span.kind.track == TRAINER:
            top = self._top
            device.turn(top.name if top and top.name in COMPUTED else None)

    def _next(self) -> Span | None:
        for spans in reversed(self._spans):
            if spans:
                return next(reversed(spans))
        return None

    def _share(self, span: Span, busy: float) -> None:
        parts = {span.name: span.counts, **span.parts}
        tokens = sum(counts["tokens"] for counts in parts.values())
        for name, counts in parts.items():
            share = counts["tokens"] / tokens
            self._count(name, counts, share * span.seconds, share * busy)

    def _count(self, name: str, counts: Mapping[str, float], seconds: float, busy: float) -> None:
        total = self._totals[name]
        total.seconds += seconds
        total.busy += busy
        total.calls += 1
        for what, number in counts.items():
            setattr(total, what, getattr(total, what) + number)


def _divide(taken: Mapping[str, Total], device: Mapping[str, float]) -> None:
    """Divide the time of what a device computed as the device took it."""
    whole = sum(device.values())
    if not whole:
        return
    seconds = sum(taken[name].seconds for name in COMPUTED)
    for name in COMPUTED:
        taken[name].seconds = seconds * device.get(name, 0.0) / whole


CLOCK = Clock()
"""This process's."""
region = CLOCK.span
