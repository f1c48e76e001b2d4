"""The three operators of a head, each with fake and autograd formula.

`elpo_kernels::linear_logprob` computes the logits once more in its backward.
`elpo_kernels::linear_policy` makes the gradients in its forward, for an upstream gradient of one,
and only scales them afterwards. Gradients come in the order xs, weights, bias, as a list or, from
`linear_policy`, as tensors; what was not asked for is an empty tensor, because operators cannot
return `None`. Operators take the fields of `HeadInputs` and `Clip` one by one; `schema.operator`
puts the records together again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from elpo_kernels.backend import resolve_backend
from elpo_kernels.checks import accumulation, chosen_tokens
from elpo_kernels.linear.head import Head, HeadInputs
from elpo_kernels.linear.one_pass import Objective, loss_and_gradients
from elpo_kernels.linear.passes import Found, Problem, Tiles, backward, forward
from elpo_kernels.linear.tiling import Tiling
from elpo_kernels.policy import Clip
from elpo_kernels.schema import operator, taking


def _as_asked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast is off within: the dtypes of all products are chosen here."""

    @functools.wraps(function)
    def run(head: HeadInputs, *rest: Any) -> Any:
        with torch.autocast(head.xs[0].device.type, enabled=False):
            return function(head, *rest)

    return run


def _problem(given: HeadInputs, needs: Sequence[bool], sums: int = 0) -> Problem:
    """What there is to compute, and who does. `sums`: see `Tiling.of`."""
    device, dtype = given.xs[0].device, given.xs[0].dtype
    acc = accumulation(dtype)
    group = _resolve_process_group(GroupName(given.group)) if given.group else None
    backend = resolve_backend(given.backend, device, dtype)
    products = dtype
    if device.type == "cpu" and backend == "torch":
        from elpo_kernels.linear import cpu

        products = cpu.products_dtype(dtype, group)
    scale: float | Tensor = 1 / given.temperature
    if given.temperatures is not None:
        scale = (1 / given.temperatures.to(acc))[:, None]
    shape = given.weights[0].shape
    head = Head(
        weights=tuple(w if products != dtype else w.to(dtype) for w in given.weights),
        dtype=products,
        bias=None if given.bias is None else given.bias.to(acc),
        softcap=given.softcap,
        inv_temperature=scale,
        first=given.first,
        group=group,
        tiling=Tiling.of((shape[0], shape[1]), products, device, sums),
    )
    tiles: Tiles
    if backend == "triton":
        # Imported here: whether kernels are compiled or interpreted is settled at import.
        from elpo_kernels.linear.triton_tiles import TritonTiles

        tiles = TritonTiles(head)
    else:
        from elpo_kernels.linear.torch_tiles import TorchTiles

        tiles = TorchTiles(head)
    xs = tuple(x.to(dtype) for x in given.xs)
    return Problem(tiles, xs, given.targets, given.tensors, needs)


def _size(head: Head, device: torch.device) -> int:
    """Tokens of the vocabulary, over all shards."""
    if head.group is None:
        return head.vocabulary
    return int(head.all_reduce(torch.tensor(head.vocabulary, device=device)))


def _fake_gradients(given: HeadInputs, needs: Sequence[bool]) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape) if need and tensor is not None else given.xs[0].new_empty(0)
        for need, tensor in zip(needs, given.tensors, strict=True)
    ]


@operator("linear_logprob", HeadInputs, "bool want_entropy", returns="(Tensor, Tensor, Tensor)")
@_as_asked
def linear_logprob_op(given: HeadInputs, want_entropy: bool) -> Found:
    """Log-prob, entropy and, for the backward, log2 Σ e^logit `[T]`."""
    problem = _problem(given, [False] * len(given.tensors))
    size = _size(problem.head, given.targets.device)
    index = chosen_tokens(given.valid, given.targets, size, given.ignore_index)
    return forward(problem, index, want_entropy)


@linear_logprob_op.register_fake
@taking(HeadInputs)
def _(given: HeadInputs, want_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = given.xs[0]
    values = x.new_empty(len(x), dtype=accumulation(x.dtype))
    return values, torch.empty_like(values), torch.empty_like(values)


@operator(
    "linear_logprob_backward",
    HeadInputs,
    Found,
    "Tensor grad_logprob, Tensor? grad_entropy, bool[] needs",
    returns="Tensor[]",
)
@_as_asked
def linear_logprob_backward_op(
    given: HeadInputs,
    found: Found,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of xs, weights and bias."""
    problem = _problem(given, needs)
    live = grad_logprob != 0
    if grad_entropy is not None:
        live |= grad_entropy != 0
    index = (live & given.valid).nonzero()[:, 0]
    return backward(problem, found, grad_logprob, grad_entropy, index)


@linear_logprob_backward_op.register_fake
@taking(HeadInputs)
def _(given: HeadInputs, *rest: Any) -> list[Tensor]:
    return _fake_gradients(given, rest[-1])


def _save_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *fields, ctx.want_entropy = inputs
    given = HeadInputs(*fields)
    ctx.parts, ctx.numbers = len(given.xs), given[5:]
    ctx.needs = [tensor is not None and tensor.requires_grad for tensor in given.tensors]
    ctx.save_for_backward(*given.tensors, given.temperatures, given.targets, *output)


def _logprob_backward(
    ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, unused: Tensor
) -> tuple[Any, ...]:
    *tensors, bias, temperatures, targets, logprob, entropy, log_sum = ctx.saved_tensors
    xs, weights = tensors[: ctx.parts], tensors[ctx.parts :]
    given = HeadInputs(xs, weights, bias, temperatures, targets, *ctx.numbers)
    gradients = torch.ops.elpo_kernels.linear_logprob_backward(
        *given,
        *Found(logprob, entropy, log_sum),
        grad_logprob,
        grad_entropy if ctx.want_entropy else None,
        ctx.needs,
    )
    wanted = [grad if need else None for grad, need in zip(gradients, ctx.needs, strict=True)]
    return wanted[: ctx.parts], wanted[ctx.parts : -1], wanted[-1], *(None,) * 9


linear_logprob_op.register_autograd(_logprob_backward, setup_context=_save_logprob)


@operator(
    "linear_policy",
    HeadInputs,
    Clip,
    "Tensor? entropy_coef, Tensor(a!)? main_grad",
    "bool want_entropy, bool all_tokens, bool[] needs",
    returns="(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    mutates=("main_grad",),
)
@_as_asked
def linear_policy_op(
    given: HeadInputs,
    clip: Clip,
    entropy_coef: Tensor | None,
    main_grad: Tensor | None,
    want_entropy: bool,
    all_tokens: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Loss, log-prob `[T]`, entropy `[T]`, statistics `[7]` and five gradients, the last ones empty
    where there are fewer inputs (an operator that writes to an input cannot return a list). The
    weight's gradient is added to `main_grad` where one is given."""
    parts = len(given.xs)
    narrow = [
        weight
        for i, (weight, want) in enumerate(zip(given.weights, needs[parts:-1], strict=True))
        if want and (i or main_grad is None)
    ]
    acc = accumulation(given.xs[0].dtype)
    sums = sum(w.numel() * max(0, acc.itemsize - w.itemsize) for w in narrow)
    problem = _problem(given, needs, sums)
    valid = given.valid
    entropy_coef = None if entropy_coef is None else torch.where(valid, entropy_coef, 0)
    objective = Objective(clip.masked(valid), entropy_coef, given.backend)
    live = objective.live()
    size, chosen = _size(problem.head, valid.device), valid if all_tokens else live
    signs = clip.pos, clip.neg
    index = chosen_tokens(chosen, given.targets, size, given.ignore_index, *signs)
    result = loss_and_gradients(problem, objective, index, want_entropy, main_grad)
    return *result[:4], *_five(result.gradients)


@linear_policy_op.register_fake
@taking(HeadInputs, Clip)
def _(
    given: HeadInputs, clip: Clip, entropy_coef: Tensor | None, main_grad: Any, *rest: Any
) -> tuple[Tensor, ...]:
    x, needs = given.xs[0], list(rest[-1])
    values = x.new_empty(len(x), dtype=accumulation(x.dtype))
    if main_grad is not None:
        needs[len(given.xs)] = False
    gradients = _five(_fake_gradients(given, needs))
    return values.new_empty(()), values, torch.empty_like(values), values.new_empty(7), *gradients


def _five(gradients: list[Tensor]) -> tuple[Tensor, ...]:
    return *gradients, *(gradients[0].new_empty(0) for _ in range(5 - len(gradients)))
