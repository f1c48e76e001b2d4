"""Moments in 8 bits: near AdamW's, really in 8 bits, saved and resumed."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import pytest
import torch

from elpo_fast.config import ConfigError
from elpo_fast.train import adamw

SHAPES = [(64, 128), (33, 200), (96,)]  # whole blocks of 256, not whole ones, too small
OPTIONS: dict[str, Any] = {"lr": 1.0, "betas": (0.9, 0.95), "weight_decay": 0.01}
LR = 1e-3


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def updates(
    optimizer: torch.optim.Optimizer, given: list[torch.nn.Parameter], numbers: range
) -> None:
    """Updates by gradients that follow from their numbers, with rows of very different size."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in given:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient * 10 ** -torch.arange(len(gradient)).fmod(3).view(
                -1, *[1] * (gradient.ndim - 1)
            )
        adamw.step(optimizer, LR)


def test_updates_stay_near_adamw() -> None:
    ours, theirs, start = parameters(), parameters(), parameters()
    updates(adamw.make_adamw("adamw8bit", [{"params": ours}], **OPTIONS), ours, range(10))
    updates(adamw.make_adamw("adamw", [{"params": theirs}], **OPTIONS), theirs, range(10))
    for index, (our, their, first) in enumerate(zip(ours, theirs, start, strict=True)):
        apart = ((our - their).norm() / (their - first).norm()).item()
        if index == 0:
            assert 1e-3 < apart < 0.03
        else:
            assert apart < 1e-3  # float32's rounding of the parameters


def test_state_is_one_byte_a_moment() -> None:
    given = parameters()
    optimizer = adamw.make_adamw("adamw8bit", [{"params": given}], **OPTIONS)
    updates(optimizer, given, range(1))
    state = optimizer.state[given[0]]
    for name in ("exp_avg", "exp_avg_sq"):
        codes, scale = state[name].codes, state[name].scale
        assert codes.dtype == torch.uint8 and codes.shape == given[0].shape
        assert codes.unique().numel() > 50
        assert scale.numel() == given[0].numel() // 256
        exact = adamw.exact(state[name])
        assert type(exact) is torch.Tensor and exact.dtype == torch.float32
        assert exact.abs().max() == scale.max()
    assert adamw.exact(optimizer.state[given[2]]["exp_avg"]).dtype == torch.float32


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_moments_that_went_through_float32_continue_exactly(kind: adamw.Kind) -> None:
    given = parameters()
    optimizer = adamw.make_adamw(kind, [{"params": given}], **OPTIONS)
    updates(optimizer, given, range(3))
    again = copy.deepcopy(given)
    saved = [
        {name: adamw.exact(value).clone() for name, value in optimizer.state[p].items()}
        for p in given
    ]
    other = adamw.make_adamw(kind, [{"params": again}], **OPTIONS)
    adamw.make_moments(other, list(again))
    for parameter, before in zip(again, given, strict=True):
        assert torch.equal(parameter, before)
    for parameter, moments in zip(again, saved, strict=True):
        for name, value in other.state[parameter].items():
            value.copy_(moments[name])
    updates(optimizer, given, range(3, 6))
    updates(other, again, range(3, 6))
    for ours, theirs in zip(given, again, strict=True):
        assert torch.equal(ours, theirs)


def test_without_torchao_a_sentence_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'elpo-fast\[adamw8bit\]'"):
        adamw.make_adamw("adamw8bit", [{"params": parameters()}], **OPTIONS)
