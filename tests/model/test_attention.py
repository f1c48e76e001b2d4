"""Both tree attentions against eager attention over ancestors, values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elpo_fast.model.attention import (
    TILE,
    TreeMask,
    masked_attention,
    path_attention,
    tree_attention,
)

SCALE = 0.3


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
@pytest.mark.parametrize("attention", [path_attention, masked_attention])
def test_equals_eager_attention_over_ancestors(
    attention: object, trees: int, tokens: int, heads: int, kv_heads: int
) -> None:
    before = random_trees(np.random.default_rng(tokens), trees, tokens)
    allowed, position, end = ancestors(before)
    tensors = inputs(len(before), heads, kv_heads, torch.float64)
    above = torch.randn(heads, len(before), 8, dtype=torch.float64)
    expected = eager(*tensors, allowed)
    actual = attention(*tensors, TreeMask(position, end), SCALE)  # type: ignore[operator]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(actual, tensors, above),
        torch.autograd.grad(expected, tensors, above),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_dense_mask_is_the_ancestor_relation() -> None:
    before = random_trees(np.random.default_rng(0), 3, 30)
    allowed, position, end = ancestors(before)
    tree = TreeMask(position, end)
    assert tree.spans == [(0, 30), (30, 60), (60, 90)]
    for start, stop in tree.spans:
        assert torch.equal(tree.dense(start, stop), allowed[start:stop, start:stop])
        allowed[start:stop, start:stop] = False
    assert not allowed.any()


def test_tiles_cover_each_query_once_with_its_ancestors() -> None:
    before = random_trees(np.random.default_rng(1), 2, 2 * TILE)
    allowed, position, end = ancestors(before)
    tiles = TreeMask(position, end).tiles
    assert [tile.start for tile in tiles[1:]] == [tile.stop for tile in tiles[:-1]]
    assert (tiles[0].start, tiles[-1].stop) == (0, len(before))
    for tile in tiles:
        path = torch.cat([torch.arange(part.start, part.stop) for part in tile.path])
        assert torch.equal(allowed[tile.stop - 1].nonzero()[:, 0], path)


def test_bfloat16_is_as_accurate_as_sdpa() -> None:
    before = random_trees(np.random.default_rng(2), 2, 150)
    allowed, position, end = ancestors(before)
    tensors = inputs(len(before), 6, 2, torch.bfloat16)
    tree = TreeMask(position, end)
    exact_inputs = [part.detach().double().requires_grad_() for part in tensors]
    above = torch.randn(6, len(before), 8).to(torch.bfloat16)
    exact = eager(*exact_inputs, allowed)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, above.double())

    def errors(attention: object) -> list[float]:
        output = attention(*tensors, tree, SCALE)  # type: ignore[operator]
        found = [output, *torch.autograd.grad(output, tensors, above)]
        pairs = zip(found, (exact, *exact_gradients), strict=True)
        return [((ours.double() - best).norm() / best.norm()).item() for ours, best in pairs]

    for ours, reference in zip(errors(path_attention), errors(masked_attention), strict=True):
        assert ours <= 2 * reference <= 0.01


def test_window_shorter_than_the_paths_is_refused() -> None:
    tensors = [part[None] for part in inputs(10, 2, 2, torch.float32)]
    chain = TreeMask(torch.arange(10), torch.full((10,), 10))
    module = torch.nn.Module()
    allowed, _ = tree_attention(module, *tensors, None, tree=chain, sliding_window=10)
    assert allowed.shape == (1, 10, 2, 8)
    with pytest.raises(ValueError, match="path of 10 tokens exceeds the model's window of 9"):
        tree_attention(module, *tensors, None, tree=chain, sliding_window=9)
    with pytest.raises(ValueError, match="soft-capping"):
        tree_attention(module, *tensors, None, tree=chain, softcap=30.0)
