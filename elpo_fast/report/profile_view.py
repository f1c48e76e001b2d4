"""`elpo profile`: a profile as a table, its bottleneck in a sentence, two of them side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from elpo_fast.config import Config, load_config
from elpo_fast.train.profile import FILE, FOLDER, TRACE, TURN

Profile = Mapping[str, Any]


def find_profile(path: Path) -> Path:
    """The file of a saved profile, from it, its folder or the run's. Raises `LookupError`."""
    for file in (path, path / FILE, path / FOLDER / FILE):
        if file.is_file():
            return file
    raise LookupError(f"no profile at {path}; make one with elpo profile CONFIG")


def read_profile(path: Path) -> Profile:
    """What `find_profile` finds."""
    found: Profile = json.loads(find_profile(path).read_text(encoding="utf-8"))
    return found


def profiling(path: Path, overrides: Sequence[str], over: Sequence[str], steps: int) -> Config:
    """The configuration of a run beside that of `path`, of which `steps` steps are profiled after
    one that compiles. Raises `LookupError`."""
    if steps < 1:
        raise LookupError(f"--steps {steps}: at least one step has to be profiled")
    last = steps + 1
    wanted = [f"train.steps={last}", f"train.profile.steps={list(range(2, last + 1))}"]
    config = load_config(path, ["eval.tasks=0", "eval.every=0", *overrides, *wanted], over)
    run = config.run_dir
    names = (f"{run.name}-profile{number or ''}" for number in itertools.count())
    name = next(name for name in names if not (run.parent / name).exists())
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def show_profile(path: Path, console: Console) -> None:
    """Print the table, the bottleneck and where the trace is."""
    profile, trace = read_profile(path), find_profile(path).with_name(TRACE)
    seconds, regions = mean_step(profile)
    limits, steps = profile["limits"], profile["steps"]
    table = Table(title=f"A step of {profile['name']}, {_of(steps)}", title_justify="left")
    table.add_column("region")
    for name in ("seconds", "share", "all calls", "calls", "achieved", "floor", "over floor"):
        table.add_column(name, justify="right")
    for name, region in sorted(regions.items(), key=lambda item: -item[1]["seconds"]):
        least = region["floor"]
        table.add_row(
            name,
            f"{region['seconds']:.3f}",
            f"{region['seconds'] / seconds:.1%}",
            f"{region['busy']:.3f}",
            f"{region['calls']:.0f}",
            _rate(name, region, limits),
            f"{least:.3f}" if least else "",
            f"{region['seconds'] / least:.1f}" if least and region["seconds"] > least else "",
        )
    named = sum(region["seconds"] for region in regions.values())
    table.add_row("other", f"{seconds - named:.3f}", f"{1 - named / seconds:.1%}")
    table.add_row("step", f"{seconds:.3f}", "100.0%")
    console.print(table)
    said = [
        f"this machine: {limits['products'] / 1e9:.0f} GFLOP/s in matrix products, "
        f"{limits['memory'] / 1e9:.1f} GB/s copied, {limits['forks']:.0f} sandboxed programs/s",
        *_of_device(steps),
        bottleneck(profile),
        f"trace: {trace} (open it at https://ui.perfetto.dev)",
    ]
    for line in said:
        console.print(line, highlight=False, soft_wrap=True)


def bottleneck(profile: Profile) -> str:
    """What takes most of a step, how far it is from its floor, and which key to turn."""
    seconds, regions = mean_step(profile)
    name, region = max(regions.items(), key=lambda item: item[1]["seconds"])
    least = region["floor"]
    far = f", {region['seconds'] / least:.1f} times its floor" if least else ""
    share = region["seconds"] / seconds
    turn = TURN[name]
    if name == "decode" and region["flops"] and not _moves(region, profile["limits"]):
        turn = (
            "its products take longer than reading the weights; lower algo.n_total or "
            "rollout.max_turn_tokens, or set rollout.dtype to what the machine multiplies faster"
        )
    return f"the bottleneck is {name} with {share:.0%} of a step{far}: {turn}"


def show_comparison(one: Profile, other: Profile, console: Console) -> None:
    """Print seconds of both, their ratio, and between what it lies over the steps of both."""
    table = Table(title=f"A: {_said(one)}\nB: {_said(other)}", title_justify="left")
    table.add_column("region")
    for name in ("A, seconds", "B, seconds", "B / A", "over the steps"):
        table.add_column(name, justify="right")
    (first, before), (second, after) = mean_step(one), mean_step(other)
    names = sorted(before.keys() | after.keys(), key=lambda name: -_seconds(before, name))
    for name in [*names, "step"]:
        a, b = (_seconds(x, name) for x in (before, after)) if name != "step" else (first, second)
        ratio = spread = ""
        if a and b:
            lows, highs = zip(*(_range(profile, name) for profile in (one, other)), strict=True)
            ratio = f"{b / a:.2f}"
            if lows[0]:
                spread = f"{lows[1] / highs[0]:.2f} - {highs[1] / lows[0]:.2f}"
        table.add_row(name, f"{a:.3f}", f"{b:.3f}", ratio, spread)
    console.print(table)


def mean_step(profile: Profile) -> tuple[float, dict[str, dict[str, float]]]:
    """Seconds of a step and its regions, both the mean over the profiled steps."""
    steps = profile["steps"]
    names = dict.fromkeys(name for step in steps for name in step["regions"])
    keys = next(iter(steps[0]["regions"].values())).keys()
    regions = {
        name: {
            key: sum(step["regions"].get(name, {}).get(key, 0) for step in steps) / len(steps)
            for key in keys
        }
        for name in names
    }
    return mean(step["seconds"] for step in steps), regions


def _rate(name: str, region: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """What a region achieves of what its floor is made of; tools while any was running."""
    if name == "tool" and region["covered"]:
        return f"{region['calls'] / region['covered']:.0f} calls/s"
    if not region["seconds"] or not region["floor"]:
        return ""
    if _moves(region, limits):
        return f"{region['bytes'] / region['seconds'] / 1e9:.1f} GB/s"
    return f"{region['flops'] / region['seconds'] / 1e9:.0f} GFLOP/s"


def _moves(region: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether a region's bytes take longer than its operations."""
    return region["bytes"] / limits["memory"] > region["flops"] / limits["products"]


def _seconds(regions: Mapping[str, Mapping[str, float]], name: str) -> float:
    return regions[name]["seconds"] if name in regions else 0.0


def _range(profile: Profile, name: str) -> tuple[float, float]:
    """The least and the most seconds of a region, or of the whole `step`."""
    found = [_seconds({"step": step, **step["regions"]}, name) for step in profile["steps"]]
    return min(found), max(found)


def _of(steps: list[Mapping[str, Any]]) -> str:
    numbers = ", ".join(str(step["step"]) for step in steps)
    return f"mean of steps {numbers}" if len(steps) > 1 else f"step {numbers}"


def _of_device(steps: list[Mapping[str, Any]]) -> list[str]:
    devices = [step["device"] for step in steps if step["device"]]
    if not devices:
        return []
    idle, waits = (mean(d[key] for d in devices) for key in ("idle", "waits_per_micro_batch"))
    return [f"the GPU is idle {idle:.0%} of a step; {waits:.1f} waits for it a micro-batch"]


def _said(profile: Profile) -> str:
    where = profile["machine"]
    return (
        f"{profile['name']}, {_of(profile['steps'])}, {where['gpu'] or where['processor']}, "
        f"{where['cores']} cores, {profile['commit']}"
    )
