"""Tree attention: block lists, the Triton kernels in the interpreter, the dense backend.

Whether a kernel is compiled or interpreted is settled when Triton is imported, so the tests of
kernels run in a process of their own, which the last test starts, and in float32 only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from elpo_kernels import TreePlan, tree_attention
from elpo_kernels.attention.blocks import DEAD, FULL, NO_WINDOW, classes, unpacked
from elpo_kernels.attention.ops import tree_attention_op
from elpo_kernels.attention.tiles import Tile, tiles, trial
from kernel_cases import error, make_forest, true_attention
from torch import Tensor, library

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = 1e-5  # float32, relative
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs under test_in_the_interpreter")

FORESTS = {
    "one-token": (1, 1),
    "chain": (1, 40),
    "many-trees": (13, 3),
    "trees": (3, 23),
    "aligned": (2, 32),
}


def forest(name: str) -> TreePlan:
    trees, tokens = FORESTS[name]
    return make_forest(trees, tokens, branching=0.0 if name == "chain" else 0.1)


def operands(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output; values exact in `dtype`."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, count, dim, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def compare(plan: TreePlan, inputs: list[Tensor], backend: str, window: int | None) -> list[float]:
    """Errors of output and gradients against float64."""
    *leaves, above = inputs
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = tree_attention(*leaves, plan, window=window, scale=0.3, backend=backend)
    found = [out.detach(), *torch.autograd.grad(out, leaves, above)]
    true = true_attention(*inputs, plan, window=window, scale=0.3)
    return [
        error(f, t) if t.norm() > 1e-9 else float(f.abs().max())  # one key: slopes are 0
        for f, t in zip(found, true, strict=True)
    ]


@interpreted
@pytest.mark.parametrize("window", [None, 9], ids=["whole-path", "window"])
@pytest.mark.parametrize("name", FORESTS)
def test_kernels(name: str, window: int | None) -> None:
    plan = forest(name)
    for heads, kv_heads, dim in ((1, 1, 16), (6, 2, 24)):
        inputs = operands(len(plan.end), heads, kv_heads, dim, torch.float32)
        assert max(compare(plan, inputs, "triton", window)) <= TOLERANCE


@interpreted
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_shipped_head_sizes(dim: int) -> None:
    plan = make_forest(2, 18, branching=0.1)
    assert max(compare(plan, operands(36, 3, 1, dim, torch.float32), "triton", None)) <= TOLERANCE


@interpreted
@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
def test_a_tile_on_trial(kernel: str) -> None:
    plan, problem = forest("trees"), (torch.device("cpu"), torch.float32, 16)
    inputs, own = operands(len(plan.end), 2, 1, 16, torch.float32), tiles(*problem)
    with trial(*problem, kernel, Tile(16, 64, 4, 1)):
        assert max(compare(plan, inputs, "triton", None)) <= TOLERANCE
    sizes = replace(own, **{kernel: Tile(16, 64, 4, 1)}).sizes
    assert list(plan._blocks) == [(*sizes, NO_WINDOW)]
    assert tiles(*problem) == own


@interpreted
def test_tokens_that_nobody_sees() -> None:
    """A token whose `end` does not exceed it sees nothing of itself: 0 where there is no other."""
    plan = TreePlan(torch.tensor([4, 1, 3, 4, 0, 6, 9]))
    assert max(compare(plan, operands(7, 2, 1, 16, torch.float32), "triton", None)) <= TOLERANCE
    out = tree_attention(*operands(7, 2, 1, 16, torch.float32)[:3], plan, backend="triton")
    assert not out[4].any()


@interpreted
def test_operands_need_not_be_contiguous() -> None:
    plan = forest("trees")
    inputs = operands(len(plan.end), 4, 2, 16, torch.float32)
    other = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    other[1] = other[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert max(compare(plan, other, "triton", None)) <= TOLERANCE


@interpreted
def test_operator_is_well_formed() -> None:
    plan = make_forest(2, 9, branching=0.2)
    leaves = [x.requires_grad_() for x in operands(18, 2, 1, 16, torch.float32)[:3]]
    blocks = plan.blocks(tiles(torch.device("cpu"), torch.float32, 16))
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    library.opcheck(tree_attention_op, (*leaves, plan.end, None, 0, blocks, 0.3), test_utils=checks)


@interpreted
def test_one_graph_for_all_trees_of_a_compiled_caller() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan) -> Tensor:
        return 2 * tree_attention(query, key, value, plan, window=9, scale=0.3, backend="triton")

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for stance, (trees, tokens) in (("default", (2, 9)), ("fail_on_recompile", (3, 7))):
        plan = make_forest(trees, tokens, branching=0.2)
        leaves = [x.requires_grad_() for x in operands(trees * tokens, 2, 1, 16, torch.float32)]
        with torch.compiler.set_stance(stance):
            for function in (compiled, attend):
                out = function(*leaves[:3], plan)
                found.append([out, *torch.autograd.grad(out, leaves[:3], leaves[3])])
            torch.testing.assert_close(found[-2], found[-1])


@interpreted
def test_no_tokens() -> None:
    leaves = [leaf.requires_grad_() for leaf in operands(0, 2, 1, 16, torch.float32)[:3]]
    out = tree_attention(*leaves, torch.zeros(0, dtype=torch.int32), backend="triton")
    out.sum().backward()
    assert out.shape == (0, 2, 16) and leaves[1].grad.shape == (0, 1, 16)


@pytest.mark.parametrize("window", [None, 9], ids=["whole-path", "window"])
@pytest.mark.parametrize("name", FORESTS)
def test_dense(name: str, window: int | None) -> None:
    plan = forest(name)
    inputs = operands(len(plan.end), 6, 2, 16, torch.float64)
    assert max(compare(plan, inputs, "torch", window)) <= 1e-12


@pytest.mark.parametrize("rows, columns", [(16, 16), (32, 16), (16, 48)])
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("name", FORESTS)
def test_block_lists_follow_from_the_mask(name: str, window: int, rows: int, columns: int) -> None:
    plan = forest(name)
    allowed = plan.allowed(window)
    found_classes = classes(plan.trees(window), rows, columns)
    for i, row in enumerate(found_classes.tolist()):
        for j, found in enumerate(row):
            block = allowed[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            if found == DEAD:
                assert not block.any()
            elif found == FULL:
                assert block.all() and block.shape[1] == columns
            elif not window:  # a window's bounds are those of whole blocks
                assert block.any()
    for by_column in (False, True):
        lists = plan.lists(rows, columns, window, by_column=by_column)
        expected = found_classes.t() if by_column else found_classes
        for i, (partial, full) in enumerate(lists.counts.tolist()):
            index = lists.blocks[i].tolist()
            assert index[:partial] == (expected[i] == 0).nonzero()[:, 0].tolist()
            assert index[partial : partial + full] == (expected[i] == 1).nonzero()[:, 0].tolist()
        visits = lists.counts.sum(1)[lists.order.long()].tolist()
        assert visits == sorted(visits, reverse=True)
        assert sorted(lists.order.tolist()) == list(range(len(expected)))


def test_lists_are_made_once() -> None:
    plan = forest("trees")
    first = plan.lists(16, 16, 0, by_column=False)
    assert plan.lists(16, 16, 0, by_column=False) is first


def test_packed_lists_are_those_of_each_tile() -> None:
    plan, shipped = forest("trees"), tiles(torch.device("cpu"), torch.float32, 16)
    packed = plan.blocks(shipped, 9)
    assert plan.blocks(shipped, 9) is packed
    found = unpacked(packed, len(plan.end), shipped.sizes)
    for lists, name in zip(found, ("forward", "query", "key"), strict=True):
        tile = getattr(shipped, name)
        true = plan.lists(tile.rows, tile.columns, 9, by_column=name == "key")
        assert all(torch.equal(a, b) for a, b in zip(lists, true, strict=True))


def test_misuse_is_refused() -> None:
    query, key, value, _ = operands(8, 4, 2, 16, torch.float32)
    end = torch.full((8,), 8)
    with pytest.raises(ValueError, match="end must be int32 or int64"):
        tree_attention(query, key, value, end.float())
    with pytest.raises(ValueError, match="end has 7 tokens and query 8"):
        tree_attention(query, key, value, end[:7])
    with pytest.raises(ValueError, match=r"key must be \[8, heads, 16\]"):
        tree_attention(query, key[:, :, :8], value, end)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key"):
        tree_attention(query[:, :3], key, value, end)
    with pytest.raises(ValueError, match="give equal dtypes"):
        tree_attention(query, key.double(), value, end)
    with pytest.raises(ValueError, match="scale must be > 0"):
        tree_attention(query, key, value, end, scale=0.0)
    with pytest.raises(ValueError, match="a window needs positions"):
        tree_attention(query, key, value, end, window=3)
    with pytest.raises(ValueError, match="window must be >= 1"):
        tree_attention(query, key, value, end, window=0)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib",
         "-W", "ignore::RuntimeWarning", "-k", "not lists and not dense", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed, 1 skipped" in run.stdout, run.stdout[-1000:]
