"""`linear_logprob` and `linear_policy_loss` against float64 autograd: values and all gradients.

bfloat16 is judged by what eager PyTorch makes of the same inputs: no value or gradient may be
farther from the truth than 1.1 times eager's, plus 2⁻⁹, half of bfloat16's unit roundoff. Both ways
to multiply bfloat16 are tested, whichever this CPU would choose.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from elpo_kernels import (
    backend,
    linear_logprob,
    linear_policy_loss,
    logprob_from_logits,
    policy_loss,
    reference,
)
from elpo_kernels.linear import cpu
from elpo_kernels.linear.tiling import Tiling
from kernel_cases import Case, error, improbable, make_case, true_policy, truth
from torch import Tensor

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "token-temperature": {"temperature": torch.linspace(0.5, 1.5, 61, dtype=torch.float64)},
    "softcap": {"softcap": 5.0, "bias": True, "temperature": 1.3},
    "peaked": {"spread": 12.0},
    "far-off-policy": {"drift": 6.0},
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-widened": torch.bfloat16,
}
ROUNDING = 2.0**-9

by_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    monkeypatch.setattr(cpu, "widens_bfloat16", lambda: request.param == "bf16-widened")
    return DTYPES[request.param]


def check(
    pairs: list[tuple[Tensor, Tensor]],
    eager: list[Tensor] | None,
    dtype: torch.dtype,
    terms: int = 0,
) -> None:
    """Every (value, truth) within the tolerance of `dtype`, or of eager's error in it. `terms`: of
    the long sums among them, whose roundings add up to a random walk."""
    walk = torch.finfo(dtype).eps / 2 * terms**0.5
    for number, (value, true) in enumerate(pairs):
        allowed = 1.1 * error(eager[number], true) + ROUNDING if eager else TOLERANCE[dtype] + walk
        found = error(value, true)
        assert found <= allowed, f"result {number}: error {found:.2e}, allowed {allowed:.2e}"


def by_eager(case: Case, entropy_coef: float = 0.0) -> list[Tensor]:
    """Loss, log-prob, entropy and gradients that plain PyTorch makes in the dtype of the case."""
    plain = case.leaves()
    values, entropy = truth(plain)
    loss = reference.policy_loss(values, *case.policy) - entropy_coef * entropy.sum()
    loss.backward()
    return [loss.detach(), values.detach(), entropy.detach(), *plain.gradients()]


def primitive(case: Case, f: Any, weights: Tensor, **extra: Any) -> tuple[list[Tensor], Case]:
    """Log-prob, entropy and the gradients of a random combination of both."""
    leaves = case.leaves()
    logprob, entropy = f(leaves.hidden, leaves.weight, case.targets, **leaves.options, **extra)
    (weights[0] * logprob + weights[1] * entropy).sum().backward()
    return [logprob.detach(), entropy.detach(), *leaves.gradients()], leaves


@by_variant
def test_logprob_and_entropy(dtype: torch.dtype, variant: str) -> None:
    case = make_case(dtype=dtype, **VARIANTS[variant])
    # Fixed: products near 60 depend on the number of rows by up to 1e-5, and entropy magnifies it.
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, len(case.targets), generator=generator, dtype=torch.float64)
    weights[:, ::3] = 0
    found, _ = primitive(case, linear_logprob, weights, return_entropy=True)
    exact, _ = primitive(case.leaves(torch.float64), reference.linear_logprob, weights)
    eager = None
    if dtype == torch.bfloat16:
        eager, _ = primitive(case, reference.linear_logprob, weights)
    check(list(zip(found, exact, strict=True)), eager, dtype)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[0].max() <= 0


@pytest.mark.parametrize("shift", [0.0, 40.0, -40.0])
@pytest.mark.parametrize("each", [False, True], ids=["one-temperature", "token-temperature"])
def test_gradient_at_improbable_targets(shift: float, each: bool) -> None:
    """Near log-prob −88, which float32 rounds by 4e-6: every row's gradient within 1e-5."""
    case = improbable(shift)
    leaves, exact = case.leaves(), case.leaves(torch.float64)
    temperature = torch.ones(64) if each else 1.0
    found = linear_logprob(*leaves.linear, temperature=temperature, return_entropy=True)
    for logprob, entropy in (found, truth(exact)):
        assert -97 < logprob.min() < logprob.max() < -77
        (logprob + 2 * entropy).sum().backward()
    for row, true in zip(leaves.gradients()[0], exact.gradients()[0], strict=True):
        assert error(row, true) <= 1e-5


@by_variant
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05], ids=["no-entropy", "entropy"])
def test_policy_loss(dtype: torch.dtype, variant: str, entropy_coef: float) -> None:
    case = make_case(dtype=dtype, **VARIANTS[variant])
    exact, loss, logprob = true_policy(case, entropy_coef)
    leaves = case.leaves()
    out = linear_policy_loss(
        *leaves.linear,
        *case.policy,
        entropy_coef=entropy_coef,
        return_entropy=True,
        logprob_for_all=True,
        **leaves.options,
    )
    out.loss.backward()
    eager = by_eager(case, entropy_coef) if dtype == torch.bfloat16 else None
    assert out.entropy is not None
    results = [out.loss.detach(), out.logprob, out.entropy, *leaves.gradients()]
    truths = [loss, logprob, truth(case)[1], *exact.gradients()]
    check(list(zip(results, truths, strict=True)), eager, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-widened"], indirect=True)
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary"),
    [(7, 577, 50257), (3, 576, 151936), (5, 3584, 32003), (1, 1, 1)],
)
def test_odd_shapes(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    case = make_case(tokens, width, vocabulary, dtype)
    exact, loss, logprob = true_policy(case)
    eager = None
    if dtype == torch.bfloat16:
        _, values, _, *gradients = by_eager(case)
        eager = [values, *gradients]
    for fused in (True, False):
        leaves = case.leaves()
        if fused:
            out = linear_policy_loss(*leaves.linear, *case.policy, logprob_for_all=True)
        else:
            out = policy_loss(linear_logprob(*leaves.linear), *case.policy)
        out.loss.backward()
        found = [out.logprob, *leaves.gradients()]
        pairs = list(zip(found, [logprob, *exact.gradients()], strict=True))
        check(pairs, eager, dtype, terms=vocabulary)  # what a hidden state's gradient adds up
        assert out.loss.item() == pytest.approx(loss.item(), rel=5e-3 if eager else 1e-5, abs=1e-5)


def test_statistics_count_unmasked_tokens_only() -> None:
    case = make_case(dtype=torch.float64, drift=0.6)
    stats = linear_policy_loss(*case.linear, *case.policy, ratio_cap=1.5).stats
    live = (case.pos != 0) | (case.neg != 0)
    log_ratio = (truth(case)[0] - case.old_logprob)[live]
    ratio = log_ratio.exp()
    low = (ratio < 1 - case.eps_low[live]) & (case.neg[live] != 0)
    high = (ratio > 1 + case.eps_high[live]) & (case.pos[live] != 0)
    assert low.any() and high.any()
    capped = (ratio > 1.5) & (case.neg[live] != 0)
    assert capped.any()
    expected = [live.sum(), *(x.double().mean() for x in (low, high, capped))]
    expected += [(ratio - 1 - log_ratio).mean(), ratio.mean(), ratio.max()]
    torch.testing.assert_close(torch.stack(list(stats)), torch.stack(expected).double())


@pytest.mark.parametrize("function", ["fused", "primitive", "logits"])
@pytest.mark.parametrize("kind", ["no-tokens", "all-masked", "all-ignored"])
def test_nothing_to_learn_gives_zeros(kind: str, function: str) -> None:
    case = make_case(0 if kind == "no-tokens" else 9)
    leaves = case.leaves()
    scale = 0 if kind == "all-masked" else 1
    targets = torch.full_like(case.targets, -100) if kind == "all-ignored" else case.targets
    pair = scale * case.pos, scale * case.neg
    if function == "fused":
        out = linear_policy_loss(leaves.hidden, leaves.weight, targets, case.old_logprob, *pair)
    else:
        if function == "primitive":
            logprob = linear_logprob(leaves.hidden, leaves.weight, targets)
        else:
            logprob = logprob_from_logits(leaves.hidden @ leaves.weight.t(), targets)
        if kind == "all-ignored":
            assert (logprob == 0).all()
            pair = torch.ones(9), torch.zeros(9)
        old = logprob.detach() if kind == "all-ignored" else case.old_logprob
        out = policy_loss(logprob, old, *pair)
    out.loss.backward()
    assert all((gradient == 0).all() for gradient in leaves.gradients())
    if function == "fused" or kind != "all-ignored":
        assert all((value == 0).all() for value in [out.loss.detach(), *out.stats])
    if function == "fused":
        assert (out.logprob == 0).all()


def test_all_clipped_gives_values_but_no_gradient() -> None:
    case = make_case(9)
    old = truth(case)[0] - 1
    leaves = case.leaves()
    out = linear_policy_loss(
        leaves.hidden, leaves.weight, case.targets, old, advantages=torch.ones(9), eps_high=0.25
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-1.25 * 8)
    assert out.stats.clipped_high == 1
    assert all((gradient == 0).all() for gradient in leaves.gradients())


@pytest.mark.parametrize("drift", [-20.0, 20.0, -100.0, 100.0])
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_extreme_ratios_stay_finite(dtype: torch.dtype, drift: float, sign: int) -> None:
    case = make_case(dtype=dtype)
    old = truth(case)[0] - drift
    valid = (case.targets != -100).double()
    pos, neg = (valid, 0 * valid) if sign > 0 else (0 * valid, -valid)
    leaves, exact = case.leaves(), case.leaves(torch.float64)
    out = linear_policy_loss(*leaves.linear, old, pos, neg)
    out.loss.backward()
    loss = reference.policy_loss(truth(exact)[0], old, pos, neg, 0.2, 0.2)
    loss.backward()
    # A ratio of e^20 multiplies the log-prob's own error by e^20.
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    assert error(out.loss.detach(), loss.detach()) <= tolerance
    for found, true in zip(leaves.gradients(), exact.gradients(), strict=True):
        assert error(found, true) <= tolerance or true.norm() == 0 == found.norm()


@pytest.mark.parametrize("shift", [100.0, -100.0])
@pytest.mark.parametrize("function", ["fused", "primitive"])
def test_shifted_logits(dtype: torch.dtype, shift: float, function: str) -> None:
    """Every logit moved by ±100: what the dtype can hold of it must stay."""
    case = make_case(dtype=dtype, shift=shift)
    exact, _, logprob = true_policy(case)
    leaves = case.leaves()
    if function == "fused":
        out = linear_policy_loss(*leaves.linear, *case.policy, logprob_for_all=True)
    else:
        out = policy_loss(linear_logprob(*leaves.linear), *case.policy)
    out.loss.backward()
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-3}[dtype]
    assert error(out.logprob, logprob) <= tolerance
    # The shifted column of the hidden gradient cancels to nothing by itself: leave it out.
    dx, true_dx = leaves.gradients()[0][:, 1:], exact.gradients()[0][:, 1:]
    assert error(dx, true_dx) <= 3 * tolerance
    assert error(leaves.gradients()[1], exact.gradients()[1]) <= 3 * tolerance


def test_unreachable_target_needs_a_new_anchor() -> None:
    """Log-prob near −400, where no power of the old anchor fits into float32."""
    case = make_case(9, dtype=torch.float32, spread=60.0)
    logprob, _ = truth(case)
    assert logprob.min() < -150
    exact = case.leaves(torch.float64)
    reference.policy_loss(truth(exact)[0], None, *case.policy[1:]).backward()
    leaves = case.leaves()
    out = linear_policy_loss(*leaves.linear, None, *case.policy[1:], logprob_for_all=True)
    out.loss.backward()
    assert error(out.logprob, logprob) <= 1e-5
    for found, true in zip(leaves.gradients(), exact.gradients(), strict=True):
        assert error(found, true) <= 1e-5


def test_masked_tokens_leak_nothing() -> None:
    case = make_case()
    masked = ((case.pos == 0) & (case.neg == 0)).nonzero()[:, 0]
    assert len(masked) > 4
    results = []
    for poison in (0.0, torch.nan, torch.inf, -torch.inf):
        old = case.old_logprob.clone()
        old[masked] = poison
        leaves = case.leaves()
        out = linear_policy_loss(*leaves.linear, old, *case.policy[1:])
        out.loss.backward()
        results.append([out.loss.detach(), out.logprob, *out.stats, *leaves.gradients()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert (results[0][1][masked] == 0).all()


def test_nan_of_an_unmasked_token_is_not_hidden() -> None:
    case = make_case()
    live = int((case.pos != 0).nonzero()[0])
    case.old_logprob[live] = torch.nan
    leaves = case.leaves()
    out = linear_policy_loss(*leaves.linear, *case.policy)
    out.loss.backward()
    assert out.loss.isnan()
    assert leaves.gradients()[0][live].isnan().all()


def test_advantages_and_weights_are_the_pair() -> None:
    case = make_case()
    advantages, weights, rho = torch.randn(61), torch.rand(61), torch.rand(61)
    pair = (weights * rho * advantages.clamp_min(0), weights * rho * advantages.clamp_max(0))
    old = truth(case)[0] + 0.1
    a = linear_policy_loss(*case.linear, old, *pair)
    b = linear_policy_loss(*case.linear, old, advantages=advantages, weights=weights, is_weight=rho)
    torch.testing.assert_close(a.loss, b.loss)


def test_frozen_head_and_frozen_body() -> None:
    case = make_case(dtype=torch.float64)
    exact, _, _ = true_policy(case)
    for frozen, other in (("hidden", "weight"), ("weight", "hidden")):
        leaves = case.leaves()
        getattr(leaves, frozen).requires_grad_(False)
        linear_policy_loss(*leaves.linear, *case.policy).loss.backward()
        assert getattr(leaves, frozen).grad is None
        assert error(getattr(leaves, other).grad, getattr(exact, other).grad) <= 1e-12


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sums_fit": False},
        {"block": 1 << 62, "grain": 5},
        {"block": 1 << 62, "grain": 5, "whole": 61},
    ],
    ids=["one-pass", "two-passes", "blocks-of-tiles", "all-rows-held"],
)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05], ids=["no-entropy", "entropy"])
def test_small_tiles_and_many_flushes(
    options: dict[str, Any],
    entropy_coef: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strips and blocks that divide nothing evenly; the result does not depend on the cut, nor on
    whether there is room for the weight's sum."""
    case = make_case(dtype=dtype)
    exact, loss, _ = true_policy(case, entropy_coef)
    cut = Tiling(rows=5, strip=19, kept=10, update=50, **options)
    monkeypatch.setattr(Tiling, "of", staticmethod(lambda *_: cut))
    leaves = case.leaves()
    out = linear_policy_loss(*leaves.linear, *case.policy, entropy_coef=entropy_coef)
    out.loss.backward()
    eager = None
    if dtype == torch.bfloat16:
        value, _, _, *gradients = by_eager(case, entropy_coef)
        eager = [value, *gradients]
    found = [out.loss.detach(), *leaves.gradients()]
    check(list(zip(found, [loss, *exact.gradients()], strict=True)), eager, dtype)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu_memory_is_bounded(products: torch.dtype) -> None:
    """What one pass keeps, with sums two bytes a weight wider than bfloat16 results or without."""
    fits = {}
    for vocabulary, width in ((49152, 576), (49152, 1536), (151936, 576), (151936, 1536)):
        for extra in (0, 2 * vocabulary * width):
            cut = Tiling.of((vocabulary, width), products, torch.device("cpu"), extra)
            kept = cut.kept * vocabulary * products.itemsize + extra * cut.sums_fit
            assert kept <= 200 << 20
            fits[vocabulary, width, extra > 0] = cut.sums_fit
    assert fits[49152, 576, True] and fits[151936, 1536, False]
    assert fits[49152, 1536, True] == (products == torch.bfloat16)
    assert not fits[151936, 576, True] and not fits[151936, 1536, True]


@pytest.mark.parametrize(
    "amx, avx512, vendor, limit, widens",
    [
        (True, True, "GenuineIntel", "AVX512", False),
        (False, True, "GenuineIntel", "AVX512", True),
        (False, True, "AuthenticAMD", "AVX512", False),
        (False, False, "AuthenticAMD", "AVX2", True),
        (True, True, "GenuineIntel", "AVX2", True),
    ],
)
def test_bfloat16_is_widened_where_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, vendor: str, limit: str, widens: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: limit)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(backend, "_processor", lambda: vendor)
    assert backend.widens_bfloat16.__wrapped__() is widens


def test_triton_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo traces the choice, but not through the import system."""
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: pytest.fail("looked again"))
    cpu = torch.device("cpu")
    assert backend.resolve_backend("triton", cpu, torch.float32) == "triton"
    monkeypatch.setattr(backend, "TRITON", False)
    with pytest.raises(RuntimeError, match="needs the triton package"):
        backend.resolve_backend("triton", cpu, torch.float32)


def test_gradients_are_bitwise_repeatable() -> None:
    runs = []
    for _ in range(2):
        leaves = make_case(dtype=torch.bfloat16).leaves()
        linear_policy_loss(*leaves.linear, *leaves.policy).loss.backward()
        runs.append(leaves.gradients())
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((9,), 307)}, "outside the vocabulary of 307"),
        ({"targets": torch.full((9,), -1)}, r"targets\[0\] = -1"),
        ({"targets": torch.zeros(8, dtype=torch.int64)}, "targets must be"),
        ({"old_logprob": torch.zeros(3)}, "old_logprob must be"),
        ({"pos_coef": -torch.ones(9)}, "pos_coef must be >= 0"),
        ({"neg_coef": torch.ones(9)}, "neg_coef must be <= 0"),
        ({"advantages": torch.ones(9)}, "either advantages"),
        ({"weights": torch.ones(9)}, "weights go with advantages"),
        ({"ratio_cap": 0.5}, "ratio_cap must be >= 1"),
        ({"eps_low": -0.1}, "eps_low must be >= 0"),
        ({"temperature": 0.0}, "temperature must be finite"),
        ({"softcap": -1.0}, "softcap must be finite"),
        ({"bias": torch.zeros(3)}, "bias must be"),
        ({"hidden": torch.zeros(9, 5)}, "hidden"),
        ({"hidden": torch.zeros(9, 24, dtype=torch.float16)}, "float16"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_raise_one_clear_error(change: dict[str, Any], message: str) -> None:
    case = make_case(9)
    arguments = {
        "hidden": case.hidden,
        "weight": case.weight,
        "targets": case.targets,
        "old_logprob": case.old_logprob,
        "pos_coef": case.pos,
        "neg_coef": case.neg,
    }
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**{**arguments, **change})


def test_ignore_index_may_be_any_number() -> None:
    case = make_case(9)
    moved = torch.where(case.targets == -100, 5000, case.targets)
    a = linear_logprob(*case.linear)
    b = linear_logprob(case.hidden, case.weight, moved, ignore_index=5000)
    assert torch.equal(a, b)
