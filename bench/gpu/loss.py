"""The policy loss over a large vocabulary: time and memory of forward and backward beside the three
bare matrix products of the problem, eager PyTorch and other libraries, all in turn.

Memory is the peak beyond inputs and gradients. Liger's cross-entropy is an easier problem, without
ratio and clipping: it is timed where all tokens are active. Cut-cross-entropy leaves out small
gradients.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from elpo_kernels.linear.tiling import Tiling
from torch import Tensor
from torch.nn import functional as F

from bench.bench_kernels import (
    CASES,
    Problem,
    eager,
    from_logprob,
    fused,
    fused_main_grad,
    in_case,
    make_problem,
)
from bench.gpu.part import GIB, Part, judged

# tokens, width, vocabulary; the first are what goals are judged by if time runs out
SHAPES = ((8192, 3584, 151936), (8192, 4096, 128256), (32768, 3584, 151936), (32768, 4096, 128256))
DENSE_GOAL, CLIPPED_GOAL, MASKED_GOAL, MEMORY_GOAL = 1.15, 0.72, 0.55, 1.5
OURS = ("fused", "fused-main-grad")
# rows and strip of a tile, rows held
TILINGS = (
    (2048, 4096, 4096),
    (2048, 8448, 4096),
    (4096, 3072, 4096),
    (4096, 6144, 4096),
    (1408, 6144, 4224),
    (2048, 6144, 2048),
    (2048, 6144, 8192),
    (8192, 4096, 8192),
)

Step = Callable[[Problem], None]


def products(p: Problem) -> None:
    """Logits and both gradients as bare matrix products, the floor where all tokens are active."""
    with torch.no_grad():
        logits = p.hidden @ p.weight.t()
        logits @ p.weight
        logits.t() @ p.hidden


def liger(p: Problem) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(p.hidden, p.weight, p.targets)[0]


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return from_logprob(
        p, -linear_cross_entropy(p.hidden, p.weight, p.labels, impl="cce", reduction="none")
    )


def trl_chunked(p: Problem) -> Tensor:
    """Loaded by its file, in a package where what it takes from TRL's trainer does nothing: TRL
    itself wants more packages than a bare machine has."""
    name = "trl_alone.kernels.chunked_logprob"
    if name not in sys.modules:
        found = next(
            path
            for place in sys.path
            if (path := Path(place) / "trl" / "kernels" / "chunked_logprob.py").exists()
        )
        utils = ModuleType("trl_alone.trainer.utils")
        vars(utils)["maybe_gather_lm_head_ctx"] = lambda *_: contextlib.nullcontext()
        for package in ("trl_alone", "trl_alone.kernels", "trl_alone.trainer"):
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = []
        spec = importlib.util.spec_from_file_location(name, found)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules |= {utils.__name__: utils, name: module}
        spec.loader.exec_module(module)
    call = sys.modules[name].ChunkedLogProbFunction.apply
    return from_logprob(p, call(p.hidden, p.weight, None, p.targets, 1.0, 4096, None, 1.0, ())[0])


def torch_chunked(p: Problem) -> Tensor:
    losses = F.linear_cross_entropy(p.hidden, p.weight, p.labels, reduction="none")
    return from_logprob(p, -losses.float())


def step(variant: Callable[[Problem], Tensor]) -> Step:
    return lambda problem: variant(problem).backward()


def variants(part: Part) -> dict[str, Step]:
    known = {"products": products} | {
        name: step(call)
        for name, call in {
            "fused": fused,
            "fused-main-grad": fused_main_grad,
            "eager": eager,
            "liger-ce": liger,
            "cut-cross-entropy": cut_cross_entropy,
            "trl-chunked": trl_chunked,
        }.items()
    }
    if hasattr(F, "linear_cross_entropy"):
        known["torch-chunked"] = step(torch_chunked)
    if part.tiny:  # the others have no CPU kernels
        return {name: known[name] for name in ("products", *OURS, "eager")}
    return known


def run(part: Part) -> None:
    shapes = ((64, 16, 307),) if part.tiny else SHAPES
    for shape in shapes:
        what = "T={} H={} V={}".format(*shape)
        part.attempt(what, partial(one_shape, part, what, *shape))
        if shape == shapes[0]:
            part.attempt("tilings", partial(tilings, part, *shape))
            part.attempt("trace", partial(trace, part, *shape))


def once(part: Part, p: Problem, do: Step, main_grad: bool) -> tuple[float, float]:
    """Milliseconds, and GiB beyond inputs and gradients."""
    p.hidden.grad = p.weight.grad = p.main_grad = None
    if main_grad:  # an input
        p.main_grad = torch.zeros_like(p.weight, dtype=torch.float32)
    before = 0 if part.tiny else torch.cuda.memory_allocated()
    if not part.tiny:
        torch.cuda.reset_peak_memory_stats()
    took = part.clock(partial(do, p))
    if part.tiny:
        return took, 0.0
    made = (p.hidden.grad, p.weight.grad)
    gradients = sum(gradient.nbytes for gradient in made if gradient is not None)
    return took, (torch.cuda.max_memory_allocated() - before - gradients) / GIB


def one_shape(part: Part, what: str, tokens: int, width: int, vocabulary: int) -> None:
    dtype = "fp32" if part.tiny else "bf16"
    dense = make_problem(tokens, width, vocabulary, dtype, "dense", part.device)
    known = variants(part)
    if tokens > 8192:  # its logits alone would take the card
        known.pop("eager", None)
    times: dict[str, float] = {}
    for case in CASES:
        problem = in_case(dense, case)
        names = [n for n in known if case == "dense" or n not in ("products", "liger-ce")]
        taken = measure(part, f"{what} {case}", problem, {n: known[n] for n in names})
        for name, pairs in taken.items():
            took = statistics.median(ms for ms, _ in pairs)
            times[f"{case} {name}"] = took
            extra = max(extra for _, extra in pairs)
            line = f"{what} {case:8}{name:18}{took:9.2f} ms {extra:6.2f} GiB"
            values: dict[str, Any] = {"case": case, "variant": name, "ms": took, "gib": extra}
            if name in OURS and case == "dense" and "dense products" in times:
                ratio = took / times["dense products"]
                line += f"  {judged(ratio, DENSE_GOAL)} of the products"
                values |= {"ratio": ratio, "tflops": 6 * tokens * width * vocabulary / took / 1e9}
            elif name in OURS and f"dense {name}" in times:
                ratio = took / times[f"dense {name}"]
                goal = CLIPPED_GOAL if case == "clipped" else MASKED_GOAL
                line += f"  {judged(ratio, goal)} of dense"
                values["ratio"] = ratio
            if name == "fused-main-grad":
                line += f"  {judged(extra, MEMORY_GOAL)} GiB"
            part.row(
                line, shape=[tokens, width, vocabulary],
                rounds_ms=[ms for ms, _ in pairs], **values,
            )  # fmt: skip


def measure(
    part: Part, what: str, problem: Problem, steps: dict[str, Step]
) -> dict[str, list[tuple[float, float]]]:
    """Time and memory of each that runs, by round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    live = dict(steps)
    rounds = part.rounds if part.tiny else 7 if len(problem.targets) <= 8192 else 4
    for number in range(0 if part.tiny else -2, rounds):
        if number > 1 and part.left < 0:
            break
        for name in list(live):
            do = partial(once, part, problem, live[name], name == "fused-main-grad")
            found = part.attempt(f"{what} {name}", do)
            if found is None:
                del live[name]
            elif number >= 0:
                taken[name].append(found)
    return {name: pairs for name, pairs in taken.items() if pairs}


def tilings(part: Part, tokens: int, width: int, vocabulary: int) -> None:
    """Ours under other tiles, one by one."""
    dtype = "fp32" if part.tiny else "bf16"
    dense = make_problem(tokens, width, vocabulary, dtype, "dense", part.device)
    for rows, strip, kept in TILINGS[: 2 if part.tiny else None]:
        tiling = Tiling(
            rows=rows, strip=strip, kept=kept, update=vocabulary, grain=rows, block=1 << 62
        )
        line = f"tiles of {rows} x {strip}, {kept} rows held:"
        times = {}
        with mock.patch.object(Tiling, "of", staticmethod(lambda *_, t=tiling: t)):
            for name, variant in (("fused", fused), ("fused-main-grad", fused_main_grad)):
                do = partial(once, part, dense, step(variant), name == "fused-main-grad")
                pairs = [do() for _ in range(1 if part.tiny else 5)]
                times[name] = statistics.median(ms for ms, _ in pairs[-3:])
                line += f"  {name} {times[name]:.2f} ms {pairs[-1][1]:.2f} GiB"
        part.row(line, tiling=[rows, strip, kept], ms=times)


def trace(part: Part, tokens: int, width: int, vocabulary: int) -> None:
    """One profiled step."""
    dtype = "fp32" if part.tiny else "bf16"
    dense = make_problem(tokens, width, vocabulary, dtype, "dense", part.device)
    once(part, dense, step(fused), False)
    part.profiled("loss", partial(once, part, dense, step(fused), False))
