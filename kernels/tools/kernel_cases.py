"""Random problems and their float64 truth, for tests and benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from elpo_kernels import TreePlan, reference
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One head problem with per-token policy inputs, exactly representable in `dtype`."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprob: Tensor
    pos: Tensor
    neg: Tensor
    eps_low: Tensor
    eps_high: Tensor
    options: dict[str, Any] = field(default_factory=dict)  # bias, temperature, softcap

    @property
    def policy(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.old_logprob, self.pos, self.neg, self.eps_low, self.eps_high

    @property
    def linear(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.targets

    def to(self, device: str) -> Case:
        """The same case on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        moved["options"] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return Case(**moved)

    def leaves(self, dtype: torch.dtype | None = None) -> Case:
        """Fresh leaves that require gradients, in `dtype`."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()

        options = dict(self.options)
        if options.get("bias") is not None:
            options["bias"] = leaf(options["bias"])
        return replace(self, hidden=leaf(self.hidden), weight=leaf(self.weight), options=options)

    def gradients(self) -> list[Tensor]:
        """Of hidden, weight and, where there is one, bias; of `leaves()` after a backward."""
        tensors = [self.hidden, self.weight, self.options.get("bias")]
        return [tensor.grad for tensor in tensors if tensor is not None]  # type: ignore[misc]


def make_case(
    tokens: int = 61,
    width: int = 24,
    vocabulary: int = 307,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    shift: float = 0.0,
    drift: float = 0.3,
    bias: bool = False,
    spread: float = 3.0,
    **options: Any,
) -> Case:
    """Random logits of standard deviation `spread`; about a fifth of the tokens masked (their
    old log-prob is NaN), some with both coefficients, log-ratios of deviation `drift`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(tokens, width), normal(vocabulary, width) * spread / width**0.5
    if shift:
        hidden[:, 0], weight[:, 0] = 1, shift
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if bias:
        options["bias"] = normal(vocabulary).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    if tokens > 4:
        targets[4] = -100
    double = hidden.double(), weight.double()
    logprob, _ = reference.linear_logprob(*double, targets, **options)
    advantages = normal(tokens)
    pos, neg = advantages.clamp_min(0), advantages.clamp_max(0)
    pos[1::7], neg[1::7] = 0.7, -0.4
    masked = torch.rand(tokens, generator=generator) < 0.2
    masked |= targets == -100
    pos[masked], neg[masked] = 0, 0
    old = logprob + drift * normal(tokens)
    old[masked] = torch.nan
    bounds = torch.rand(2, tokens, generator=generator, dtype=torch.float64) * 0.4
    return Case(hidden, weight, targets, old, pos, neg, bounds[0], bounds[1], options)


def improbable(shift: float = 0.0) -> Case:
    """Targets near log-prob −88 under a head that is the identity, whose products are exact."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 40, generator=generator) + shift
    targets = torch.randint(40, (64,), generator=generator)
    logits[torch.arange(64), targets] -= 80
    nothing = torch.zeros(64)
    return Case(logits, torch.eye(40), targets, *[nothing] * 5)


def truth(case: Case) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy by the reference in the dtype of `case.hidden`, at least float64 for
    inputs that do not require gradients."""
    hidden, weight = case.hidden, case.weight
    if not hidden.requires_grad:
        hidden, weight = hidden.double(), weight.double()
    return reference.linear_logprob(hidden, weight, case.targets, **case.options)


def true_policy(
    case: Case, entropy_coef: float | Tensor = 0.0, ratio_cap: float = math.inf
) -> tuple[Case, Tensor, Tensor]:
    """Float64 leaves with gradients filled, the loss and the log-prob."""
    leaves = case.leaves(torch.float64)
    logprob, entropy = truth(leaves)
    loss = reference.policy_loss(logprob, *case.policy, ratio_cap)
    loss = loss - (entropy_coef * entropy).sum()
    loss.backward()
    return leaves, loss.detach(), logprob.detach()


def error(value: Tensor, true: Tensor) -> float:
    """Relative error in the Euclidean norm; NaN and inf count as infinite."""
    assert value.shape == true.shape
    if not value.isfinite().all():
        return float("inf")
    return float((value.double() - true.double()).norm() / true.double().norm().clamp_min(1e-300))


def make_forest(trees: int, tokens: int, *, branching: float, seed: int = 0) -> TreePlan:
    """Random packed trees of `tokens` tokens each, branching anywhere on the current path.

    Made from predecessors alone: `end` is where the last descendant of a token ends.
    """
    generator = torch.Generator().manual_seed(seed)
    size = trees * tokens
    end, position = torch.arange(1, size + 1), torch.zeros(size, dtype=torch.int64)
    jumps, depths = torch.rand(2, size, generator=generator)
    path: list[int] = []
    for token in range(size):
        if token % tokens == 0:
            path = []
        elif jumps[token] < branching:
            del path[1 + int(depths[token] * (len(path) - 1)) :]
        position[token] = len(path)
        path.append(token)
        end[path] = token + 1
    return TreePlan(end, position)


def true_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    above: Tensor,
    plan: TreePlan,
    *,
    window: int | None,
    scale: float,
) -> list[Tensor]:
    """Float64 output and gradients of query, key and value for the output's gradient `above`."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    out = reference.tree_attention(*leaves, plan.allowed(window or 0), scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, above.double())]
