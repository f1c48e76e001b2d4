"""Every Triton kernel in the interpreter, on CPU tensors, against float64 references.

Whether a kernel is compiled or interpreted is settled when Triton is imported, so the tests run in
a process of their own, which the last test starts. The interpreter computes float32 only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from elpo_kernels import (
    linear_logprob,
    linear_policy_loss,
    logits_policy_loss,
    logprob_from_logits,
    reference,
)
from elpo_kernels.linear.tiling import Tiling
from kernel_cases import error, improbable, make_case, true_policy, truth

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs under test_in_the_interpreter")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "temperature": 0.7},
    "token-temperature": {"temperature": torch.linspace(0.5, 1.5, 13, dtype=torch.float64)},
    "softcap": {"softcap": 5.0},
    "shifted": {"shift": 100.0},
    "new-anchor": {"spread": 60.0, "drift": 90.0},
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several loop turns a kernel, several strips a row, several products a block of rows and
    several flushes a call, as on a GPU."""
    from elpo_kernels import rows_triton

    monkeypatch.setattr(rows_triton, "BLOCK", 64)
    cut = Tiling(rows=3, strip=96, kept=9, update=70, grain=3, block=1 << 62)
    monkeypatch.setattr(Tiling, "of", staticmethod(lambda *_: cut))


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_logprob(variant: str) -> None:
    case = make_case(13, vocabulary=150, **VARIANTS[variant])
    weights = torch.randn(2, 13, dtype=torch.float64)
    leaves, exact = case.leaves(), case.leaves(torch.float64)
    found = linear_logprob(*leaves.linear, return_entropy=True, backend="triton", **leaves.options)
    true = truth(exact)
    for pair in (found, true):
        (weights[0] * pair[0] + weights[1] * pair[1]).sum().backward()
    compare(variant, [*found, *leaves.gradients()], [*true, *exact.gradients()])


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_gradient_at_improbable_targets(shift: float) -> None:
    case = improbable(shift)
    leaves, exact = case.leaves(), case.leaves(torch.float64)
    found = linear_logprob(*leaves.linear, return_entropy=True, backend="triton")
    for logprob, entropy in (found, truth(exact)):
        (logprob + 2 * entropy).sum().backward()
    for row, true in zip(leaves.gradients()[0], exact.gradients()[0], strict=True):
        assert error(row, true) <= 1e-5


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05], ids=["no-entropy", "entropy"])
def test_linear_policy_loss(variant: str, entropy_coef: float) -> None:
    case = make_case(13, vocabulary=150, **VARIANTS[variant])
    exact, loss, logprob = true_policy(case, entropy_coef, 1.5)
    leaves = case.leaves()
    out = linear_policy_loss(
        *leaves.linear, *case.policy, entropy_coef=entropy_coef, return_entropy=True, ratio_cap=1.5,
        logprob_for_all=True, backend="triton", **leaves.options,
    )  # fmt: skip
    out.loss.backward()
    found = [out.loss, out.logprob, out.entropy, *leaves.gradients()]
    compare(variant, found, [loss, logprob, truth(case)[1], *exact.gradients()])


@interpreted
def test_gradients_are_scaled_where_the_loss_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from elpo_kernels import rows_triton

    monkeypatch.setattr(rows_triton, "BLOCK", 64)
    values = torch.randn(5, 37)
    values[0, 0] = torch.nan  # is not touched by a factor of 1
    for factor in (1.0, -2.5):
        scaled = values.clone()
        rows_triton.scale_in_place(scaled, torch.tensor(factor))
        assert torch.equal(scaled.nan_to_num(7), (values * factor).nan_to_num(7))


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in-place"])
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["plain", "softcap"])
def test_from_logits(in_place: bool, softcap: float | None) -> None:
    case = make_case(13, vocabulary=150)
    logits = case.hidden @ case.weight.t()
    root = logits.clone().requires_grad_()
    out = logits_policy_loss(
        root * 1, case.targets, *case.policy,
        entropy_coef=0.1, softcap=softcap, in_place=in_place, backend="triton",
    )  # fmt: skip
    out.loss.backward()
    exact = logits.double().requires_grad_()
    eye = torch.eye(150, dtype=torch.float64)
    logprob, entropy = reference.linear_logprob(exact, eye, case.targets, softcap=softcap)
    (reference.policy_loss(logprob, *case.policy) - 0.1 * entropy.sum()).backward()
    assert error(root.grad, exact.grad) <= 1e-5
    other = logprob_from_logits(logits, case.targets, softcap=softcap, backend="triton")
    assert error(other, logprob.detach()) <= 1e-5


def compare(variant: str, found: list[Any], true: list[Any]) -> None:
    """Within 1e-5; logits in the hundreds hold no better than 1e-4."""
    tolerance = 1e-4 if variant in ("shifted", "new-anchor") else 1e-5
    for number, (value, exact) in enumerate(zip(found, true, strict=True)):
        value, exact = value.detach(), exact.detach()
        if variant == "shifted" and number == len(found) - 2:
            value, exact = value[:, 1:], exact[:, 1:]  # the shifted column cancels to nothing
        if exact.ndim == 0:  # a sum of terms of either sign
            assert float(value) == pytest.approx(float(exact), rel=tolerance, abs=tolerance)
        else:
            assert error(value, exact) <= tolerance, f"result {number}: {error(value, exact):.2e}"


@interpreted
@pytest.mark.parametrize("live", ["0", "01", "10", "0011", "110100100", "111000111", "000000001"])
def test_live_rows_come_first(live: str) -> None:
    from elpo_kernels.linear.triton_tiles import TritonTiles

    flags = torch.tensor([mark == "1" for mark in live])
    values = torch.randn(len(live), 70)
    place, count = values.clone(), int(flags.sum())
    order = TritonTiles(None).compact(place, flags, count)  # type: ignore[arg-type]
    assert sorted(order.tolist()) == flags.nonzero()[:, 0].tolist()
    assert torch.equal(place[:count], values[order])
    assert all(order[i] == i for i in range(count) if flags[i]), "moved without need"


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib",
         "-W", "ignore::RuntimeWarning", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed, 1 skipped" in run.stdout, run.stdout[-1000:]
