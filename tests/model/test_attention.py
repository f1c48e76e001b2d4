"""Every tree attention that runs here against eager attention over ancestors, with gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import elpo_kernels
import numpy as np
import pytest
import torch
from elpo_kernels import TreePlan
from elpo_kernels.attention import flex, varlen
from elpo_kernels.attention.flex import BLOCK, block_mask
from elpo_kernels.attention.varlen import Kernel, flash_kernel
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._subclasses.fake_tensor import FakeTensorMode

from elpo_fast.cpu.path_attention import TILE
from elpo_fast.model.attention import tree_attention

SCALE = 0.3


def by_head(backend: str) -> Callable[..., torch.Tensor]:
    """Attention of `[heads, N, D]`."""

    def attend(*arguments: Any) -> torch.Tensor:
        *inputs, plan, scale, window = arguments
        by_token = (x.transpose(0, 1) for x in inputs)
        out = elpo_kernels.tree_attention(
            *by_token, plan, scale=scale, window=window, backend=backend
        )
        return out.transpose(0, 1)

    return attend


ATTENTIONS = {name: by_head(name) for name in ("sdpa", "path", "varlen")}


@pytest.fixture(autouse=True)
def _no_flash(segment_kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "flash_kernel", lambda: segment_kernel)


def random_trees(rng: np.random.Generator, trees: int, tokens: int) -> list[int]:
    """Predecessor of each token in preorder, -1 for a first one; branches anywhere on the path."""
    before = []
    for _ in range(trees):
        path = [-1]
        first = len(before)
        for token in range(first, first + tokens):
            if token > first and rng.random() < 0.08:
                del path[int(rng.integers(2, len(path) + 1)) :]  # the first token is never a leaf
            before.append(path[-1])
            path.append(token)
    return before


def ancestors(before: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`allowed [N, N]`, `position [N]` and `end [N]`, from predecessors alone."""
    size = len(before)
    allowed = torch.eye(size, dtype=torch.bool)
    for token, previous in enumerate(before):
        if previous >= 0:
            allowed[token] |= allowed[previous]
    end = [int(allowed[:, key].nonzero().max()) + 1 for key in range(size)]
    return allowed, allowed.sum(1) - 1, torch.tensor(end)


def inputs(size: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(size, count, 8, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(0, 1)
        .requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    groups = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * SCALE
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return weights @ value.repeat_interleave(groups, 0)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    "trees, tokens", [(1, 1), (1, TILE), (3, 40), (2, 2 * TILE + 3)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("window", [None, 1, 13, TILE + 5])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_equals_eager_attention_over_ancestors(
    attention: str, window: int | None, trees: int, tokens: int, heads: int, kv_heads: int
) -> None:
    before = random_trees(np.random.default_rng(tokens), trees, tokens)
    allowed, position, end = ancestors(before)
    if window is not None:
        allowed &= position[:, None] - position < window
    tensors = inputs(len(before), heads, kv_heads, torch.float64)
    above = torch.randn(heads, len(before), 8, dtype=torch.float64)
    expected = eager(*tensors, allowed)
    actual = ATTENTIONS[attention](*tensors, TreePlan(end, position), SCALE, window)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(actual, tensors, above),
        torch.autograd.grad(expected, tensors, above),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize("trees, tokens", [(1, 1), (3, 40), (2, BLOCK + 3)])
def test_flex_has_the_same_values(trees: int, tokens: int, window: int | None) -> None:
    """On CPUs FlexAttention has no backward."""
    before = random_trees(np.random.default_rng(tokens), trees, tokens)
    allowed, position, end = ancestors(before)
    if window is not None:
        allowed &= position[:, None] - position < window
    tensors = [part.detach() for part in inputs(len(before), 6, 2, torch.float64)]
    actual = by_head("flex")(*tensors, TreePlan(end, position), SCALE, window)
    torch.testing.assert_close(actual, eager(*tensors, allowed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 40])
def test_flex_blocks_are_those_of_the_mask(window: int | None) -> None:
    chain = list(range(-1, 3 * BLOCK))
    before = random_trees(np.random.default_rng(5), 3, 2 * BLOCK + 9)
    before = chain + [at + len(chain) if at >= 0 else at for at in before]
    allowed, position, end = ancestors(before)
    if window is not None:
        allowed &= position[:, None] - position < window
    mask = block_mask(TreePlan(end, position), window)
    count = -(-len(before) // BLOCK)
    visited = torch.zeros(count, count, dtype=torch.int)
    for kind, counts, columns in (
        (1, mask.kv_num_blocks, mask.kv_indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(count):
            visited[row, columns[0, 0, row, : counts[0, 0, row]].long()] = kind
    for row, column in np.ndindex(count, count):
        block = allowed[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
        assert not block.any() or visited[row, column] > 0
        assert block.all() or visited[row, column] < 2
    if window is None:
        assert (visited == 2).any() and (visited == 0).sum() > count * (count - 1) // 2


def test_dense_mask_is_the_ancestor_relation() -> None:
    before = random_trees(np.random.default_rng(0), 3, 30)
    allowed, position, end = ancestors(before)
    tree = TreePlan(end, position)
    assert tree.spans == [(0, 30), (30, 60), (60, 90)]
    for start, stop in tree.spans:
        assert torch.equal(tree.allowed(0, start, stop), allowed[start:stop, start:stop])
        allowed[start:stop, start:stop] = False
    assert not allowed.any()


def test_pieces_cover_each_query_once_with_its_ancestors() -> None:
    before = random_trees(np.random.default_rng(1), 2, 2 * TILE)
    allowed, position, end = ancestors(before)
    tree = TreePlan(end, position)
    tiles = tree.pieces(TILE, None)
    assert [tile.start for tile in tiles[1:]] == [tile.stop for tile in tiles[:-1]]
    assert (tiles[0].start, tiles[-1].stop) == (0, len(before))
    for tile in tiles:
        path = torch.cat([torch.arange(part.start, part.stop) for part in tile.path])
        assert torch.equal(allowed[tile.stop - 1].nonzero()[:, 0], path)
        assert tile.length == len(path) and tile.stop - tile.start <= TILE
    assert tree.pieces(TILE, None) is tiles
    assert max(tile.length for tile in tree.pieces(TILE, 10)) <= TILE + 9


def test_bfloat16_is_as_accurate_as_sdpa() -> None:
    before = random_trees(np.random.default_rng(2), 2, 150)
    allowed, position, end = ancestors(before)
    tensors = inputs(len(before), 6, 2, torch.bfloat16)
    tree = TreePlan(end, position)
    exact_inputs = [part.detach().double().requires_grad_() for part in tensors]
    above = torch.randn(6, len(before), 8).to(torch.bfloat16)
    exact = eager(*exact_inputs, allowed)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, above.double())

    def errors(attention: Callable[..., torch.Tensor]) -> list[float]:
        output = attention(*tensors, tree, SCALE, None)
        found = [output, *torch.autograd.grad(output, tensors, above)]
        pairs = zip(found, (exact, *exact_gradients), strict=True)
        return [((ours.double() - best).norm() / best.norm()).item() for ours, best in pairs]

    reference = errors(ATTENTIONS["sdpa"])
    for attention in (ATTENTIONS["path"], ATTENTIONS["varlen"]):
        for ours, theirs in zip(errors(attention), reference, strict=True):
            assert ours <= 2 * theirs <= 0.01


def test_soft_capping_is_refused() -> None:
    tensors = [part[None] for part in inputs(10, 2, 2, torch.float32)]
    chain = TreePlan(torch.full((10,), 10), torch.arange(10))
    with pytest.raises(ValueError, match="soft-capping"):
        tree_attention(torch.nn.Module(), *tensors, None, tree=chain, softcap=30.0)


def test_compiled_flex_takes_all_shapes_and_beyond_its_limit_it_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eager FlexAttention, into which Dynamo falls back elsewhere, has dense scores."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = flex._compiled.__wrapped__(dynamic=True)

    def attend(tokens: int, heads: int, window: int | None, dtype: torch.dtype) -> None:
        before = random_trees(np.random.default_rng(tokens), 3, tokens)
        allowed, position, end = ancestors(before)
        if window is not None:
            allowed &= position[:, None] - position < window
        tensors = [part.detach() for part in inputs(len(before), heads, 2, dtype)]
        mask = block_mask(TreePlan(end, position), window)
        actual = compiled(*(x[None] for x in tensors), None, mask, SCALE, enable_gqa=True)
        torch.testing.assert_close(actual[0], eager(*tensors, allowed))

    torch._dynamo.reset()
    for dtype in (torch.float64, torch.float32):
        for window, heads in ((None, 6), (None, 2), (9, 6), (9, 2)):
            for tokens in (40, 2 * BLOCK, 2 * BLOCK + 5):  # one block and more
                attend(tokens, heads, window, dtype)
    plain = torch.nn.attention.flex_attention.flex_attention
    graphs = len(torch._dynamo.eval_frame._debug_get_cache_entry_list(plain))
    assert 8 < graphs <= 16
    monkeypatch.setattr(flex, "COMPILATIONS", graphs)
    with pytest.raises(FailOnRecompileLimitHit):
        attend(40, 2, None, torch.float16)
    torch._dynamo.reset()


def test_varlen_takes_only_a_flash_attn_that_has_the_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = ModuleType("flash_attn")  # as flash-attn 4 leaves it
    monkeypatch.setitem(sys.modules, "flash_attn", made)
    monkeypatch.setattr(varlen, "_torch_kernel", lambda: "PyTorch's")
    assert flash_kernel.__wrapped__() == "PyTorch's"
    calls = []
    made.flash_attn_varlen_func = lambda *arguments, **options: calls.append(options)  # type: ignore[attr-defined]
    query = torch.zeros(3, 1, 8)
    parts = varlen.segments(TreePlan(torch.full((3,), 3), torch.arange(3)), None)
    flash_kernel.__wrapped__()(query, query, query, parts, SCALE, 2)
    assert calls == [{"softmax_scale": SCALE, "causal": True, "window_size": (1, 0)}]


def test_pytorchs_varlen_kernel_takes_grouped_heads() -> None:
    """Shapes alone: the checks of this PyTorch's function run, its kernel needs a GPU."""
    before = random_trees(np.random.default_rng(3), 2, 20)
    _, position, end = ancestors(before)
    parts = varlen.segments(TreePlan(end, position), None)
    shapes = (40, 6, 8), (len(parts.token), 2, 8), (len(parts.token), 2, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(shape, requires_grad=True) for shape in shapes]
        output = varlen._torch_kernel()(*tensors, parts, SCALE, None)
        found = torch.autograd.grad(output, tensors, torch.empty_like(output))
    assert output.shape == shapes[0] and [grad.shape for grad in found] == list(shapes)
