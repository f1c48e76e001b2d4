"""The forward pass over packed trees: every unique token once, no head.

Token `t` of a tree sees exactly the tokens of its path and carries its depth as position, so its
hidden state is the one that the plain row of any trajectory through it would give.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from elpo_kernels import TreePlan
from torch import nn
from transformers import PreTrainedModel

from elpo_fast.model.attention import ATTENTION, NAMES, prepare


def packed_hidden(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    position: torch.Tensor,
    end: torch.Tensor,
    *,
    embed: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    host_end: torch.Tensor | None = None,
) -> torch.Tensor:
    """Last hidden states `[N, H]` of the backbone, after its final norm, in `dtype` (the model's).

    `token_ids`, `position` and `end` are integer `[N]`, as in `tree.pack`. `embed` looks the tokens
    up instead of the model's own embedding (for one with more precise weights). `dtype` is for a
    model that lies in one and computes in another, as under FSDP: some versions of that do not cast
    what a checkpointed block is given when they compute it again. `host_end`: `end` in main memory,
    where it is there, so that no backend has to wait for the device to know it.
    """
    if model.config._attn_implementation not in NAMES:
        raise ValueError(
            f"packed trees need attn_implementation={ATTENTION!r} or another of this package, "
            f"got {model.config._attn_implementation!r}; call model.set_attn_implementation first"
        )
    embeddings = (embed or model.get_input_embeddings())(token_ids.long()[None])
    plan = TreePlan(end, position, host_end)
    prepare(plan, model.config, dtype or model.dtype)
    output = model.base_model(
        inputs_embeds=embeddings.to(dtype or model.dtype),
        position_ids=position.long()[None],
        # Four dimensions mean "already prepared" to transformers: no N x N mask is built.
        attention_mask=embeddings.new_empty(1, 1, 1, 1),
        use_cache=False,
        tree=plan,
    )
    hidden: torch.Tensor = output.last_hidden_state.squeeze(0)
    return hidden


def wrap_blocks(model: PreTrainedModel, wrap: Callable[..., Any]) -> None:
    """Put `wrap(forward)` in the place of the `forward` of every decoder block, in place. What
    stands around a block, hooks of FSDP among it, and the names of its parameters are as before."""
    for child in model.base_model.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            plain = block.forward.__func__  # type: ignore[attr-defined]
            block.forward = MethodType(wrap(plain), block)


def bucket(tokens: int) -> int:
    """A length for `tokens`: at most 1/16 more from 2048 on, and few different ones.

    So compiled code, the allocator and matrix products meet the same shapes again.
    """
    step = max(128, 1 << max(0, (tokens - 1).bit_length() - 5))
    return -(-tokens // step) * step


def padded(
    token_ids: torch.Tensor, position: torch.Tensor, end: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same trees, and after them trees of one token each up to `length`."""
    missing = length - len(token_ids)
    alone = torch.arange(len(end) + 1, length + 1, dtype=end.dtype, device=end.device)
    return F.pad(token_ids, (0, missing)), F.pad(position, (0, missing)), torch.cat([end, alone])
