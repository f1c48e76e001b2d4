"""Selective checkpointing of decoder blocks: what is dear to compute is kept for the backward pass,
and what is cheap is computed again.

A block keeps its input and the results of matrix products and of attention; norms, activations,
rotations and products of elements are computed again from these, by the same operations, so that
gradients are those of a block that keeps everything. Of a Llama's block that is a little more than
half the memory, for the time of its elements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from elpo_fast.model.forward import wrap_blocks

_PRODUCTS = {
    torch.ops.aten.mm.default: 1,
    torch.ops.aten.bmm.default: 1,
    torch.ops.aten.addmm.default: 2,
    torch.ops.aten.baddbmm.default: 2,
}
"""Which argument is the second matrix."""

_DEAR = 128
"""Terms in each number of a product that is kept: an adapter's second factor has fewer."""


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Checkpoint the blocks of a model in place, before they are compiled, if they are to be."""
    wrap_blocks(model, _forward)


@cache
def _forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        return checkpoint(
            partial(plain, self, **options),
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,  # there is no dropout
            context_fn=_contexts,
        )

    return forward


def _contexts() -> Any:
    """Of a block's forward pass, and of what is computed again."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(
    _: SelectiveCheckpointContext, operator: Any, *arguments: Any, **options: Any
) -> CheckpointPolicy:
    if operator in _PRODUCTS:
        keep = arguments[_PRODUCTS[operator]].shape[-2] >= _DEAR
    else:
        name = str(operator)
        keep = "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
