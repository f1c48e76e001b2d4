"""The losses against float64, bfloat16 judged by what eager PyTorch makes of the same inputs."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any
from unittest import mock

import torch
from elpo_kernels import linear_logprob, linear_policy_loss, logits_policy_loss, reference
from elpo_kernels.linear.tiling import Tiling
from torch import Tensor

from bench.gpu.cases import error, make_case, true_policy, truth
from bench.gpu.part import Part

VARIANTS: list[dict[str, Any]] = [
    {},
    {"bias": True, "temperature": 0.7},
    {"softcap": 5.0},
    {"spread": 60.0, "drift": 90.0},
    {"width": 577, "vocabulary": 50257},
]
DTYPES = (torch.float32, torch.bfloat16)


def run(part: Part) -> None:
    backend = "triton"  # also on a CPU, whose Triton interprets; its bfloat16 products are wrong
    dtypes = DTYPES[:1] if part.tiny else DTYPES
    variants = VARIANTS[:-1] if part.tiny else VARIANTS
    for options, dtype, entropy in itertools.product(variants, dtypes, (0.0, 0.05)):
        what = f"linear {dtype} {options} entropy={entropy}"
        part.attempt(what, partial(policy, part, what, options, dtype, entropy, backend))
    for main_grad, dtype in itertools.product((False, True), dtypes):
        what = f"linear {dtype} in rounds, main_grad={main_grad}"
        part.attempt(what, partial(in_rounds, part, what, dtype, main_grad, backend))
    for dtype in dtypes:
        what = f"primitive {dtype}"
        part.attempt(what, partial(primitive, part, what, dtype, backend))
        what = f"logits {dtype}"
        part.attempt(what, partial(logits, part, what, dtype, backend))


def judge(
    part: Part, what: str, dtype: torch.dtype, found: list[Tensor], eager: list[Tensor],
    true: list[Tensor], loose: float = 1e-5,
) -> None:  # fmt: skip
    errors = [error(f.detach(), t) for f, t in zip(found, true, strict=True)]
    allowed = [loose] * len(true)
    if dtype != torch.float32:
        allowed = [1.1 * error(e.detach(), t) + 2**-9 for e, t in zip(eager, true, strict=True)]
    line = f"{what}: " + " ".join(f"{e:.1e}" for e in errors)
    part.row(line, errors=errors, allowed=allowed)
    if not all(e <= a for e, a in zip(errors, allowed, strict=True)):
        part.fault(f"too large: {line}; allowed " + " ".join(f"{a:.1e}" for a in allowed))


def policy(
    part: Part, what: str, options: dict[str, Any], dtype: torch.dtype, entropy_coef: float,
    backend: str, **more: Any,
) -> None:  # fmt: skip
    case = make_case(dtype=dtype, **options).to(part.device)
    exact, _, logprob = true_policy(case, entropy_coef)
    leaves, plain = case.leaves(), case.leaves()
    out = linear_policy_loss(
        *leaves.linear, *case.policy, entropy_coef=entropy_coef, logprob_for_all=True,
        backend=backend, **leaves.options, **more,
    )  # fmt: skip
    out.loss.backward()
    values, entropy = truth(plain)
    loss = reference.policy_loss(values, *case.policy) - (entropy_coef * entropy).sum()
    loss.backward()
    found = [out.logprob, *(g if g is not None else more["main_grad"] for g in leaves.gradients())]
    eager, true = [values, *plain.gradients()], [logprob, *exact.gradients()]
    judge(part, what, dtype, found, eager, true, 1e-4 if options.get("spread") else 1e-5)


def in_rounds(part: Part, what: str, dtype: torch.dtype, main_grad: bool, backend: str) -> None:
    """More rows than are held at once, so that sums are kept from one round to the next."""
    shape = (90, 33, 307) if part.tiny else (9000, 256, 4097)
    options = dict(zip(("tokens", "width", "vocabulary"), shape, strict=True))
    tiling = partial(Tiling, rows=32, strip=96, kept=32, update=1 << 20, grain=32)
    if not part.tiny:
        tiling = partial(tiling, rows=2048, strip=1536, kept=4096, grain=2048)
    cut = tiling(block=1 << 62)
    more: dict[str, Any] = {}
    if main_grad:
        more["main_grad"] = torch.zeros(shape[2], shape[1], device=part.device)
    with mock.patch.object(Tiling, "of", staticmethod(lambda *_: cut)):
        policy(part, what, options, dtype, 0.0, backend, **more)


def primitive(part: Part, what: str, dtype: torch.dtype, backend: str) -> None:
    """`linear_logprob` and its entropy, each with a gradient of its own."""
    case = make_case(dtype=dtype, bias=True).to(part.device)
    above = torch.randn(2, len(case.targets), device=part.device)
    results = []
    for leaves in (case.leaves(), case.leaves(), case.leaves(torch.float64)):
        if not results:
            values = linear_logprob(
                *leaves.linear, return_entropy=True, backend=backend, **leaves.options
            )
        else:
            values = truth(leaves)
        sum((v * a).sum() for v, a in zip(values, above, strict=True)).backward()  # type: ignore[union-attr]
        results.append([*values, *leaves.gradients()])
    judge(part, what, dtype, *results)


def logits(part: Part, what: str, dtype: torch.dtype, backend: str) -> None:
    """`logits_policy_loss` on logits that are there already."""
    shape = (16, 301) if part.tiny else (64, 32003)
    raw = torch.randn(shape, device=part.device).to(dtype)
    targets = torch.randint(shape[1], shape[:1], device=part.device)
    advantages = torch.randn(shape[0], device=part.device)
    results = []
    for number, kind in enumerate((dtype, dtype, torch.float64)):
        leaf = raw.to(kind, copy=True).requires_grad_()
        if number == 0:
            out = logits_policy_loss(leaf, targets, None, advantages=advantages, backend=backend)
            out.loss.backward()
            results.append([out.logprob, leaf.grad])
        else:
            chosen = leaf.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            (-(chosen * advantages).sum()).backward()
            results.append([chosen, leaf.grad])
    judge(part, what, dtype, *results)
