"""Where the time of each step goes, and the profile of the steps that are asked for."""

from __future__ import annotations

import torch

from elpo_fast.config import Config
from elpo_fast.regions import CLOCK
from elpo_fast.train import limits
from elpo_fast.train.marks import CudaMarks
from elpo_fast.train.metrics import device_idle, region_metrics, trajectory_tokens
from elpo_fast.train.parts import Parts
from elpo_fast.train.profile import Profiler
from elpo_fast.tree.store import Forest


class StepTimes:
    """Begins with step `first`; each step ends where the next begins."""

    def __init__(self, parts: Parts, config: Config, first: int) -> None:
        self._parts, self._config, policy = parts, config, parts.policy
        device = policy.model.device
        self._peak = limits.peak(device, policy.dtype)
        engine: torch.dtype = getattr(torch, config.rollout.dtype or config.model.dtype)
        self._width = engine.itemsize  # bytes of the numbers that the engine computes with
        CLOCK.device = CudaMarks() if device.type == "cuda" else None
        self._profiler = Profiler(config.train.profile.steps, device)
        CLOCK.take()
        self._profiler.begin(first)

    def end(self, step: int, forest: Forest) -> dict[str, float]:
        """Where the time of `step` went, which trained on `forest`."""
        seconds, totals = CLOCK.take()
        self._profiler.end(step, seconds, totals)
        policy = self._parts.policy
        values = region_metrics(seconds, totals, policy.costs, self._width, self._peak)
        if policy.model.device.type != "cpu":
            values["device_idle"] = device_idle(seconds, totals)
        values["tokens_per_s"] = int(trajectory_tokens(forest).sum()) / seconds
        self._profiler.begin(step + 1)
        return values

    async def profiled(self, step: int) -> bool:
        """Whether `step` was the last to be profiled. The profile is then written, beside what the
        machine can do, measured now; that is no part of a step."""
        config, policy = self._config, self._parts.policy
        if not self._profiler.complete(step, config.train.steps):
            return False
        found = await limits.measured(self._parts.toolbox, policy.model.device, policy.dtype)
        if self._parts.ranks.leads:
            run, name = config.run_dir, config.run.name
            self._profiler.write(run, policy.costs, self._width, found, name)
        CLOCK.take()
        return True
