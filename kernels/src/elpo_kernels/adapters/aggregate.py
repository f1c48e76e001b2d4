"""How per-token losses of a padded batch `[B, T]` become one number: as weights of the tokens."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def token_weights(
    mask: Tensor,
    loss_type: str,
    *,
    max_completion_length: int | None = None,
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """Weights `[B, T]` of the tokens under TRL's and Liger's names:

    - `grpo`: mean over sequences of the mean over their tokens
    - `bnpo`: mean over the tokens of this batch
    - `dr_grpo`: sum over `B · max_completion_length`
    - `dapo`: sum over the tokens of all processes, `num_items_in_batch` where that is known
    """
    mask = mask.float()
    if loss_type == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp_min(1) / len(mask)
    if loss_type == "bnpo":
        return mask / mask.sum().clamp_min(1)
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("loss_type 'dr_grpo' needs max_completion_length")
        return mask / (len(mask) * max_completion_length)
    if loss_type == "dapo":
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if num_items_in_batch is None:
            count = mask.sum()
            if processes > 1:
                dist.all_reduce(count)
        else:
            count = mask.new_tensor(float(num_items_in_batch))
        return mask * (processes / count.clamp_min(1))
    raise ValueError(f"loss_type {loss_type!r} is unknown; choose one of {', '.join(LOSS_TYPES)}")
