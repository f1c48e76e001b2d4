"""`logprob_from_logits`, `logits_policy_loss` and `policy_loss` against float64 autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elpo_kernels import logits_policy_loss, logprob_from_logits, policy_loss, reference
from kernel_cases import Case, error, make_case
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}
by_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
by_variant = pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"temperature": torch.linspace(0.5, 2, 61)}, {"softcap": 4.0}],
    ids=["plain", "temperature", "token-temperature", "softcap"],
)
in_place_or_not = pytest.mark.parametrize("in_place", [False, True], ids=["new", "in-place"])


def logits_of(case: Case, dtype: torch.dtype) -> Tensor:
    return (case.hidden.double() @ case.weight.double().t()).to(dtype)


def truth(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The reference with the identity as the head."""
    return reference.linear_logprob(
        logits, torch.eye(logits.shape[1], dtype=logits.dtype), targets, **options
    )


def leaf(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A leaf and an intermediate of it that may be overwritten."""
    root = logits.to(dtype, copy=True).requires_grad_()
    return root, root * 1


@by_dtype
@by_variant
@in_place_or_not
def test_logprob_and_entropy(dtype: torch.dtype, options: dict[str, Any], in_place: bool) -> None:
    case = make_case()
    logits = logits_of(case, dtype)
    weights = torch.randn(2, 61, dtype=torch.float64)
    weights[:, ::3] = 0
    root, given = leaf(logits, dtype)
    found = logprob_from_logits(
        given, case.targets, return_entropy=True, in_place=in_place, **options
    )
    (weights[0] * found[0] + weights[1] * found[1]).sum().backward()
    exact, _ = leaf(logits, torch.float64)
    true = truth(exact, case.targets, **options)
    (weights[0] * true[0] + weights[1] * true[1]).sum().backward()
    assert error(found[0].detach(), true[0].detach()) <= min(TOLERANCE[dtype], 1e-5)
    assert error(found[1].detach(), true[1].detach()) <= min(TOLERANCE[dtype], 1e-5)
    assert error(root.grad, exact.grad) <= TOLERANCE[dtype]
    assert torch.equal(given.detach(), logits) != in_place


@by_dtype
@by_variant
@in_place_or_not
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1], ids=["no-entropy", "entropy"])
def test_policy_loss(
    dtype: torch.dtype, options: dict[str, Any], in_place: bool, entropy_coef: float
) -> None:
    case = make_case()
    logits = logits_of(case, dtype)
    root, given = leaf(logits, dtype)
    out = logits_policy_loss(
        given, case.targets, *case.policy,
        entropy_coef=entropy_coef, return_entropy=True, in_place=in_place, **options,
    )  # fmt: skip
    (3 * out.loss).backward()
    exact, _ = leaf(logits, torch.float64)
    logprob, entropy = truth(exact, case.targets, **options)
    loss = reference.policy_loss(logprob, *case.policy) - entropy_coef * entropy.sum()
    (3 * loss).backward()
    live = (case.pos != 0) | (case.neg != 0)
    assert error(out.loss.detach(), loss.detach()) <= 1e-5
    assert error(out.logprob[live], logprob.detach()[live]) <= 1e-5
    assert error(root.grad, exact.grad) <= TOLERANCE[dtype]
    if not entropy_coef:
        assert (root.grad[~live] == 0).all()


def test_masked_vocabulary() -> None:
    """Logits of −inf are tokens that cannot be drawn."""
    case = make_case()
    logits = logits_of(case, torch.float32)
    allowed = torch.rand(logits.shape) < 0.5
    allowed[torch.arange(61), case.targets.clamp_min(0)] = True
    allowed[0] = False
    allowed[0, case.targets[0]] = True
    root = logits.masked_fill(~allowed, -torch.inf).requires_grad_()
    logprob, entropy = logprob_from_logits(root, case.targets, return_entropy=True)
    (logprob + entropy).sum().backward()
    exact = logits.double().masked_fill(~allowed, -1e9).requires_grad_()
    true = truth(exact, case.targets)
    (true[0] + true[1]).sum().backward()
    assert error(logprob.detach(), true[0].detach()) <= 1e-5
    assert error(entropy.detach(), true[1].detach()) <= 1e-5
    assert error(root.grad, exact.grad) <= 1e-5
    assert logprob[0] == entropy[0] == 0


def test_impossible_target_has_logprob_minus_infinity() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0]])
    logprob, entropy = logprob_from_logits(logits, torch.tensor([0]), return_entropy=True)
    assert logprob == -torch.inf
    assert entropy == pytest.approx(0.6931472)


@pytest.mark.parametrize("coefs", ["pair", "advantages"])
def test_elementwise_loss(coefs: str) -> None:
    case = make_case(drift=0.5)
    logprob = case.old_logprob.nan_to_num(-1) + 0.5 * torch.randn(61).double()
    entropy = torch.rand(61, dtype=torch.float64)
    mine, true = [(x.clone().requires_grad_(), entropy.clone().requires_grad_())
                  for x in (logprob, logprob)]  # fmt: skip
    pos, neg = case.pos, case.neg
    given: dict[str, Any] = {"pos_coef": pos, "neg_coef": neg}
    if coefs == "advantages":
        advantages = pos + neg
        pos, neg = advantages.clamp_min(0), advantages.clamp_max(0)
        given = {"advantages": advantages}
    out = policy_loss(
        mine[0], case.old_logprob, eps_low=case.eps_low, eps_high=case.eps_high,
        ratio_cap=1.6,
        entropy=mine[1], entropy_coef=0.3, **given,
    )  # fmt: skip
    out.loss.backward()
    loss = reference.policy_loss(
        true[0], case.old_logprob, pos, neg, case.eps_low, case.eps_high, 1.6
    ) - 0.3 * true[1].sum()  # fmt: skip
    loss.backward()
    assert error(out.loss.detach(), loss.detach()) <= 1e-12
    assert error(mine[0].grad, true[0].grad) <= 1e-12
    assert error(mine[1].grad, true[1].grad) <= 1e-12


def test_infinite_upper_bound_is_no_bound() -> None:
    logprob = torch.tensor([0.0, 0.0], requires_grad=True)
    out = policy_loss(
        logprob, torch.tensor([-3.0, -3.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, -1.0]),
        eps_high=torch.inf,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0, abs=1e-5)
    assert logprob.grad.tolist() == pytest.approx([-20.0855, 20.0855], rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 3, 4), r"logits must be \[T, V\]"),
        (torch.zeros(4, 3).t(), "contiguous along the vocabulary"),
        (torch.zeros(3, 4, dtype=torch.float16), "float16"),
        (torch.zeros(3, 1), "outside the vocabulary of 1"),
    ],
    ids=["3d", "transposed", "half", "target"],
)
def test_wrong_logits_raise_one_clear_error(logits: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logprob_from_logits(logits, torch.tensor([0, 1, 0]))
