"""A profile of a few steps: what each region took, what the machine allows, and what to turn.

    runs/NAME/profile/profile.json     regions of each step with their floors; machine, versions
    runs/NAME/profile/trace.json.gz    every span: see `trace`

A region's *floor* is the time in which this machine could do what the region did: its operations at
the rate of large matrix products, its bytes at that of large copies, its tool calls at that of
empty programs in the sandbox, whichever takes longest. It is 0 where none of these is known.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from elpo_fast.regions import CLOCK, Event, Total
from elpo_fast.train.costs import Costs
from elpo_fast.train.limits import Limits
from elpo_fast.train.trace import STEPS, device_events, write_trace

FOLDER, FILE, TRACE = "profile", "profile.json", "trace.json.gz"

TURN = {
    "prefill": "raise rollout.cache_tokens, that prompts are found in the cache",
    "decode": "raise rollout.trees_in_flight and rollout.max_batch, that each pass over the "
    "weights serves more rows",
    "sampling": "leave out rollout.top_p, rollout.top_k and rollout.min_p, which sort or count "
    "the vocabulary",
    "batching": "raise rollout.max_batch, that a step of the engine serves more rows",
    "tool": "raise rollout.trees_in_flight, that others decode meanwhile, or tools.workers",
    "grading": "raise rollout.trees_in_flight, that others decode meanwhile, or lower "
    "task.reward_timeout_s",
    "waiting": "raise rollout.trees_in_flight, that the engine always has something to do",
    "chat": "raise rollout.trees_in_flight, that the engine always has something to do",
    "planning": "raise rollout.trees_in_flight, that the engine always has something to do",
    "scoring": "lower algo.n_total or train.tasks_per_step",
    "packing": "raise train.micro_batch_tokens, that fewer batches are put together",
    "forward": "raise train.micro_batch_tokens, set model.compile=true or model.dtype=auto",
    "loss": "raise train.micro_batch_tokens, that the head is read more rarely",
    "backward": "raise train.micro_batch_tokens, set model.compile=true or model.dtype=auto",
    "optimizer": "lower train.updates_per_step, or set train.optimizer=adamw8bit or model.lora",
    "weight_sync": "set rollout.sglang.weight_sync=tensor or model.lora, or train longer on each "
    "step: train.tasks_per_step",
    "checkpoint": "raise train.checkpoint_every",
    "trees": "lower algo.n_total or train.tasks_per_step",
    "saving": "set train.save_trees=false, or run.dir to a faster disk",
}
"""Which key helps against a region."""


@dataclass
class _Step:
    number: int
    seconds: float
    totals: Mapping[str, Total]
    device: dict[str, float] = field(default_factory=dict)


class Profiler:
    """Records the steps that it is told of, one after the other, and keeps what they did."""

    def __init__(self, steps: Collection[int], device: torch.device) -> None:
        self._wanted, self._device = frozenset(steps), device
        self._steps: list[_Step] = []
        self._events: list[Event] = []
        self._stack = ExitStack()
        self._torch: Any = None
        CLOCK.events = None  # of a run that was stopped

    def begin(self, step: int) -> None:
        """From now on, where the step is wanted, spans are recorded."""
        if step in self._wanted:
            CLOCK.events = []
            if self._device.type == "cuda":
                # The device's activity alone: the host's would cost more than what is measured.
                self._torch = self._stack.enter_context(
                    torch_profile(activities=[ProfilerActivity.CUDA])
                )

    def end(self, step: int, seconds: float, totals: Mapping[str, Total]) -> None:
        """The step is over; `seconds` and `totals` as `Clock.take` says them."""
        if step not in self._wanted:
            return
        ended, recorded, CLOCK.events = CLOCK.began, CLOCK.events or [], None
        done, began = _Step(step, seconds, totals), ended - seconds
        if self._torch is not None:
            torch.cuda.synchronize()
            self._stack.close()
            found, waits = device_events(_exported(self._torch))
            recorded += found
            updates = totals["backward"].calls if "backward" in totals else 0
            busy = _union(found)
            done.device = {
                "busy": busy,
                "idle": max(0.0, 1 - busy / seconds),
                "waits": waits,
                "waits_per_micro_batch": waits / max(updates, 1),
            }
            self._torch = None
        self._steps.append(done)
        # An evaluation may come before a step begins.
        self._events += [event for event in recorded if event.ended > began]
        self._events.append(Event(f"step {step}", STEPS, began, ended, "", {}))

    def complete(self, step: int, last: int) -> bool:
        """Whether there is something to write after this step, of a run that ends with `last`."""
        return bool(self._steps) and not any(step < other <= last for other in self._wanted)

    def write(self, folder: Path, costs: Costs, width: int, limits: Limits, name: str) -> Path:
        """Write all that was recorded into a run's folder; the folder of the profile."""
        folder = folder / FOLDER
        folder.mkdir(exist_ok=True)
        steps = [
            {
                "step": step.number,
                "seconds": step.seconds,
                "device": step.device,
                "regions": {
                    region: {
                        **asdict(total),
                        "flops": costs.flops(region, total),
                        "bytes": costs.bytes(region, total, width),
                        "floor": floor(region, total, costs, width, limits),
                    }
                    for region, total in step.totals.items()
                },
            }
            for step in self._steps
        ]
        written = {"name": name, **machine(self._device), "limits": asdict(limits), "steps": steps}
        (folder / FILE).write_text(json.dumps(written, indent=1), encoding="utf-8")
        write_trace(self._events, folder / TRACE)
        self._steps, self._events = [], []
        return folder


def floor(name: str, total: Total, costs: Costs, width: int, limits: Limits) -> float:
    """Seconds in which this machine could do at least what a region did; 0: not known."""
    least = [
        costs.flops(name, total) / limits.products,
        costs.bytes(name, total, width) / limits.memory,
    ]
    if name == "tool" and limits.forks:
        least.append(total.calls / limits.forks)
    return max(least)


def machine(device: torch.device) -> dict[str, Any]:
    """Where something was measured, with what, and of which commit."""
    models: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "machine": {
            "system": platform.platform(),
            "processor": models[0] if models else platform.machine(),
            "cores": cores,
            "gpu": gpu,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("elpo-fast", "torch", "transformers", "numba")},
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the source, where it is a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return None


def _exported(profiler: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return trace


def _union(events: Collection[Event]) -> float:
    """Seconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.began):
        total += max(0.0, event.ended - max(until, event.began))
        until = max(until, event.ended)
    return total
