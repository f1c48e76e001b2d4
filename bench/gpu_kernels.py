"""Policy loss over a large vocabulary on one GPU.

    python -m bench.gpu_kernels --out results.json

The file grows with every shape. In a checkout that is not installed, PYTHONPATH=kernels/src.
Correctness first: values and gradients of the Triton backend against float64, bfloat16 judged by
what eager PyTorch makes of the same inputs. Then time and memory of forward and backward, variants
interleaved, beside the three bare matrix products of the problem and eager PyTorch where that fits.
Memory is the peak beyond inputs and gradients. Goals, on a Hopper card: dense at most 1.15 x the
bare products, masked at most 0.55 x and clipped at most 0.72 x dense, memory at most 1.5 GiB. A
bfloat16 gradient's float32 sum is larger than that: the limit is for `fused-main-grad`, which adds
to a sum that the caller keeps, and for masked or clipped runs that need none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from elpo_kernels import linear_policy_loss, logits_policy_loss, reference
from elpo_kernels.testing import error, make_case, true_policy, truth
from torch import Tensor

from bench.bench_kernels import CASES, Problem, eager, fused, fused_main_grad, make_problem

TOKENS = (8192, 32768)
HEADS = ((4096, 128256), (3584, 151936))  # width, vocabulary
GOALS = {"dense": 1.15, "masked": 0.55, "clipped": 0.72, "memory_gib": 1.5}
GIB = 1 << 30


def check() -> list[str]:
    """Worst errors of every configuration; `AssertionError` where one is too large."""
    lines = []
    variants: list[dict[str, Any]] = [
        {},
        {"bias": True, "temperature": 0.7},
        {"softcap": 5.0},
        {"spread": 60.0, "drift": 90.0},
        {"width": 577, "vocabulary": 50257},
    ]
    for options, dtype in itertools.product(variants, (torch.float32, torch.bfloat16)):
        for entropy_coef in (0.0, 0.05):
            case = make_case(dtype=dtype, **options).to("cuda")
            exact, _, logprob = true_policy(case, entropy_coef)
            leaves, plain = case.leaves(), case.leaves()
            out = linear_policy_loss(
                *leaves.linear,
                *case.policy,
                entropy_coef=entropy_coef,
                logprob_for_all=True,
                **leaves.options,
            )
            out.loss.backward()
            values, entropy = truth(plain)
            eager_loss = reference.policy_loss(values, *case.policy)
            (eager_loss - entropy_coef * entropy.sum()).backward()
            found = [out.logprob, *leaves.gradients()]
            by_eager = [values.detach(), *plain.gradients()]
            true = [logprob, *exact.gradients()]
            errors = [error(f, t) for f, t in zip(found, true, strict=True)]
            if dtype == torch.float32:
                allowed = [1e-4 if options.get("spread") else 1e-5] * len(true)
            else:
                allowed = [1.1 * error(e, t) + 2**-9 for e, t in zip(by_eager, true, strict=True)]
            name = f"{dtype} {options} entropy={entropy_coef}"
            lines.append(f"{name}: " + " ".join(f"{e:.1e}" for e in errors))
            assert all(e <= a for e, a in zip(errors, allowed, strict=True)), lines[-1]
    logits = torch.randn(64, 32003, device="cuda").requires_grad_()
    exact_logits = logits.detach().double().requires_grad_()
    targets = torch.randint(32003, (64,), device="cuda")
    advantages = torch.randn(64, device="cuda")
    logits_policy_loss(logits, targets, None, advantages=advantages).loss.backward()
    chosen = exact_logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (-(chosen * advantages).sum()).backward()
    assert error(logits.grad, exact_logits.grad) <= 1e-5
    return lines


def products(problem: Problem) -> None:
    """Logits and both gradients as bare matrix products, the floor of a dense step."""
    with torch.no_grad():
        logits = problem.hidden @ problem.weight.t()
        logits @ problem.weight
        logits.t() @ problem.hidden


def step(variant: Callable[[Problem], Tensor]) -> Callable[[Problem], None]:
    def run(problem: Problem) -> None:
        variant(problem).backward()

    return run


VARIANTS: dict[str, Callable[[Problem], None]] = {
    "products": products,
    "eager": step(eager),
    "fused": step(fused),
    "fused-main-grad": step(fused_main_grad),
}


def once(problem: Problem, name: str) -> tuple[float, float]:
    """Milliseconds, and GiB beyond inputs and gradients, of a variant."""
    problem.hidden.grad = problem.weight.grad = problem.main_grad = None
    if name == "fused-main-grad":  # an input
        problem.main_grad = torch.zeros_like(problem.weight, dtype=torch.float32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    VARIANTS[name](problem)
    stop.record()
    torch.cuda.synchronize()
    made = (problem.hidden.grad, problem.weight.grad)
    gradients = sum(gradient.nbytes for gradient in made if gradient is not None)
    extra = torch.cuda.max_memory_allocated() - before - gradients
    return start.elapsed_time(stop), extra / GIB


def measure(tokens: int, width: int, vocabulary: int, case: str, rounds: int) -> dict[str, Any]:
    problem = make_problem(tokens, width, vocabulary, "bf16", case, "cuda")
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for number in range(rounds + 2):  # two to warm up
        for name in list(results):
            try:
                one = once(problem, name)
            except RuntimeError as error:  # out of memory, which cuBLAS reports in its own way
                if name != "eager":
                    raise
                print(f"eager ends: {str(error).splitlines()[0]}", flush=True)
                results.pop(name)
                torch.cuda.empty_cache()
                continue
            if number >= 2:
                results[name].append(one)
    row: dict[str, Any] = {"tokens": tokens, "width": width, "vocabulary": vocabulary, "case": case}
    for name, pairs in results.items():
        times = [milliseconds for milliseconds, _ in pairs]
        row[name] = {
            "ms": statistics.median(times),
            "spread_ms": [min(times), max(times)],
            "extra_gib": max(extra for _, extra in pairs),
        }
    return row


def judge(rows: list[dict[str, Any]]) -> None:
    """Every row beside its goals."""
    dense = {
        (r["tokens"], r["width"], variant): r[variant]["ms"]
        for r in rows
        for variant in ("fused", "fused-main-grad")
        if r["case"] == "dense" and variant in r
    }
    for row in rows:
        flops = 6 * row["tokens"] * row["width"] * row["vocabulary"]
        for name in [name for name in VARIANTS if name in row]:
            cell = row[name]
            line = (
                f"T={row['tokens']:6} H={row['width']} V={row['vocabulary']} {row['case']:8}"
                f"{name:16} {cell['ms']:8.2f} ms  {cell['extra_gib']:6.2f} GiB"
            )
            if name.startswith("fused"):
                base = row["products"]["ms"]
                if row["case"] == "dense":
                    cell["share_of_product_rate"] = base / cell["ms"]
                    cell["tflops"] = flops / cell["ms"] / 1e9
                else:
                    base = dense[row["tokens"], row["width"], name]
                ratio, goal = cell["ms"] / base, GOALS[row["case"]]
                cell["ratio"] = ratio
                line += f"  {ratio:.2f} x (goal {goal}{'' if ratio <= goal else ', missed'})"
                if cell["extra_gib"] > GOALS["memory_gib"]:
                    line += f"  above {GOALS['memory_gib']} GiB"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_kernels.json"))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu_kernels needs a GPU; bench.bench_kernels measures the CPU")
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "goals": GOALS,
        "correctness": check(),
        "results": rows,
    }
    print(*results["correctness"], sep="\n", flush=True)
    for tokens, (width, vocabulary), case in itertools.product(options.tokens, HEADS, CASES):
        rows.append(measure(tokens, width, vocabulary, case, options.rounds))
        print(json.dumps(rows[-1]), flush=True)
        results["seconds"] = time.perf_counter() - began
        options.out.write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()
    judge(rows)
    options.out.write_text(json.dumps(results, indent=1))
    print(f"written to {options.out} after {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
