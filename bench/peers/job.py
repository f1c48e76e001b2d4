"""What both sides of `bench.peers` are given, and what each of them says; known to no trainer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    """One side's work: `steps` steps, each of `rollouts` completions of every prompt."""

    model: str  # a folder in Hugging Face layout, float32 weights
    texts: list[str]  # prompts, of `prompt` tokens each
    prompt: int
    rollouts: int
    tokens: int  # of every completion
    steps: int
    dtype: str
    device: str
    probe: str  # file of TRL's first, short completions and their gradient's norm
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    clip: float = 0.2
    probe_tokens: int = 16  # of the completions in the step that warms up

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: str) -> Job:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def reward(token_ids: Sequence[int]) -> float:
    """Of a completion: its share of even tokens."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


def settled(device: str, clock: Callable[[], float]) -> float:
    """The time when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return clock()


def say(device: str, steps: Sequence[dict[str, Any]], **more: Any) -> None:
    """Hand the side's result to `bench.peers`: the last line of its output."""
    # Not getrusage: that begins with what the parent had.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    on_gpu = torch.cuda.max_memory_reserved() if device == "cuda" else None
    print(json.dumps({"steps": steps, "peak_bytes": peak, "gpu_bytes": on_gpu, **more}))
    sys.stdout.flush()
