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
from dataclasses import dataclass
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

    __slots__ = (
        *("_clock", "_mark", "_track"),
        *("began", "counts", "detail", "name", "parts", "rank", "seconds"),
    )

    def __init__(self, clock: Clock, name: str, detail: str, counts: dict[str, float]) -> None:
        self._clock, self.name, self.detail, self.counts = clock, name, detail, counts
        self._track, self.rank = REGIONS[name]
        self.seconds = 0.0
        self.parts: dict[str, dict[str, float]] | None = None

    def shares(self, name: str, **counts: float) -> None:
        """Part of the span is another region's: as much of its time as of their `tokens`."""
        self.parts = {self.name: self.counts, name: counts}

    def __enter__(self) -> Span:
        clock, rank = self._clock, self.rank
        if clock.device and self._track in (TRAINER, ENGINE):
            self._mark = clock.device.enter(self.name)
        with clock._lock:
            now = self.began = perf_counter()
            clock._spans[rank][self] = None
            current = clock._current
            if current is None or rank >= current.rank:
                if current is not None:
                    current.seconds += now - clock._since
                clock._since, clock._current = now, self
            if self._track == TOOLS:
                clock._cover(self.name, now, 1)
        if clock.device and self._track == TRAINER:
            clock._turned(clock.device)
        return self

    def __exit__(self, *_: object) -> None:
        clock = self._clock
        with clock._lock:
            now = perf_counter()
            del clock._spans[self.rank][self]
            if clock._current is self:
                self.seconds += now - clock._since
                clock._since = now
                highest = next(filter(None, reversed(clock._spans)), {})
                clock._current = next(reversed(highest), None)
            if self._track == TOOLS:
                clock._cover(self.name, now, -1)
            if self.parts is None:
                clock._count(self.name, self.counts, self.seconds, now - self.began)
            else:
                clock._share(self.parts, self.seconds, now - self.began)
        if clock.events is not None:
            name = "+".join(self.parts) if self.parts else self.name
            event = Event(name, self._track, self.began, now, self.detail, self.counts)
            clock.events.append(event)
        if clock.device and self._track in (TRAINER, ENGINE):
            if self._track == TRAINER:
                clock._turned(clock.device)
            clock.device.exit(self._mark)


class Clock:
    """The regions of one process. `events`: where spans are recorded, or `None`; `began`: when
    `take` was called last."""

    def __init__(self) -> None:
        self.events: list[Event] | None = None
        self.device: Device | None = None
        self._lock = threading.Lock()
        self._totals = {name: Total() for name in REGIONS}
        # Open calls of tools and graders, and since when there are any.
        self._calls = {name: (0, 0.0) for name, kind in REGIONS.items() if kind.track == TOOLS}
        # By rank, in the order in which they were opened.
        self._spans: list[dict[Span, None]] = [{} for _ in range(7)]
        self._current: Span | None = None  # whose the present moment is
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
            passed, self.began = now - self.began, now
            taken, self._totals = self._totals, {name: Total() for name in REGIONS}
        _divide(taken, device)
        return passed, {name: total for name, total in taken.items() if total.calls}

    def _turned(self, device: Device) -> None:
        current = self._current
        device.turn(current.name if current and current.name in COMPUTED else None)

    def _cover(self, name: str, now: float, change: int) -> None:
        count, since = self._calls[name]
        self._calls[name] = count + change, since if count else now
        if count + change == 0:
            self._totals[name].covered += now - since

    def _share(self, parts: Mapping[str, dict[str, float]], seconds: float, busy: float) -> None:
        tokens = sum(counts["tokens"] for counts in parts.values())
        for name, counts in parts.items():
            share = counts["tokens"] / tokens
            self._count(name, counts, share * seconds, share * busy)

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
