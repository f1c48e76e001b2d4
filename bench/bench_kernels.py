"""Policy loss over a large vocabulary on CPU, forward and backward, beside other libraries.

`make bench` times this package alone on a small problem. Side by side, correctness first, every
variant in a process of its own, which measures the three cases, and the variants in turn:

    python -m bench.bench_kernels --rivals DIR --out results.json --minutes 8

`DIR` holds `pip install --no-deps --target DIR liger-kernel==0.8.5 cut-cross-entropy==25.1.1`. A
table takes hours: `--minutes` ends a run between two measurements, and the same command goes on
where the file ends. Ratios are taken within a round, and their median is shown.
Memory is the peak of a run beyond what was resident before and the gradients it leaves.
Cases: `dense`, `masked` (half of the tokens carry no weight), `clipped` (half of them have moved
past their bound).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from elpo_kernels import linear_logprob, linear_policy_loss
from torch import Tensor
from torch.nn import functional as F

SEQUENCES, EPSILON = 8, 0.2
# Tokens of the runs that warm a process up: two lengths, after which compiled variants take any.
WARM_UP = (256, 512)
CASES = ("dense", "masked", "clipped")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
RIVALS = ("eager", "liger", "cut-cross-entropy", "torch-chunked")


@dataclass
class Problem:
    """`SEQUENCES` sequences with one advantage each; the loss is the mean over unmasked tokens."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [T]
    old_logprob: Tensor  # [T]
    advantages: Tensor  # [SEQUENCES]
    mask: Tensor  # [T]
    main_grad: Tensor | None = None

    @property
    def token_advantages(self) -> Tensor:
        return self.advantages.repeat_interleave(len(self.targets) // SEQUENCES)

    @property
    def weights(self) -> Tensor:
        return self.mask / self.mask.sum()

    @property
    def labels(self) -> Tensor:
        return torch.where(self.mask == 0, -100, self.targets)

    @property
    def gradients(self) -> list[Tensor]:
        found = (self.hidden.grad, self.weight.grad, self.main_grad)
        return [gradient for gradient in found if gradient is not None]


def make_problem(
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: str,
    case: str = "dense",
    device: str = "cpu",
    cache: Path | None = None,
) -> Problem:
    """`cache`: folder where the log-prob of a problem made before may lie, or is put."""
    torch.manual_seed(0)
    with torch.device(device):
        hidden = torch.randn(tokens, width).to(DTYPES[dtype])
        weight = torch.empty(vocabulary, width, dtype=hidden.dtype)
        for rows in weight.split(4096):
            rows.copy_(torch.randn(len(rows), width) * (2 / width**0.5))
        targets = torch.randint(vocabulary, (tokens,))
        advantages = torch.tensor([1.0, -0.5] * (SEQUENCES // 2))
        noise = 0.02 * torch.randn(tokens)
        mask = torch.ones(tokens)
    known = cache and cache / f"{tokens}-{width}-{vocabulary}-{dtype}.pt"
    if known and known.exists():
        logprob = torch.load(known)
    else:
        logprob = linear_logprob(hidden, weight, targets)
        if known:
            torch.save(logprob, known)
    hidden.requires_grad_()
    weight.requires_grad_()
    dense = Problem(hidden, weight, targets, logprob + noise, advantages, mask)
    return in_case(dense, case)


def in_case(dense: Problem, case: str) -> Problem:
    """The same tensors, with half of the tokens masked or past their bound."""
    half = torch.arange(len(dense.targets), device=dense.targets.device) % 2 == 0
    if case == "masked":
        return replace(dense, mask=torch.where(half, 0, dense.mask))
    if case == "clipped":
        moved = dense.old_logprob - dense.token_advantages.sign()
        return replace(dense, old_logprob=torch.where(half, moved, dense.old_logprob))
    return dense


def beginning(p: Problem, tokens: int) -> Problem:
    """The first tokens alone."""
    hidden = p.hidden.detach()[:tokens].clone().requires_grad_()
    per_token = p.targets[:tokens], p.old_logprob[:tokens]
    return Problem(hidden, p.weight, *per_token, p.advantages, p.mask[:tokens])


def from_logprob(p: Problem, logprob: Tensor) -> Tensor:
    ratio, advantages = (logprob - p.old_logprob).exp(), p.token_advantages
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    return -(torch.minimum(ratio * advantages, clipped * advantages) * p.weights).sum()


def eager(p: Problem) -> Tensor:
    logits = p.hidden @ p.weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return from_logprob(p, torch.log_softmax(logits, -1).gather(1, p.targets[:, None])[:, 0])


def liger(p: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    batch = (SEQUENCES, -1)
    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        loss_type="bnpo",
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        compiled=True,
    )
    loss, _ = module(
        p.hidden.view(*batch, p.hidden.shape[1]),
        p.weight,
        p.targets.view(batch),
        p.mask.view(batch),
        p.advantages,
        old_per_token_logps=p.old_logprob.view(batch),
    )
    return loss


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(
        p.hidden, p.weight, p.labels, impl="torch_compile", reduction="none"
    )
    return from_logprob(p, -losses)


def torch_chunked(p: Problem) -> Tensor:
    losses = F.linear_cross_entropy(p.hidden, p.weight, p.labels, reduction="none")
    return from_logprob(p, -losses.float())


def fused(p: Problem, **options: Any) -> Tensor:
    return linear_policy_loss(
        p.hidden,
        p.weight,
        p.targets,
        p.old_logprob,
        eps_low=EPSILON,
        eps_high=EPSILON,
        advantages=p.token_advantages,
        weights=p.weights,
        **options,
    ).loss


def fused_main_grad(p: Problem) -> Tensor:
    if p.main_grad is None:
        p.main_grad = torch.zeros_like(p.weight, dtype=torch.float32)
    return fused(p, main_grad=p.main_grad)


VARIANTS: dict[str, Callable[[Problem], Tensor]] = {
    "eager": eager,
    "liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "torch-chunked": torch_chunked,
    "fused": fused,
    "fused-main-grad": fused_main_grad,
}


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(variant: str, cases: list[str], cache: Path, *shape: Any) -> list[dict[str, Any]]:
    """Seconds and extra memory of one warm run of each case."""
    dense = make_problem(*shape, cache=cache)
    libc = ctypes.CDLL("libc.so.6")
    for tokens in WARM_UP:
        VARIANTS[variant](beginning(dense, tokens)).backward()
    measured = []
    for case in cases:
        problem = in_case(dense, case)
        problem.hidden.grad = problem.weight.grad = None
        libc.malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        start = time.perf_counter()
        VARIANTS[variant](problem).backward()
        seconds = time.perf_counter() - start
        extra = resident("VmHWM") - before - sum(g.nbytes for g in problem.gradients)
        measured.append({"case": case, "seconds": seconds, "extra_mb": extra / 1e6})
    return measured


def relative(value: Tensor, true: Tensor) -> float:
    return float((value.double() - true).norm() / true.norm())


def check(variants: list[str], dtypes: list[str]) -> None:
    """Loss and both gradients of every variant and case against float64; wrong results end here."""
    shape = 64, 48, 1000
    for case, dtype in itertools.product(CASES, dtypes):
        for variant in variants:
            problem, exact = make_problem(*shape, dtype, case), make_problem(*shape, "fp64", case)
            exact.hidden.data.copy_(problem.hidden)
            exact.weight.data.copy_(problem.weight)
            exact.old_logprob = problem.old_logprob.double()
            true = eager(exact)
            true.backward()
            loss = VARIANTS[variant](problem)
            loss.backward()
            pairs = [(loss.detach(), true.detach())]
            pairs += list(zip(problem.gradients, exact.gradients, strict=True))
            errors = [relative(value, truth) for value, truth in pairs]
            print(variant, dtype, case, *(f"{e:.1e}" for e in errors), flush=True)
            assert max(errors) <= {"fp32": 1e-4, "bf16": 5e-2}[dtype], (variant, dtype, case)


def in_process(arguments: list[str], rivals: str | None) -> Any:
    """What a process of its own prints as its last line; `RuntimeError` where it fails."""
    path = os.pathsep.join(filter(None, [rivals, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-m", "bench.bench_kernels", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"ended with {run.returncode}")
    return json.loads(run.stdout.splitlines()[-1])


def table(results: list[dict[str, Any]]) -> None:
    """Medians, one block a shape; under them what the goals are about."""
    for key in dict.fromkeys((r["dtype"], r["width"], r["vocabulary"]) for r in results):
        block = [r for r in results if (r["dtype"], r["width"], r["vocabulary"]) == key]
        print(f"\n{key[0]}  H={key[1]}  V={key[2]}")
        print(f"{'':20}" + "".join(f"{case:>22}" for case in CASES) + f"{'extra MB':>12}")
        for variant in dict.fromkeys(r["variant"] for r in block):
            cells, extra = [], 0.0
            for case in CASES:
                mine = [r for r in block if r["variant"] == variant and r["case"] == case]
                seconds = [r["seconds"] for r in mine if "seconds" in r]
                extra = max([extra, *(r.get("extra_mb", 0.0) for r in mine)])
                if seconds:
                    spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
                    cells.append(f"{statistics.median(seconds):.2f} ({spread})")
                else:
                    cells.append("failed" if mine else "-")
            print(f"{variant:20}" + "".join(f"{c:>22}" for c in cells) + f"{extra:12.0f}")
        for case in CASES:
            others = {
                v: r for v in RIVALS if (r := ratio(block, ("fused", case), (v, case))) is not None
            }
            if others:
                nearest = max(others, key=others.__getitem__)
                own = ratio(block, ("fused", case), ("fused", "dense"))
                print(f"fused {case}: {others[nearest]:.2f} x {nearest}, {own:.2f} x dense")


def ratio(
    block: list[dict[str, Any]], one: tuple[str, str], other: tuple[str, str]
) -> float | None:
    """Median over the rounds that have both of the time of one (variant, case) over another's."""
    seconds = {(r["variant"], r["case"], r["round"]): r.get("seconds") for r in block}
    found = []
    for number in {r["round"] for r in block}:
        above, below = seconds.get((*one, number)), seconds.get((*other, number))
        if above and below:
            found.append(above / below)
    return statistics.median(found) if found else None


def machine() -> dict[str, Any]:
    versions = {}
    for name in ("torch", "liger-kernel", "cut-cross-entropy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "threads": torch.get_num_threads(),
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1536])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--variants", nargs="+", default=[*RIVALS, "fused"], choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rivals", help="folder with liger-kernel and cut-cross-entropy")
    parser.add_argument("--out", type=Path, help="JSON results, continued where there are any")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check:
        check(options.variants, options.dtypes)
        print(json.dumps(machine()))
        return
    if options.worker:
        variant, cache, width, vocabulary, tokens, dtype = options.worker
        shape = int(tokens), int(width), int(vocabulary), dtype
        print(json.dumps(measure(variant, options.cases, Path(cache), *shape)))
        return
    began = time.monotonic()
    chosen = ["--variants", *options.variants, "--dtypes", *options.dtypes]
    checked = in_process(["--check", *chosen], options.rivals)
    print(json.dumps(checked), flush=True)
    results: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        known = json.loads(options.out.read_text())
        if known["machine"] != checked:
            raise SystemExit(f"{options.out} is of another machine: {known['machine']}")
        results = known["results"]
    names = ("round", "dtype", "width", "vocabulary", "tokens", "variant")
    done = {tuple(r[name] for name in names) for r in results}
    shapes = options.dtypes, options.widths, options.vocabularies, [options.tokens]
    with tempfile.TemporaryDirectory() as cache:
        for key in itertools.product(range(options.rounds), *shapes, options.variants):
            if key in done:
                continue
            if time.monotonic() - began > 60 * options.minutes:
                break
            _, dtype, width, vocabulary, tokens, variant = key
            worker = ["--worker", variant, cache, width, vocabulary, tokens, dtype]
            load = os.getloadavg()[0]
            try:
                rows = in_process([*map(str, worker), "--cases", *options.cases], options.rivals)
            except RuntimeError as failure:
                rows = [{"case": case, "failed": str(failure)} for case in options.cases]
            for row in rows:
                results.append(dict(zip(names, key, strict=True)) | row | {"load": load})
                print(json.dumps(results[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps({"machine": checked, "results": results}))
    table(results)


def test_fused(benchmark) -> None:
    problem = make_problem(256, 576, 16384, "bf16", "dense")
    benchmark(lambda: fused(problem).backward())


def test_three_products_alone(benchmark) -> None:
    """The floor: logits and both gradients as bare matrix products."""
    p = make_problem(256, 576, 16384, "bf16", "dense")

    @torch.no_grad()
    def products() -> None:
        logits = p.hidden @ p.weight.t()
        logits @ p.weight
        logits.t() @ p.hidden

    benchmark(products)


if __name__ == "__main__":
    main()
