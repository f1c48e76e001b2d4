"""The two operators behind `linear.py`, each with fake and autograd formula.

`elpo_kernels::linear_logprob` computes the logits once more in its backward.
`elpo_kernels::linear_policy` makes the gradients in its forward, for an upstream gradient of one,
and only scales them afterwards. Both take the hidden states and the weights as lists of equal
length, of which the second members are the low-rank part. Gradients are lists in the order xs,
weights, bias; what was not asked for is an empty tensor, because operators cannot return `None`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, library
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from elpo_kernels._backend import resolve_backend, widens_bfloat16
from elpo_kernels._checks import accumulation, chosen_tokens
from elpo_kernels._engine import Tiles, Wanted, backward, forward
from elpo_kernels._fused import Policy, fused
from elpo_kernels._head import Head, Tiling
from elpo_kernels._torch_tiles import TorchTiles


def _as_asked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast is off within: the dtypes of all products are chosen here."""

    @functools.wraps(function)
    def run(xs: Sequence[Tensor], *rest: Any, **named: Any) -> Any:
        with torch.autocast(xs[0].device.type, enabled=False):
            return function(xs, *rest, **named)

    return run


def _head(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    token_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    first: int,
    group: str,
    backend: str,
    sums: int = 0,
) -> tuple[Head, tuple[Tensor, ...]]:
    """The head and xs of one dtype. `sums`: see `Tiling.of`."""
    device, dtype = xs[0].device, xs[0].dtype
    acc = accumulation(dtype)
    shards = _resolve_process_group(GroupName(group)) if group else None
    widened = False
    on_cpu = device.type == "cpu" and resolve_backend(backend, device, dtype) == "torch"
    if dtype == torch.bfloat16 and on_cpu:
        widened = _agreed(widens_bfloat16(), shards)
    products = acc if widened else dtype
    scale: float | Tensor = 1 / temperature
    if token_temperature is not None:
        scale = (1 / token_temperature.to(acc))[:, None]
    head = Head(
        weights=tuple(weight if widened else weight.to(dtype) for weight in weights),
        dtype=products,
        bias=None if bias is None else bias.to(acc),
        softcap=softcap,
        inv_temperature=scale,
        first=first,
        group=shards,
        tiling=Tiling.of((weights[0].shape[0], weights[0].shape[1]), products, device, sums),
    )
    return head, tuple(x.to(dtype) for x in xs)


def _agreed(choice: bool, group: dist.ProcessGroup | None) -> bool:
    """True where any of the group's processes chose so: shards must share their anchors."""
    if group is not None:
        flag = torch.tensor(int(choice))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        return bool(flag)
    return choice


def _tiles(head: Head, backend: str) -> Tiles:
    """Tile arithmetic of `backend`."""
    if resolve_backend(backend, head.weights[0].device, head.dtype) == "torch":
        return TorchTiles(head)
    # Imported here: whether kernels are compiled or interpreted is settled at import.
    from elpo_kernels._triton_tiles import TritonTiles

    return TritonTiles(head)


def _size(head: Head, device: torch.device) -> int:
    """Tokens of the vocabulary, over all shards."""
    if head.group is None:
        return head.vocabulary
    return int(head.all_reduce(torch.tensor(head.vocabulary, device=device)))


def _wanted(needs: Sequence[bool], parts: int) -> Wanted:
    return Wanted(tuple(needs[:parts]), tuple(needs[parts : 2 * parts]), needs[-1])


def _needs(xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> list[bool]:
    wanted = [tensor.requires_grad for tensor in (*xs, *weights)]
    return [*wanted, bias is not None and bias.requires_grad]


def _fake_gradients(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape) if need and tensor is not None else xs[0].new_empty(0)
        for need, tensor in zip(needs, (*xs, *weights, bias), strict=True)
    ]


def _five(gradients: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    padding = (gradients[0].new_empty(0) for _ in range(5 - len(gradients)))
    a, b, c, d, e = *gradients, *padding
    return a, b, c, d, e


@library.custom_op("elpo_kernels::linear_logprob", mutates_args=())
@_as_asked
def linear_logprob_op(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    token_temperature: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float,
    first: int,
    group: str,
    ignore_index: int,
    backend: str,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and, for the backward, log2 Σ e^logit `[T]`."""
    head, xs = _head(
        xs, weights, bias, token_temperature, temperature, softcap, first, group, backend
    )
    size = _size(head, targets.device)
    index = chosen_tokens(targets != ignore_index, targets, size, ignore_index)
    return forward(head, xs, targets, _tiles(head, backend), index, want_entropy)


@linear_logprob_op.register_fake
def _(xs: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    values = xs[0].new_empty(len(xs[0]), dtype=accumulation(xs[0].dtype))
    return values, torch.empty_like(values), torch.empty_like(values)


@library.custom_op("elpo_kernels::linear_logprob_backward", mutates_args=())
@_as_asked
def linear_logprob_backward_op(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    token_temperature: Tensor | None,
    targets: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    log_sum: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float,
    first: int,
    group: str,
    ignore_index: int,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of xs, weights and bias."""
    head, cast = _head(
        xs, weights, bias, token_temperature, temperature, softcap, first, group, backend
    )
    live = grad_logprob != 0
    if grad_entropy is not None:
        live |= grad_entropy != 0
    index = (live & (targets != ignore_index)).nonzero()[:, 0]
    return backward(
        head,
        cast,
        targets,
        _tiles(head, backend),
        _wanted(needs, len(xs)),
        logprob,
        entropy,
        log_sum,
        grad_logprob,
        grad_entropy,
        index,
        [*xs, *weights, bias],
    )


@linear_logprob_backward_op.register_fake
def _(
    xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, *rest: Any
) -> list[Tensor]:
    return _fake_gradients(xs, weights, bias, rest[-1])


def _save_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    xs, weights, bias, token_temperature, targets, *scalars, want_entropy = inputs
    ctx.parts, ctx.scalars, ctx.want_entropy = len(xs), scalars, want_entropy
    ctx.needs = _needs(xs, weights, bias)
    ctx.save_for_backward(*xs, *weights, bias, token_temperature, targets, *output)


def _logprob_backward(
    ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, unused: Tensor
) -> tuple[Any, ...]:
    *tensors, bias, token_temperature, targets, logprob, entropy, log_sum = ctx.saved_tensors
    xs, weights = tensors[: ctx.parts], tensors[ctx.parts :]
    gradients = torch.ops.elpo_kernels.linear_logprob_backward(
        xs,
        weights,
        bias,
        token_temperature,
        targets,
        logprob,
        entropy,
        log_sum,
        grad_logprob,
        grad_entropy if ctx.want_entropy else None,
        *ctx.scalars,
        ctx.needs,
    )
    given = [grad if need else None for grad, need in zip(gradients, ctx.needs, strict=True)]
    return given[: ctx.parts], given[ctx.parts : -1], given[-1], *(None,) * 9


linear_logprob_op.register_autograd(_logprob_backward, setup_context=_save_logprob)


@library.custom_op("elpo_kernels::linear_policy", mutates_args=("main_grad",))
@_as_asked
def linear_policy_op(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    token_temperature: Tensor | None,
    targets: Tensor,
    old_logprob: Tensor | None,
    pos: Tensor,
    neg: Tensor,
    eps_low: Tensor,
    eps_high: Tensor,
    entropy_coef: Tensor | None,
    main_grad: Tensor | None,
    ratio_cap: float,
    temperature: float,
    softcap: float,
    first: int,
    group: str,
    ignore_index: int,
    backend: str,
    want_entropy: bool,
    all_tokens: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-prob `[T]`, entropy `[T]`, statistics `[7]` and five gradients, the last ones empty
    where there are fewer inputs (an operator that writes to an input cannot return a list). The
    weight's gradient is added to `main_grad` where one is given."""
    wanted = _wanted(needs, len(xs))
    narrow = [
        weight
        for i, (weight, want) in enumerate(zip(weights, wanted.weights, strict=True))
        if want and (i or main_grad is None)
    ]
    acc = accumulation(xs[0].dtype)
    sums = sum(w.numel() * max(0, acc.itemsize - w.itemsize) for w in narrow)
    head, cast = _head(
        xs, weights, bias, token_temperature, temperature, softcap, first, group, backend, sums
    )
    tiles = _tiles(head, backend)
    valid = targets != ignore_index
    policy = Policy(
        old_logprob=old_logprob,
        pos=torch.where(valid, pos, 0),
        neg=torch.where(valid, neg, 0),
        eps_low=eps_low,
        eps_high=eps_high,
        entropy_coef=None if entropy_coef is None else torch.where(valid, entropy_coef, 0),
        ratio_cap=ratio_cap,
        backend=backend,
    )
    live = (policy.pos != 0) | (policy.neg != 0)
    if policy.entropy_coef is not None:
        live |= policy.entropy_coef != 0
    size, chosen = _size(head, targets.device), valid if all_tokens else live
    index = chosen_tokens(chosen, targets, size, ignore_index, pos, neg)
    result = fused(
        head,
        cast,
        targets,
        tiles,
        wanted,
        policy,
        index,
        want_entropy,
        [*xs, *weights, bias],
        main_grad,
    )
    gradients = _five(result.gradients)
    return result.loss, result.logprob, result.entropy, result.stats, *gradients


@linear_policy_op.register_fake
def _(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    token_temperature: Tensor | None,
    targets: Tensor,
    old_logprob: Tensor | None,
    pos: Tensor,
    neg: Tensor,
    eps_low: Tensor,
    eps_high: Tensor,
    entropy_coef: Tensor | None,
    main_grad: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    values = xs[0].new_empty(len(xs[0]), dtype=accumulation(xs[0].dtype))
    needs = list(rest[-1])
    if main_grad is not None:
        needs[len(xs)] = False
    gradients = _five(_fake_gradients(xs, weights, bias, needs))
    return values.new_empty(()), values, torch.empty_like(values), values.new_empty(7), *gradients


@library.custom_op("elpo_kernels::scale_", mutates_args=("values",))
def scale_op(values: Tensor, factor: Tensor) -> None:
    """values · factor in place, the factor a 0-dimensional tensor: values are touched only where it
    is not 1, as in almost every backward of a loss, and the device is not waited for."""
    if values.device.type == "cpu":
        if factor != 1:
            values.mul_(factor)
    elif resolve_backend("auto", values.device, values.dtype) == "triton":
        # Imported here: whether kernels are compiled or interpreted is settled at import.
        from elpo_kernels._triton_rows import scale_in_place

        scale_in_place(values, factor)
    else:
        values.mul_(factor)


@scale_op.register_fake
def _(values: Tensor, factor: Tensor) -> None:
    return None


@library.custom_op("elpo_kernels::with_gradients", mutates_args=())
def with_gradients_op(
    loss: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor], fixed: bool
) -> Tensor:
    """The loss, with `gradients` as its derivatives with respect to `tensors`. `fixed`: part of the
    gradient has gone elsewhere and can no longer be scaled."""
    return loss.clone()


@with_gradients_op.register_fake
def _(loss: Tensor, tensors: Any, gradients: Any, fixed: bool) -> Tensor:
    return torch.empty_like(loss)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.fixed = inputs[3]
    ctx.save_for_backward(*inputs[2])


def _scaled_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
    if ctx.fixed:
        torch._assert_async(
            grad_loss == 1,
            "main_grad was filled for an upstream gradient of 1; scale the coefficients instead",
        )
    # In place: a second copy of the weight's gradient would be the largest tensor of the step.
    # A second backward through the same loss therefore raises autograd's in-place error.
    scaled = list(ctx.saved_tensors)
    for gradient in scaled:
        torch.ops.elpo_kernels.scale_(gradient, grad_loss)
    return None, scaled, [None] * len(scaled), None


with_gradients_op.register_autograd(_scaled_gradients, setup_context=_save_gradients)
