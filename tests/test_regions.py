"""Regions divide wall time: what is open at once, nested, shared, hidden, and on a device."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest

from elpo_fast import regions
from elpo_fast.regions import Clock


class Time:
    """A clock that goes by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(regions, "perf_counter", time)
    return time


def test_a_moment_belongs_to_the_highest_rank_that_is_open(time: Time) -> None:
    clock = Clock()
    with clock.span("waiting"):
        time.now += 1
        with clock.span("tool"):
            time.now += 2
            with clock.span("decode"):
                time.now += 4
            other = clock.span("tool")
            other.__enter__()
            time.now += 8
        time.now += 16
        other.__exit__()
    time.now += 32
    passed, totals = clock.take()
    assert passed == 63
    assert {name: total.seconds for name, total in totals.items()} == {
        "waiting": 1,
        "tool": 26,
        "decode": 4,
    }
    assert totals["tool"].covered == 30, "4 of these hidden behind decoding"
    assert totals["tool"].busy == 14 + 24 and totals["tool"].calls == 2
    assert clock.take() == (0, {})


def test_nested_spans_of_one_rank_exclude_each_other(time: Time) -> None:
    clock = Clock()
    with clock.span("forward"):
        time.now += 1
        with clock.span("loss", rows=3):
            time.now += 2
        time.now += 4
    _, totals = clock.take()
    assert (totals["forward"].seconds, totals["loss"].seconds) == (5, 2)
    assert (totals["forward"].busy, totals["loss"].rows) == (7, 3)


def test_a_span_shared_by_two_regions_is_divided_by_their_tokens(time: Time) -> None:
    clock = Clock()
    with clock.span("decode", tokens=1, passes=1) as span:
        span.shares("prefill", tokens=3, pairs=9)
        time.now += 4
    _, totals = clock.take()
    assert (totals["decode"].seconds, totals["prefill"].seconds) == (1, 3)
    assert (totals["decode"].passes, totals["prefill"].pairs) == (1, 9)


def test_what_is_open_when_a_step_ends_counts_when_it_ends_itself(time: Time) -> None:
    clock = Clock()
    with clock.span("packing"):
        time.now += 1
        assert clock.take() == (1, {})
        time.now += 1
    assert clock.take()[1]["packing"].seconds == 2


def test_time_that_an_exception_ends_counts(time: Time) -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="no"), clock.span("grading"):
        time.now += 1
        raise ValueError("no")
    with clock.span("waiting"):
        time.now += 1
    _, totals = clock.take()
    assert totals["grading"].seconds == totals["waiting"].seconds == 1


def test_spans_of_many_threads_add_up() -> None:
    clock = Clock()

    def work(name: str) -> None:
        for _ in range(300):
            with clock.span(name, tokens=1), clock.span("sampling"):
                pass

    names = ["forward", "decode", "tool", "planning"]
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    with clock.span("waiting"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    passed, totals = clock.take()
    assert [totals[name].tokens for name in names] == [300] * 4
    assert totals["sampling"].calls == 1200
    assert sum(total.seconds for total in totals.values()) <= passed
    assert sum(total.seconds for total in totals.values()) >= 0.9 * totals["waiting"].busy


class Marks:
    """A device on which the backward takes three quarters."""

    def __init__(self) -> None:
        self.turns: list[str | None] = []
        self.open: list[str] = []

    def enter(self, name: str) -> Any:
        self.open.append(name)
        return name

    def exit(self, mark: Any) -> None:
        assert self.open.pop() == mark

    def turn(self, name: str | None) -> None:
        self.turns.append(name)

    def seconds(self) -> Mapping[str, float]:
        return {"forward": 1.0, "backward": 3.0}


def test_a_device_divides_what_the_host_only_launched(time: Time) -> None:
    clock, marks = Clock(), Marks()
    clock.device = marks
    with clock.span("packing"):
        time.now += 10
    with clock.span("forward"):
        time.now += 1
        with clock.span("loss"):
            pass
    with clock.span("backward"):
        time.now += 1
    with clock.span("optimizer"):  # waits for the device
        time.now += 6
    _, totals = clock.take()
    seconds = {name: total.seconds for name, total in totals.items()}
    assert seconds == {"packing": 10, "forward": 2, "loss": 0, "backward": 6, "optimizer": 0}
    assert marks.turns == [
        *(None, None),  # packing is the host's
        *("forward", "loss", "forward", None),
        *("backward", None, "optimizer", None),
    ]
    assert not marks.open


def test_spans_are_recorded_where_they_are_asked_for(time: Time) -> None:
    clock = Clock()
    with clock.span("tool", "python"):
        pass
    clock.events = []
    with clock.span("tool", "python"):
        time.now += 1
    clock.note("trajectory", "trajectories", 100.0, "a task")
    assert [(e.name, e.track, e.began, e.ended, e.detail) for e in clock.events] == [
        ("tool", "tools", 100.0, 101.0, "python"),
        ("trajectory", "trajectories", 100.0, 101.0, "a task"),
    ]
