"""What regions cost where they are densest: in the engine, three spans a step.

pytest bench/bench_regions.py --benchmark-only
"""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from elpo_fast.regions import Clock


def test_spans_of_an_engines_step(benchmark: BenchmarkFixture) -> None:
    clock = Clock()

    def step() -> None:
        for _ in range(3):
            with clock.span("decode", tokens=1, pairs=1, rows=1, passes=1):
                pass

    benchmark(step)
    assert clock.take()[1]["decode"].calls >= 3
