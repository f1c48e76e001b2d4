"""The whole loop, as `elpo train` runs it: a cold start and two steps of the tiny tier, from its
configuration to the exported model.

    pytest bench/bench_loop.py --benchmark-only
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from elpo_fast.config import load_config
from elpo_fast.train.loop import train

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SMALL = ["sft.demonstrations=32", "train.tasks_per_step=4", "algo.n_total=4"]
FULL = ["sft.demonstrations=256"]
STEPS = 2


def test_loop(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    size = SMALL if os.environ.get("ELPO_BENCH") == "small" else FULL
    keys = ["sft.epochs=1", f"train.steps={STEPS}", "eval.tasks=0", f"run.dir={tmp_path}", *size]
    numbers = itertools.count()

    def run() -> Path:
        return train(load_config(TINY, [*keys, f"run.name=run{next(numbers)}"]))

    folder = benchmark.pedantic(run, rounds=1 if size is SMALL else 3, warmup_rounds=1)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["phase"] == "rl"]
    assert len(steps) == STEPS and (folder / "model" / "model.safetensors").is_file()
    regions = {name: value for name, value in steps[-1].items() if name.startswith("time/")}
    benchmark.extra_info["last_step"] = regions
