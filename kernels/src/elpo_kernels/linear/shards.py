"""Vocabulary-sharded heads given as DTensors: which local tensors and which group they mean.

Tensor parallelism (weight sharded over its rows, hidden replicated on the same mesh) has one
meaning. A sharded weight beside a plain `hidden` has not: under FSDP every rank holds other tokens,
and whether gradients are summed or averaged is the trainer's choice. That raises.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

Local = tuple[Tensor, Tensor, Tensor | None, dist.ProcessGroup | None, int]


def local_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: dist.ProcessGroup | None,
    first: int,
) -> Local:
    """Local hidden, weight and bias, the group of the shards and the first row of this one."""
    if not any(isinstance(tensor, DTensor) for tensor in (hidden, weight, bias)):
        return hidden, weight, bias, group, first
    if group is not None:
        raise ValueError("vocab_group goes with plain tensors; DTensors bring their own mesh")
    if not isinstance(weight, DTensor) or not isinstance(hidden, DTensor):
        raise ValueError(
            "hidden and weight must both be DTensors or both plain tensors; under FSDP call inside "
            "the module's forward, or pass weight.full_tensor(grad_placements=[Partial()])"
        )
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or hidden.device_mesh != mesh or hidden.placements != (Replicate(),):
        raise ValueError(
            f"hidden {hidden.placements} and weight {placements} must lie on one 1-dimensional "
            "mesh, hidden replicated; redistribute hidden to [Replicate()]"
        )
    if not (placements[0].is_shard(0) or placements[0].is_replicate()):
        raise ValueError(
            f"weight has placement {placements[0]}; redistribute it to [Shard(0)] (vocabulary) "
            "or [Replicate()]"
        )
    if bias is not None:
        if not isinstance(bias, DTensor) or bias.placements != placements:
            raise ValueError(f"bias must be a DTensor with the weight's placement {placements}")
        bias = bias.to_local()
    # The operator sums the gradient of hidden over the shards itself.
    local_hidden = hidden.to_local(grad_placements=[Replicate()])
    if placements[0].is_replicate():
        return local_hidden, weight.to_local(), bias, None, 0
    size, parts = weight.shape[0], mesh.size()
    rows = -(-size // parts)  # DTensor cuts like torch.chunk
    first = min(mesh.get_local_rank() * rows, size)
    return local_hidden, weight.to_local(), bias, mesh.get_group(), first
