"""Tree attention on CPUs: allowed pairs only, whatever lies between them in the row.

A tree of `L` leaves is `L` runs of consecutive path tokens, and what a run sees besides itself is a
few slices of earlier tokens. PyTorch's flash attention computes the run causally and what is above
it in full; these parts `p` are joined by their log-sum-exps `l_p`,

    o = sum_p e^(l_p - l) o_p,   l = log sum_p e^l_p,

and its backward is given `o` and `l` of the whole. Where a window hides something a mask says what
is seen. Memory is linear in the row; half precision is computed in float32.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from elpo_kernels.attention.plan import Chain, TreePlan
from torch import Tensor, library

TILE = 256  # queries at once
_last: list[TreePlan] = []

if hasattr(os, "register_at_fork"):
    # A forked process lacks PyTorch's threads and would wait for them: it computes on its own.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def path_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Arguments and result as of `elpo_kernels.tree_attention`."""
    by_head = (x.transpose(0, 1) for x in (query, key, value))
    output, _ = _path_op(*by_head, plan.end, scale, window)
    return output.transpose(0, 1)


class _Part(NamedTuple):
    """Of what a tile's queries see; keys are the `path`'s tokens."""

    path: list[slice]
    causal: bool  # as many keys as queries, each with those before it
    mask: Tensor | None  # `[queries, keys]`, added to the scores


@library.custom_op("elpo_fast::path_attention", mutates_args=())
def _path_op(
    query: Tensor, key: Tensor, value: Tensor, end: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """`[heads, N, D]`, `[kv_heads, N, D]` -> `[heads, N, D]`, and the log-sum-exps `[heads, N]`.
    One operator to a compiler, whatever the trees: it knows them by their tensor."""
    dtype = query.dtype
    query, key, value = (_wide(x) for x in (query, key, value))
    output, log_sums = _by_token(query), query.new_empty(query.shape[:2])
    q, o, sums = (x.unflatten(0, (len(key), -1)) for x in (query, output, log_sums))
    k, v = (x[:, None].expand(*q.shape[:2], -1, -1) for x in (key, value))
    for tile in _plan(end).pieces(TILE, window):
        own = slice(tile.start, tile.stop)
        found = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, own], _gather(k, path), _gather(v, path), 0.0, causal,
                attn_mask=mask, scale=scale,
            )
            for path, causal, mask in _parts(tile, window, q.dtype)
        ]  # fmt: skip
        total, log_sum = found[0]
        for other, log_other in found[1:]:
            joint = torch.logaddexp(log_sum, log_other)
            total = torch.lerp(total, other, (log_other - joint).exp_()[..., None])
            log_sum = joint
        o[:, :, own], sums[:, :, own] = total, log_sum
    return output.to(dtype), log_sums


@library.custom_op("elpo_fast::path_attention_backward", mutates_args=())
def _path_backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    end: Tensor,
    scale: float,
    window: int | None,
    output: Tensor,
    log_sums: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    dtype = query.dtype
    query, key, value, output, grad = (_wide(x) for x in (query, key, value, output, grad))
    grads = query_grad, key_grad, value_grad = [_by_token(x).zero_() for x in (query, key, value)]
    given = grad, query, output, log_sums, query_grad
    g, q, o, sums, dq = (x.unflatten(0, (len(key), -1)) for x in given)
    k, v = (x[:, None].expand(*q.shape[:2], -1, -1) for x in (key, value))
    for tile in _plan(end).pieces(TILE, window):
        own = slice(tile.start, tile.stop)
        for path, causal, mask in _parts(tile, window, q.dtype):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g[:, :, own], q[:, :, own], _gather(k, path), _gather(v, path),
                o[:, :, own], sums[:, :, own], 0.0, causal, attn_mask=mask, scale=scale,
            )  # fmt: skip
            dq[:, :, own] += found[0]
            _scatter_add(key_grad, found[1].sum(1), path)
            _scatter_add(value_grad, found[2].sum(1), path)
    return tuple(x.to(dtype) for x in grads)  # type: ignore[return-value]


@_path_op.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _by_token(query), _wide(query).new_empty(query.shape[:2])


@_path_backward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    return _by_token(query), _by_token(key), _by_token(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, output, log_sums = ctx.saved_tensors
    found = torch.ops.elpo_fast.path_attention_backward(
        *tensors, ctx.scale, ctx.window, output, log_sums, grad
    )
    return *found, None, None, None


_path_op.register_autograd(_gradients, setup_context=_save)


def _parts(tile: Chain, window: int | None, dtype: torch.dtype) -> list[_Part]:
    """Of what the tile's queries see, each pair in one of them."""
    own = slice(tile.start, tile.stop)
    if window is not None and tile.length > window:
        place = torch.arange(tile.length)
        distance = place[own.start - own.stop :, None] - place  # the path ends with the tile's own
        hidden = (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        return [_Part(tile.path, False, mask)]
    *above, last = tile.path
    if last.start < own.start:
        above.append(slice(last.start, own.start))
    parts = [_Part([own], True, None)]
    return [*parts, _Part(above, False, None)] if above else parts


def _plan(end: Tensor) -> TreePlan:
    """What is derived of these trees, once for all layers of a batch: an operator is given tensors
    alone. The last one is kept, so that its memory is at an address that no other's has."""
    plan = _last[0] if _last else None
    if plan is None or plan.end.data_ptr() != end.data_ptr() or plan.end.shape != end.shape:
        plan = TreePlan(end)
        _last[:] = [plan]
    return plan


def _wide(x: Tensor) -> Tensor:
    """Its numbers as they are computed with, each head's side by side: the kernels look at no other
    stride."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_token(like: Tensor) -> Tensor:
    """An empty tensor `[heads, N, D]` with memory order `[N, heads, D]`, as projections have it."""
    heads, tokens, size = like.shape
    return like.new_empty(tokens, heads, size).transpose(0, 1)


def _gather(tensor: Tensor, path: list[slice]) -> Tensor:
    """Its tokens `[..., path, D]`."""
    return torch.cat([tensor[..., part, :] for part in path], dim=-2)


def _scatter_add(total: Tensor, part: Tensor, path: list[slice]) -> None:
    sizes = [piece.stop - piece.start for piece in path]
    for piece, some in zip(path, part.split(sizes, dim=1), strict=True):
        total[:, piece] += some
