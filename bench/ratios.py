"""Two ways of doing the same work, timed in turns in one process.

Their times are the process's CPU seconds, which a busy neighbour does not change much, and only
their ratio says anything: that of a test holds on every machine, a time does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def ratio(
    ours: Callable[[], object], plain: Callable[[], object], rounds: int = 3
) -> tuple[float, float, float]:
    """CPU seconds of `ours` over those of `plain`: the least of a round's ratios, their median, the
    most. Each runs once before."""

    def seconds(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    ours(), plain()
    found = sorted(seconds(ours) / seconds(plain) for _ in range(rounds))
    return found[0], statistics.median(found), found[-1]


def hold(
    ours: Callable[[], object],
    plain: Callable[[], object],
    at_most: float,
    *,
    rounds: int = 3,
) -> None:
    """Raise `AssertionError` where `ours` takes more than `at_most` of what `plain` takes."""
    low, median, high = ratio(ours, plain, rounds)
    if median > at_most:
        raise AssertionError(
            f"takes {median:.2f} ({low:.2f} - {high:.2f}) of the plain way's time, "
            f"at most {at_most:g} is allowed"
        )
