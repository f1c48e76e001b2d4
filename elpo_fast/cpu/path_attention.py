"""Tree attention on CPUs: allowed pairs only, by PyTorch's flash attention.

Tokens in a row with the same `end` are a segment of the tree: what sees its last token sees all of
it. So a segment `a:b` with end `e` is two calls on slices, causal for the queries `a:b` and in full
for `b:e`. What the parts `p` give to a query is joined by their log-sum-exps `l_p`,

    o = sum_p e^(l_p - l) o_p,   l = log sum_p e^l_p,

and the backward of each part is given `o` and `l` of the whole. Under a window that hides something
a part is a tile of queries with their path, and a mask says what is seen. Memory is linear in the
row; half precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from elpo_kernels.attention.plan import Chain, TreePlan
from torch import Tensor, library

TILE = 256  # queries at once under a window
_last: list[TreePlan] = []


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
    """Queries, and keys that all of them see."""

    queries: slice
    keys: list[slice]
    causal: bool = False  # as many keys as queries: of these each those up to its own
    mask: Tensor | None = None  # `[queries, keys]`, added to the scores


@library.custom_op("elpo_fast::flash_path_attention", mutates_args=())
def _path_op(
    query: Tensor, key: Tensor, value: Tensor, end: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """`[heads, N, D]`, `[kv_heads, N, D]` -> `[heads, N, D]`, and the log-sum-exps `[heads, N]`.
    One operator to a compiler, whatever the trees: it knows them by their tensor."""
    dtype = query.dtype
    query, key, value = (_wide(x) for x in (query, key, value))
    output = _by_token(query).zero_()
    log_sums = query.new_full(query.shape[:2], -torch.inf)
    q, o, sums = (x.unflatten(0, (len(key), -1)) for x in (query, output, log_sums))
    for own, path, causal, mask in _parts(_plan(end), window, q.dtype):
        k, v = (_shared(x, path, q) for x in (key, value))
        found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, own], k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        joint = torch.logaddexp(sums[:, :, own], log_sum)
        o[:, :, own].lerp_(found, (log_sum - joint).exp_()[..., None])
        sums[:, :, own] = joint
    return output.to(dtype), log_sums


@library.custom_op("elpo_fast::flash_path_attention_backward", mutates_args=())
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
    query_grad, key_grad, value_grad = (_by_token(x).zero_() for x in (query, key, value))
    by_query = (query, output, log_sums, grad, query_grad)
    q, o, sums, g, dq = (x.unflatten(0, (len(key), -1)) for x in by_query)
    for own, path, causal, mask in _parts(_plan(end), window, q.dtype):
        k, v = (_shared(x, path, q) for x in (key, value))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(g[:, :, own], q[:, :, own], k, v, o[:, :, own], sums[:, :, own]),
            *(0.0, causal),
            attn_mask=mask,
            scale=scale,
        )
        dq[:, :, own] += found[0]
        sizes = [keys.stop - keys.start for keys in path]
        for total, part in ((key_grad, found[1].sum(1)), (value_grad, found[2].sum(1))):
            for keys, some in zip(path, part.split(sizes, dim=1), strict=True):
                total[:, keys] += some
    return query_grad.to(dtype), key_grad.to(dtype), value_grad.to(dtype)


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
    found = torch.ops.elpo_fast.flash_path_attention_backward(
        *tensors, ctx.scale, ctx.window, output, log_sums, grad
    )
    return *found, None, None, None


_path_op.register_autograd(_gradients, setup_context=_save)


def _parts(plan: TreePlan, window: int | None, dtype: torch.dtype) -> Iterator[_Part]:
    """Each allowed pair in one of them."""
    if window is not None and any(chain.length > window for chain in plan.chains):
        for tile in plan.pieces(TILE, window):
            yield _Part(slice(tile.start, tile.stop), tile.path, mask=_mask(tile, window, dtype))
        return
    ends, start = plan.ends, 0
    for stop in range(1, len(ends) + 1):
        if stop == len(ends) or ends[stop] != ends[start]:
            segment = slice(start, stop)
            yield _Part(segment, [segment], causal=True)
            if stop < ends[start]:
                yield _Part(slice(stop, ends[start]), [segment])
            start = stop


def _mask(tile: Chain, window: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores `[queries, keys]` of a tile."""
    place = torch.arange(tile.length)
    distance = place[tile.start - tile.stop :, None] - place  # the path ends with the tile's own
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _plan(end: Tensor) -> TreePlan:
    """What is derived of these trees, once for all layers of a batch: an operator is given tensors
    alone. The last one is kept, so that its memory is at an address that no other's has."""
    plan = _last[0] if _last else None
    if plan is None or plan.end.data_ptr() != end.data_ptr() or plan.end.shape != end.shape:
        plan = TreePlan(end)
        _last[:] = [plan]
    return plan


def _wide(x: Tensor) -> Tensor:
    """Its numbers as they are computed with, each head's side by side: PyTorch's kernels look at
    no other stride."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_token(like: Tensor) -> Tensor:
    """An empty tensor `[heads, N, D]` with memory order `[N, heads, D]`, as projections have it."""
    heads, tokens, size = like.shape
    return like.new_empty(tokens, heads, size).transpose(0, 1)


def _shared(tensor: Tensor, path: list[slice], like: Tensor) -> Tensor:
    """The path's tokens `[kv_heads, heads / kv_heads, path, D]`, each head's again for all that
    share it; `like` has as many."""
    tokens = torch.cat([tensor[:, part] for part in path], dim=1)
    return tokens[:, None].expand(-1, like.shape[1], -1, -1)
