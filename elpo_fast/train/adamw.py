"""AdamW with its moments in float32, or quantised to 8 bits in blocks of 256 by torchao.

Eight bits take 2 bytes a parameter instead of 8. What goes into a checkpoint is float32 in either
case: blocks differ with the number of ranks, values do not. Quantising again what was read back
gives the same codes, so that a run resumes exactly.

Invariant: parameters (masters) and the arithmetic of an update are float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from elpo_fast.config import ConfigError

Kind = Literal["adamw", "adamw8bit"]


def make_adamw(kind: Kind, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer`. Raises `ConfigError` where torchao is missing."""
    if kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "train.optimizer: adamw8bit needs torchao, which is not installed; "
            "run `pip install 'elpo-fast[adamw8bit]'`"
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
    return optimizer


def step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One update at learning rate `lr`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    device = optimizer.param_groups[0]["params"][0].device
    if isinstance(optimizer, torch.optim.AdamW) or device.type != "cpu":
        optimizer.step()
        return
    # torchao compiles the update for every shape; on a CPU that takes longer than a run's updates.
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()


def exact(moment: torch.Tensor) -> torch.Tensor:
    """A moment in float32: itself, or a copy of one in 8 bits. Sharded as it is."""
    local: Any = moment.to_local() if isinstance(moment, DTensor) else moment
    if type(local) is torch.Tensor:
        return moment
    levels = local.qmap.clone()
    if local.signed:
        # A block's scale is its largest magnitude. Of negative ones the code says 0.993: said
        # exactly, the scale can be read off the values.
        levels[0] = -1.0
    values = levels[local.codes.int()].view(len(local.scale), -1) * local.scale[:, None]
    values = values.view(local.shape)
    if not isinstance(moment, DTensor):
        return values
    return DTensor.from_local(
        values,
        moment.device_mesh,
        moment.placements,
        run_check=False,
        shape=moment.shape,
        stride=moment.stride(),
    )


@torch.no_grad()
def make_moments(optimizer: torch.optim.Optimizer, chosen: list[torch.Tensor]) -> None:
    """Give the `chosen` parameters moments, whose values are meaningless."""
    optimizer.state.clear()
    for parameter in chosen:
        parameter.grad = torch.zeros_like(parameter)
    step(optimizer, 0.0)
    optimizer.zero_grad(set_to_none=True)
