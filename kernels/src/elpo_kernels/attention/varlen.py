"""Tree attention by variable-length flash attention, which knows nothing of trees.

Every run of consecutive path tokens becomes a segment of its own, whose keys are its whole path,
gathered: causal attention aligned to the segment's end is then exactly attention along the path.
Keys are copied once per run that sees them, so this suits trees with few, long runs. The kernel is
flash-attn's where that is installed, else PyTorch's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch

from elpo_kernels.attention.plan import TreePlan

logger = logging.getLogger(__name__)


class Segments(NamedTuple):
    """Segment `i` has queries `queries[i]:queries[i + 1]` and gathered keys likewise."""

    token: torch.Tensor  # int64, token of each gathered key
    queries: torch.Tensor  # int32 [segments + 1]
    keys: torch.Tensor  # int32 [segments + 1]
    longest_query: int
    longest_key: int


Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Segments, float, int | None], torch.Tensor
]
"""Attention of `[N, heads, D]` to gathered keys and values, causal to each segment's end."""


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: TreePlan,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Arguments and result as of `tree_attention`."""
    parts = plan.kept(("segments", window), lambda: segments(plan, window))
    keys, values = (_Gather.apply(x, parts.token) for x in (key, value))
    return flash_kernel()(query, keys, values, parts, scale, window)


def segments(plan: TreePlan, window: int | None) -> Segments:
    """The runs of a mask as segments, keys out of a window's reach left out."""
    chains = plan.pieces(max(1, len(plan.end)), window)
    device = plan.end.device
    index = [torch.arange(part.start, part.stop) for chain in chains for part in chain.path]
    sizes = torch.tensor([[chain.stop - chain.start, chain.length] for chain in chains]).view(-1, 2)
    starts = torch.cat([torch.zeros(1, 2, dtype=torch.long), sizes.cumsum(0)]).to(torch.int32)
    longest = sizes.amax(0).tolist() if chains else [0, 0]
    return Segments(
        torch.cat([torch.zeros(0, dtype=torch.long), *index]).to(device),
        starts[:, 0].contiguous().to(device),
        starts[:, 1].contiguous().to(device),
        *longest,
    )


class _Gather(torch.autograd.Function):
    """Rows by index. A prefix is gathered by many runs, so its gradient is summed in float32."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.shape = tensor.shape
        return tensor.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,), (index,) = grads, ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


@cache
def flash_kernel() -> Kernel:
    """flash-attn, or else PyTorch's variable-length attention; which one is logged once."""
    try:  # flash-attn 4 is a `flash_attn` too, without this function
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        logger.warning("model.attention=varlen runs PyTorch's kernel, not flash-attn's: %s", error)
        return _torch_kernel()

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: Segments,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        return flash_attn_varlen_func(
            query,
            key,
            value,
            *(parts.queries, parts.keys, parts.longest_query, parts.longest_key),
            softmax_scale=scale,
            causal=True,
            window_size=_reach(window),
        )

    return attend


def _torch_kernel() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

    # Grouped heads are taken as they are: unasked in PyTorch 2.11, on this word from 2.12 on.
    told = "enable_gqa" in signature(varlen_attn).parameters
    grouped: dict[str, Any] = {"enable_gqa": True} if told else {}

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: Segments,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        output = varlen_attn(
            query.contiguous(),
            key,
            value,
            *(parts.queries, parts.keys, parts.longest_query, parts.longest_key),
            scale=scale,
            window_size=_reach(window),
            **grouped,
        )
        assert isinstance(output, torch.Tensor)  # no log-sum-exp was asked for
        return output

    return attend


def _reach(window: int | None) -> tuple[int, int]:
    """Keys to the left and right of a query; -1: all."""
    return (-1 if window is None else window - 1), 0
