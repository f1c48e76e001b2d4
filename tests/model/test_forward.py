"""The packed forward under every attention that runs here, and its padding."""

from __future__ import annotations

import pytest
import torch
from elpo_kernels.attention import varlen
from elpo_kernels.attention.varlen import Kernel
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from elpo_fast.model.attention import attention_name
from elpo_fast.model.forward import bucket, packed_hidden, padded

# Two trees: a trunk of three with branches of two and four, and a chain of five.
POSITION = torch.tensor([0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2, 3, 4])
END = torch.tensor([9, 9, 9, 5, 5, 9, 9, 9, 9, 14, 14, 14, 14, 14])
IDS = torch.arange(14) * 3 % 40


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config)


def found(model: PreTrainedModel, backend: str) -> list[torch.Tensor]:
    """Hidden states, and the gradient of every parameter for a fixed weighting of them."""
    model.set_attn_implementation(attention_name(backend))
    model.zero_grad()
    hidden = packed_hidden(model, IDS, POSITION, END)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("backend", ["auto", "path", "varlen"])
def test_backends_agree(
    model: PreTrainedModel, backend: str, segment_kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "flash_kernel", lambda: segment_kernel)
    for ours, theirs in zip(found(model, backend), found(model, "sdpa"), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_backends_that_need_a_gpu_say_so(model: PreTrainedModel) -> None:
    with pytest.raises(RuntimeError, match="'triton' cannot run on cpu"):
        found(model, "triton")


def test_padding_changes_nothing(model: PreTrainedModel) -> None:
    model.set_attn_implementation(attention_name("auto"))
    ids, position, end = padded(IDS, POSITION, END, 128)
    assert len(ids) == len(position) == len(end) == 128
    with torch.no_grad():
        longer = packed_hidden(model, ids, position, end)[:14]
        torch.testing.assert_close(longer, packed_hidden(model, IDS, POSITION, END))


def test_buckets_are_few_and_close() -> None:
    sizes = range(1, 20_000)
    lengths = [bucket(size) for size in sizes]
    assert all(length >= size for length, size in zip(lengths, sizes, strict=True))
    assert all(length % 128 == 0 for length in lengths)
    assert all(bucket(size) <= size * 17 / 16 for size in sizes[2048:])
    assert len(set(lengths)) <= 70
