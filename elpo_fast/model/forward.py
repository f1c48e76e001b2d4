"""The forward pass over packed trees: every unique token once, no head.

Token `t` of a tree sees exactly the tokens of its path and carries its depth as position, so its
hidden state is the one that the plain row of any trajectory through it would give.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from elpo_fast.model.attention import ATTENTION, TreeMask


def packed_hidden(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    position: torch.Tensor,
    end: torch.Tensor,
    *,
    embed: nn.Module | None = None,
) -> torch.Tensor:
    """Last hidden states `[N, H]` of the backbone, after its final norm, in the model's dtype.

    `token_ids`, `position` and `end` are integer `[N]`, as in `tree.pack`. `embed` looks the tokens
    up instead of the model's own embedding (for one with more precise weights).
    """
    if model.config._attn_implementation != ATTENTION:
        raise ValueError(
            f"packed trees need attn_implementation={ATTENTION!r}, "
            f"got {model.config._attn_implementation!r}; call model.set_attn_implementation first"
        )
    embeddings = (embed or model.get_input_embeddings())(token_ids.long()[None])
    output = model.base_model(
        inputs_embeds=embeddings.to(model.dtype),
        position_ids=position.long()[None],
        # Four dimensions mean "already prepared" to transformers: no N x N mask is built.
        attention_mask=embeddings.new_empty(1, 1, 1, 1),
        use_cache=False,
        tree=TreeMask(position, end),
    )
    return output.last_hidden_state[0]
