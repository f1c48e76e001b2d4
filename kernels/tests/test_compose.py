"""The operators inside what people build around them: LoRA, autocast, compile, checkpointing, …"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elpo_kernels import (
    LoRA,
    linear_logprob,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    reference,
)
from elpo_kernels.linear import cpu
from elpo_kernels.linear.tiling import Tiling
from kernel_cases import error, make_case, true_policy
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("function", ["fused", "primitive"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen-base", "trained-base"])
def test_lora_on_the_head(function: str, frozen: bool) -> None:
    case = make_case(dtype=torch.float64, bias=True)
    gradients = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(1)
        a, b = (torch.randn(*shape, generator=generator).double().requires_grad_()
                for shape in ((4, 24), (307, 4)))  # fmt: skip
        leaves = case.leaves()
        leaves.weight.requires_grad_(not frozen)
        if not fused:
            merged = leaves.weight + 0.5 * b @ a
            logprob, _ = reference.linear_logprob(
                leaves.hidden, merged, case.targets, **leaves.options
            )
            loss = reference.policy_loss(logprob, *case.policy)
        elif function == "fused":
            loss = linear_policy_loss(
                *leaves.linear, *case.policy, lora=LoRA(a, b, 0.5), **leaves.options
            ).loss
        else:
            logprob = linear_logprob(*leaves.linear, lora=LoRA(a, b, 0.5), **leaves.options)
            loss = policy_loss(logprob, *case.policy).loss
        loss.backward()
        tensors = [a, b, leaves.hidden, leaves.options["bias"]]
        assert (leaves.weight.grad is None) == frozen
        gradients.append([t.grad for t in tensors + [leaves.weight] * (not frozen)])
    assert all(error(found, true) <= 1e-11 for found, true in zip(*gradients, strict=True))


def test_tied_embedding_gets_both_gradients() -> None:
    case = make_case(dtype=torch.float64)
    ids = torch.randint(307, (61,))
    grads = []
    for fused in (True, False):
        weight = case.weight.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(ids, weight).tanh()
        if fused:
            loss = linear_policy_loss(hidden, weight, case.targets, *case.policy).loss
        else:
            logprob, _ = reference.linear_logprob(hidden, weight, case.targets)
            loss = reference.policy_loss(logprob, *case.policy)
        loss.backward()
        grads.append(weight.grad)
    assert error(grads[0], grads[1]) <= 1e-11


def test_main_grad_is_added_to_and_scaling_refused() -> None:
    case = make_case()
    exact, _, _ = true_policy(case)
    main_grad = torch.ones_like(case.weight)
    leaves = case.leaves()
    linear_policy_loss(*leaves.linear, *case.policy, main_grad=main_grad).loss.backward()
    assert leaves.weight.grad is None
    assert error(main_grad - 1, exact.weight.grad) <= 1e-5
    assert error(leaves.hidden.grad, exact.hidden.grad) <= 1e-5
    out = linear_policy_loss(*leaves.linear, *case.policy, main_grad=main_grad)
    with pytest.raises(RuntimeError, match="upstream gradient of 1"):
        (out.loss / 2).backward()


def test_main_grad_under_checkpointing_is_refused() -> None:
    case = make_case()
    leaves = case.leaves()
    main_grad = torch.zeros_like(case.weight)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_loss(
            hidden, weight, case.targets, *case.policy, main_grad=main_grad
        ).loss

    loss = checkpoint(step, leaves.hidden, leaves.weight, use_reentrant=False)
    with pytest.raises(RuntimeError, match="outside the checkpointed region"):
        loss.backward()


@pytest.mark.parametrize("main_grad", [torch.zeros(3), torch.zeros(307, 24).bfloat16()])
def test_wrong_main_grad_raises(main_grad: Tensor) -> None:
    leaves = make_case().leaves()
    with pytest.raises(ValueError, match=r"main_grad must be float32 \[307, 24\]"):
        linear_policy_loss(*leaves.linear, *leaves.policy, main_grad=main_grad)


def test_an_entropy_bonus_needs_the_entropy_of_each_token() -> None:
    case = make_case()
    logprob = torch.full((len(case.targets),), -1.0)
    with pytest.raises(ValueError, match="needs the tokens' entropy"):
        policy_loss(logprob, *case.policy, entropy_coef=0.1)
    with pytest.raises(ValueError, match="entropy_coef"):
        policy_loss(logprob, *case.policy, entropy=-logprob, entropy_coef=torch.ones(1))


def test_second_backward_is_refused() -> None:
    leaves = make_case().leaves()
    loss = linear_policy_loss(*leaves.linear, *leaves.policy).loss
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("function", ["fused", "primitive"])
def test_gradient_checkpointing(function: str, reentrant: bool) -> None:
    case = make_case(dtype=torch.float64)
    exact, _, _ = true_policy(case)
    leaves = case.leaves()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        if function == "fused":
            return linear_policy_loss(hidden, weight, case.targets, *case.policy).loss
        return policy_loss(linear_logprob(hidden, weight, case.targets), *case.policy).loss

    checkpoint(step, leaves.hidden, leaves.weight, use_reentrant=reentrant).backward()
    for found, true in zip(leaves.gradients(), exact.gradients(), strict=True):
        assert error(found, true) <= 1e-12


def test_autocast_keeps_a_float32_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Master weights in float32: products run in bfloat16, their sum is not rounded to it."""
    case = make_case(dtype=torch.bfloat16)
    exact, _, _ = true_policy(case)
    leaves = case.leaves(torch.float32)
    cut = Tiling(rows=8, strip=100, kept=8, update=64)
    monkeypatch.setattr(Tiling, "of", staticmethod(lambda *_: cut))
    with torch.autocast("cpu", torch.bfloat16):
        linear_policy_loss(*leaves.linear, *case.policy).loss.backward()
    gradient = leaves.weight.grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())
    assert error(gradient, exact.weight.grad) <= 4e-3
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16"):
        linear_policy_loss(*leaves.linear, *case.policy)


@pytest.mark.parametrize("function", ["fused", "primitive"])
@pytest.mark.parametrize("widened", [False, True], ids=["bf16", "widened"])
def test_autocast_rounds_hidden_states_and_nothing_within(
    function: str, widened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same to the last bit as hidden states in bfloat16 without autocast, backward included."""
    monkeypatch.setattr(cpu, "widens_bfloat16", lambda: widened)
    case = make_case(dtype=torch.float32, bias=True)
    found = []
    for autocast in (True, False):
        leaves = case.leaves()
        hidden = leaves.hidden if autocast else leaves.hidden.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            bias = leaves.options["bias"]
            if function == "fused":
                loss = linear_policy_loss(
                    hidden, leaves.weight, case.targets, *case.policy, bias=bias
                ).loss
            else:
                loss = linear_logprob(hidden, leaves.weight, case.targets, bias=bias).sum()
            loss.backward()
        found.append([loss.detach(), *leaves.gradients()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_grad_makes_no_gradients() -> None:
    leaves = make_case().leaves()
    with torch.no_grad():
        out = linear_policy_loss(*leaves.linear, *leaves.policy)
    assert not out.loss.requires_grad
    exact = linear_policy_loss(*leaves.linear, *leaves.policy)
    torch.testing.assert_close(out.loss, exact.loss.detach())


def _fused(hidden: Tensor, weight: Tensor, case: Any) -> Tensor:
    scaled = torch.nn.functional.silu(hidden)
    return linear_policy_loss(scaled, weight, case.targets, *case.policy, entropy_coef=0.1).loss / 7


def _primitive(hidden: Tensor, weight: Tensor, case: Any) -> Tensor:
    logprob, entropy = linear_logprob(hidden.sin(), weight, case.targets, return_entropy=True)
    return policy_loss(logprob, *case.policy, entropy=entropy, entropy_coef=0.1).loss / 7


def _in_place(hidden: Tensor, weight: Tensor, case: Any) -> Tensor:
    logits = hidden.sin() @ weight.t()
    return logits_policy_loss(logits, case.targets, *case.policy, in_place=True).loss / 7


@pytest.mark.parametrize("function", [_fused, _primitive, _in_place])
def test_compiled_caller_has_no_graph_break(function: Any) -> None:
    case = make_case(dtype=torch.float64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled):
        leaves = case.leaves()
        loss = f(leaves.hidden, leaves.weight, case)
        loss.backward()
        results.append([loss.detach(), *leaves.gradients()])
    assert all(error(found, true) <= 1e-12 for found, true in zip(*results, strict=True))


def test_operators_pass_the_library_checks() -> None:
    """Schema, fakes, autograd registration and AOT dispatch of every operator."""
    case = make_case(7, dtype=torch.float64)
    leaves = case.leaves()
    xs, weights = [leaves.hidden], [leaves.weight]
    scalars = (1.0, 0.0, 0, "", -100, "torch")
    ops = torch.ops.elpo_kernels
    half = torch.full((), 0.2, dtype=torch.float64)
    pos, neg = case.pos, case.neg
    check = library.opcheck
    check(ops.linear_logprob, (xs, weights, None, None, case.targets, *scalars, True))
    check(
        ops.linear_policy,
        ([case.hidden], [case.weight], None, None, case.targets, *scalars, case.old_logprob,
         pos, neg, half, half, 3.0, None, None, True, False, [True, True, False]),
    )  # fmt: skip
    logits = (case.hidden @ case.weight.t()).requires_grad_()
    check(ops.logits_logprob, (logits, None, case.targets, 1.0, 0.0, -100, "torch", True, False))
    logprob = case.old_logprob.nan_to_num(-1).requires_grad_()
    check(ops.policy_loss, (logprob, case.old_logprob, pos, neg, half, half, 3.0, "torch"))
    check(ops.with_gradients, (half, xs, [torch.ones_like(case.hidden)], False))
