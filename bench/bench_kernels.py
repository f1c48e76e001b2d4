"""Policy loss over a large vocabulary on CPU, forward and backward, beside other libraries.

`make bench` times this package alone on a small problem. Side by side, every measurement in a
process of its own, variants interleaved, correctness first:

    python -m bench.bench_kernels --rivals DIR --out results.json

`DIR` holds `pip install --no-deps --target DIR liger-kernel==0.8.5 cut-cross-entropy==25.1.1`.
Memory is the peak of a warm run beyond what was resident before and the gradients it leaves.
Cases: `dense`, `masked` (half of the tokens carry no weight), `clipped` (half of them have moved
past their bound).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from elpo_kernels import linear_logprob, linear_policy_loss, policy_loss
from torch import Tensor
from torch.nn import functional as F

SEQUENCES, EPSILON = 8, 0.2
CASES = ("dense", "masked", "clipped")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
RIVALS = ("eager", "liger", "cut-cross-entropy", "torch-chunked")
OURS = ("fused", "fused-main-grad", "two-pass")


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
    tokens: int, width: int, vocabulary: int, dtype: str, case: str, device: str = "cpu"
) -> Problem:
    torch.manual_seed(0)
    with torch.device(device):
        hidden = torch.randn(tokens, width).to(DTYPES[dtype])
        weight = torch.empty(vocabulary, width, dtype=hidden.dtype)
        for rows in weight.split(4096):
            rows.copy_(torch.randn(len(rows), width) * (2 / width**0.5))
        targets = torch.randint(vocabulary, (tokens,))
        advantages = torch.tensor([1.0, -0.5] * (SEQUENCES // 2))
        logprob = linear_logprob(hidden, weight, targets)
        problem = Problem(hidden, weight, targets, logprob, advantages, torch.ones(tokens))
        half = torch.arange(tokens) % 2 == 0
        drift = 0.02 * torch.randn(tokens)
    if case == "clipped":
        drift[half] -= problem.token_advantages[half].sign()
    if case == "masked":
        problem.mask[half] = 0
    problem.old_logprob += drift
    hidden.requires_grad_()
    weight.requires_grad_()
    return problem


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
    p.main_grad = torch.zeros_like(p.weight, dtype=torch.float32)
    return fused(p, main_grad=p.main_grad)


def two_pass(p: Problem) -> Tensor:
    """The primitive and the elementwise loss: less memory, logits computed twice."""
    logprob = linear_logprob(p.hidden, p.weight, p.labels)
    out = policy_loss(logprob, p.old_logprob, advantages=p.token_advantages, weights=p.weights)
    return out.loss


VARIANTS: dict[str, Callable[[Problem], Tensor]] = {
    "eager": eager,
    "liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "torch-chunked": torch_chunked,
    "fused": fused,
    "fused-main-grad": fused_main_grad,
    "two-pass": two_pass,
}


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(variant: str, runs: int, *shape: Any) -> dict[str, Any]:
    """Seconds of every warm run, and the extra memory of the last."""
    problem = make_problem(*shape)
    libc = ctypes.CDLL("libc.so.6")
    seconds, extra = [], 0
    for _ in range(runs + 1):
        problem.hidden.grad = problem.weight.grad = problem.main_grad = None
        libc.malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        start = time.perf_counter()
        VARIANTS[variant](problem).backward()
        seconds.append(time.perf_counter() - start)
        extra = resident("VmHWM") - before - sum(g.nbytes for g in problem.gradients)
    return {"seconds": seconds[1:], "extra_mb": extra / 1e6}


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


def in_process(arguments: list[str], rivals: str | None) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [rivals, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-m", "bench.bench_kernels", "--worker", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1] if run.stderr else run.returncode}
    return json.loads(run.stdout.splitlines()[-1])


def table(results: list[dict[str, Any]]) -> None:
    """Medians, one block a shape; under them what the goals are about."""
    for key in dict.fromkeys((r["dtype"], r["width"], r["vocabulary"]) for r in results):
        block = [r for r in results if (r["dtype"], r["width"], r["vocabulary"]) == key]
        medians: dict[tuple[str, str], float] = {}
        print(f"\n{key[0]}  H={key[1]}  V={key[2]}")
        print(f"{'':20}" + "".join(f"{case:>22}" for case in CASES) + f"{'extra MB':>12}")
        for variant in dict.fromkeys(r["variant"] for r in block):
            cells, extra = [], 0.0
            for case in CASES:
                mine = [r for r in block if r["variant"] == variant and r["case"] == case]
                seconds = [s for r in mine for s in r.get("seconds", [])]
                extra = max([extra, *(r.get("extra_mb", 0.0) for r in mine)])
                if seconds:
                    medians[variant, case] = statistics.median(seconds)
                    spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
                    cells.append(f"{medians[variant, case]:.2f} ({spread})")
                else:
                    cells.append("failed" if mine else "-")
            print(f"{variant:20}" + "".join(f"{c:>22}" for c in cells) + f"{extra:12.0f}")
        for case in CASES:
            others = [medians[v, case] for v in RIVALS if (v, case) in medians]
            if others and ("fused", case) in medians:
                own, dense = medians["fused", case], medians.get(("fused", "dense"), float("nan"))
                best, own_dense = own / min(others), own / dense
                print(f"fused {case}: {best:.2f} x fastest other, {own_dense:.2f} x dense")


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
        "load": os.getloadavg()[0],
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1536])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--variants", nargs="+", default=[*RIVALS, *OURS], choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each measurement")
    parser.add_argument("--runs", type=int, default=1, help="warm runs in each process")
    parser.add_argument("--rivals", help="folder with liger-kernel and cut-cross-entropy")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        variant, runs, tokens, width, vocabulary, dtype, case = options.worker
        if variant == "check":
            check(options.variants, options.dtypes)
            print(json.dumps(machine()))
            return
        shape = int(tokens), int(width), int(vocabulary), dtype, case
        print(json.dumps(measure(variant, int(runs), *shape)))
        return
    checked = in_process(
        ["check", *"000000", "--variants", *options.variants, "--dtypes", *options.dtypes],
        options.rivals,
    )
    if "failed" in checked:
        raise SystemExit(f"correctness: {checked['failed']}")
    print(json.dumps(checked), flush=True)
    results: list[dict[str, Any]] = []
    shapes = itertools.product(options.dtypes, options.widths, options.vocabularies, options.cases)
    for dtype, width, vocabulary, case in shapes:
        for _, variant in itertools.product(range(options.rounds), options.variants):
            numbers = [variant, options.runs, options.tokens, width, vocabulary, dtype, case]
            one = in_process([str(n) for n in numbers], options.rivals)
            one |= {"dtype": dtype, "width": width, "vocabulary": vocabulary, "case": case}
            one |= {"variant": variant, "tokens": options.tokens, "load": os.getloadavg()[0]}
            results.append(one)
            print(json.dumps(one), flush=True)
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
