"""The decoder's two sets of operations against each other, on one irregular batch of nodes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llvmlite.binding import get_host_cpu_features
from numba import njit

from elpo_fast.cpu.decoder import FusedForward, Step, as_numpy, elements, packed, padded
from elpo_fast.cpu.decoder_attention import attend, head, query_heads
from elpo_fast.cpu.decoder_products import DOTS
from elpo_fast.cpu.decoder_step import COUNTER, multiply
from elpo_fast.cpu.elements import exp, narrow
from elpo_fast.cpu.kernel import SOURCES
from elpo_fast.cpu.vectors import PANEL, TILE_ROWS
from elpo_fast.rollout.local.decoder import Decoder, NodeBatch, _Linear, _TorchStep

SLOTS = 200
needs_dots = pytest.mark.skipif(not DOTS, reason="needs a CPU with AVX-512 BF16")


@njit
def _narrowed(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(values)):
        out[i] = narrow(values[i], out)


@njit(fastmath=True)
def _exponentials(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(values)):
        out[i] = exp(values[i])


def test_compiled_code_is_kept_for_the_wing_as_it_is() -> None:
    """Under a name of all its files: a kernel's own says nothing of the helpers that it calls."""
    assert SOURCES[:8] in multiply._cache._cache_file._index_name


def test_rounding_to_bfloat16_equals_pytorch() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 1e3
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 3e38])])
    out = np.full(len(values), 77, np.uint16)
    _narrowed(values.numpy(), out)
    assert (torch.from_numpy(out).view(torch.bfloat16) == values.bfloat16()).all()


def test_exponential_is_accurate() -> None:
    values = np.concatenate([np.linspace(-86, 0, 200_001), [-1e30, -87, 0]]).astype(np.float32)
    out = np.full_like(values, np.nan)
    _exponentials(values, out)
    exact = np.exp(np.maximum(values, -87).astype(np.float64))
    assert (np.abs(out / exact - 1) <= 1e-7 * (1 + np.abs(np.maximum(values, -87)))).all()
    assert out[-1] == 1


def irregular_batch() -> NodeBatch:
    """Three paths: a prompt of 37 new nodes, one new node after 20 cached, and 3 after them."""
    rng = np.random.default_rng(0)
    slots = rng.permutation(SLOTS)
    cached, prompt, branch = slots[:20], slots[20:57], slots[57:61]
    paths = [prompt, np.append(cached, branch[0]), np.append(cached, branch[1:])]
    starts = [0, 20, 20]
    counts = [len(p) - s for p, s in zip(paths, starts, strict=True)]
    return NodeBatch(
        tokens=rng.integers(0, 320, sum(counts)),
        positions=np.concatenate(
            [np.arange(s, len(p)) for p, s in zip(paths, starts, strict=True)]
        ),
        slots=np.concatenate([p[s:] for p, s in zip(paths, starts, strict=True)]),
        table=np.concatenate(paths),
        first=np.repeat([0, 37, 58], counts),
        segments=np.cumsum([0, *counts]),
    )


def loaded(
    model: Any, dtype: torch.dtype, *, fused: bool, products: torch.dtype | None = None
) -> Decoder:
    """A decoder with something in all slots, its steps fused or operation by operation."""
    decoder = Decoder(model, SLOTS, dtype)
    decoder.products = products or dtype
    decoder._fused = FusedForward(decoder) if fused else None
    tensors = dict(model.named_parameters())
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    decoder.load(tensors)
    generator = torch.Generator().manual_seed(1)
    for store in (decoder.keys, decoder.values):
        store.copy_(torch.randn(store.shape, generator=generator))
    return decoder


def plain_forward(decoder: Decoder, batch: NodeBatch, ends: np.ndarray) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_step", _TorchStep)
        return decoder.forward(batch, ends)


@torch.inference_mode()
def test_cpu_kernels_equal_plain_operations(any_model: Any) -> None:
    batch = irregular_batch()
    outputs = []
    for kind in (_TorchStep, Step):
        decoder = loaded(any_model, torch.bfloat16, fused=False)
        step = kind(decoder, batch)
        generator = torch.Generator().manual_seed(2)
        qkv = torch.randn(
            len(batch.tokens),
            (decoder.heads + 2 * decoder.kv_heads) * decoder.width,
            generator=generator,
        ).bfloat16()
        residual = torch.randn(9, 96, generator=generator)
        delta = torch.randn(9, 96, generator=generator).bfloat16()
        norm = torch.randn(96, generator=generator)
        outputs.append(
            {
                "attention": step.attend(qkv, 1),
                "keys": decoder.keys,
                "values": decoder.values,
                "norm": step.add_norm(residual, delta, norm),
                "residual": residual,
                "mlp": step.silu_mul(qkv[:, :320]),
            }
        )
    plain, fused = outputs
    for name, expected in plain.items():
        scale = expected.float().abs().max()
        result = fused[name][: len(expected)]  # without the padding
        error = (result.float() - expected.float()).abs().max()
        assert error <= 2.0**-7 * scale, name
    assert torch.equal(fused["values"], plain["values"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("group", "width"),
    [(3, 64), (1, 16), (7, 32), (20, 16), (3, 24), (6, 20)],
    ids=lambda n: str(n),
)
def test_attention_of_every_head_size(group: int, width: int, dtype: torch.dtype) -> None:
    """Blocks of several tokens and of one, full and with lanes to spare, of several vectors."""
    rng = torch.Generator().manual_seed(0)
    kv_heads, lengths = 2, [1, 2, 5, 16, 17, 33]
    query = torch.randn(len(lengths), kv_heads, group, width, generator=rng)
    keys, values = (torch.randn(40, kv_heads, width, generator=rng).to(dtype) for _ in range(2))
    paths = [torch.randperm(40, generator=rng)[:length] for length in lengths]
    out = np.full((len(lengths), kv_heads * group * width), np.nan, np.float32)
    kind = head(as_numpy(keys).dtype, width)
    attend(
        elements(query.flatten(1, 2).numpy(), query_heads(group, width)),
        *(elements(as_numpy(store), kind) for store in (keys, values)),
        torch.cat(paths).numpy(),
        np.cumsum([0, *lengths[:-1]]),
        np.array(lengths) - 1,
        out,
    )
    for q, path, mean in zip(query, paths, out, strict=True):
        scores = torch.einsum("hgd,thd->hgt", q, keys[path].float())
        expected = torch.einsum("hgt,thd->hgd", scores.softmax(-1), values[path].float())
        np.testing.assert_allclose(mean, expected.flatten(), rtol=0, atol=2e-6 * width)


@torch.inference_mode()
def test_a_fused_forward_equals_plain_operations(any_model: Any) -> None:
    batch, ends = irregular_batch(), np.array([3, 36, 37, 40])
    plain, fused = (loaded(any_model, torch.float32, fused=fused) for fused in (False, True))
    logits = [plain_forward(plain, batch, ends), fused.forward(batch, ends)]
    for one, other in (logits, (plain.keys, fused.keys), (plain.values, fused.values)):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4)
    assert fused.forward(batch, ends[:0]).shape == (0, len(logits[0][0]))


@pytest.mark.parametrize(
    ("products", "limit"),
    [
        pytest.param(torch.float32, 1.0, id="fp32 products"),
        pytest.param(torch.bfloat16, 1.1, id="bf16 products", marks=needs_dots),
    ],
)
@torch.inference_mode()
def test_a_fused_bfloat16_forward_is_as_close_to_exact_as_plain_operations(
    qwen3: Any, products: torch.dtype, limit: float
) -> None:
    """Exact: the same rounded weights, keys and values before, all else in fp32."""
    batch, ends = irregular_batch(), np.array([3, 36, 37, 40])
    plain, fused = (
        loaded(qwen3, torch.bfloat16, fused=fused, products=products) for fused in (False, True)
    )
    exact = loaded(copy.deepcopy(qwen3).bfloat16().float(), torch.float32, fused=False)
    for store in (exact.keys, exact.values):
        store.copy_(store.bfloat16())
    expected = plain_forward(exact, batch, ends)
    errors = [
        (logits - expected).abs().mean()
        for logits in (fused.forward(batch, ends), plain_forward(plain, batch, ends))
    ]
    assert errors[0] < limit * errors[1] < 0.01 * expected.abs().max()


def test_padding_adds_an_eighth_at_most_and_leaves_few_sizes() -> None:
    sizes = [padded(rows) for rows in range(1, 1025)]
    assert all(rows <= size <= max(2, rows * 9 / 8) for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 70


@pytest.mark.parametrize("size", [(64, 96), (192, 1024), (1536, 576)], ids=str)
def test_a_row_of_a_bfloat16_product_does_not_depend_on_the_others(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = _Linear("some")
    weight = torch.randn(size[1], size[0], generator=generator)
    linear.load({"some.weight": weight}, torch.empty(0, dtype=torch.bfloat16), torch.bfloat16)
    rows = torch.randn(padded(200), size[0], generator=generator).bfloat16()
    together = linear(rows)
    for count in (padded(1), 3, 5, 8, 15, 16, 31, 64, 120):
        assert torch.equal(linear(rows[:count]), together[:count]), count
    order = torch.randperm(len(rows), generator=generator)[:37]  # nor on its place
    assert torch.equal(linear(rows[order]), together[order])


def multiplied(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` by a fused step's product, into NaN."""
    rows, inputs = x.shape
    numbers = as_numpy(x)
    padded_x = np.zeros((rows + TILE_ROWS, inputs + inputs % 2), numbers.dtype)
    padded_x[:rows, :inputs] = numbers
    out = np.full((rows, len(weight)), np.nan, np.float32)
    counters = np.zeros(COUNTER, np.int64)
    bias = np.zeros(len(weight) + PANEL, np.float32)
    multiply(counters, 0, 8, padded_x, rows, packed(weight), bias, out, 0)
    return torch.from_numpy(out)


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [
        pytest.param(torch.float32, torch.float32, id="fp32"),
        pytest.param(torch.float32, torch.bfloat16, id="bf16 weight"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bf16", marks=needs_dots),
    ],
)
@pytest.mark.parametrize("size", [(64, 96), (7, 1), (193, 1001), (576, 333)], ids=str)
def test_products_add_up_in_fp32_and_a_row_does_not_depend_on_the_others(
    size: tuple[int, int], x_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size[1], size[0], generator=generator).to(dtype)
    rows = torch.randn(67, size[0], generator=generator).to(x_dtype)
    together = multiplied(rows, weight)
    exact = rows.double() @ weight.double().T
    assert (together - exact).abs().max() <= 1e-6 * exact.abs().max() * size[0] ** 0.5
    for count in (1, 2, 3, 5, 8, 13, 14, 15, 28, 31, 64):
        assert torch.equal(multiplied(rows[:count], weight), together[:count]), count


def test_the_other_tile_of_products(tmp_path: Path) -> None:
    """What processors with other vectors than this one's compute."""
    flag = not get_host_cpu_features().get("avx512f")
    code = f"""
import sys
from unittest.mock import patch
import numba, torch
numba.njit(lambda: 0)()  # Numba itself is told the truth
with patch("llvmlite.binding.get_host_cpu_features", lambda: {{"avx512f": {flag}}}):
    from elpo_fast.cpu.vectors import TILE_ROWS
assert TILE_ROWS == {14 if flag else 6}
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_local_decoder as tests
for dtype in (torch.float32, torch.bfloat16):
    tests.test_products_add_up_in_fp32_and_a_row_does_not_depend_on_the_others(
        (193, 1001), torch.float32, dtype
    )
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}  # it does not know of our lie
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_views_of_bfloat16_share_memory() -> None:
    tensor = torch.zeros(3, dtype=torch.bfloat16)
    as_numpy(tensor)[1] = 0x3F80
    assert tensor.tolist() == [0, 1, 0]
