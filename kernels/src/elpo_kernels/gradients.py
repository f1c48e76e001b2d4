"""A loss whose gradients are there already: two operators that give them to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from elpo_kernels.backend import resolve_backend


@library.custom_op("elpo_kernels::scale_", mutates_args=("values",))
def scale_op(values: Tensor, factor: Tensor) -> None:
    """values · factor in place, the factor a 0-dimensional tensor: values are touched only where it
    is not 1, as in almost every backward of a loss, and the device is not waited for."""
    if resolve_backend("auto", values.device, values.dtype) == "triton":
        # Imported here: whether kernels are compiled or interpreted is settled at import.
        from elpo_kernels.rows_triton import scale_in_place

        scale_in_place(values, factor)
    elif values.device.type != "cpu" or factor != 1:
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
