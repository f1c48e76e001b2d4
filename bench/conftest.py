"""What every recorded result says about where it was measured."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["cores"] = len(os.sched_getaffinity(0))
    machine_info["threads"] = os.environ.get("OMP_NUM_THREADS", "all")
    machine_info["versions"] = {
        name: version(name) for name in ("torch", "transformers", "numba", "triton", "numpy")
    }
