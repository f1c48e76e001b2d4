"""How often the host waits for the device in a policy loss, and how GPUs are given whole waves."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from elpo_kernels import linear_logprob, linear_policy_loss
from elpo_kernels.linear import cpu
from elpo_kernels.linear.tiling import MIB, Tiling, whole_waves

WAITS = ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__", "cpu")


@pytest.mark.parametrize(
    ("clipped", "waits"),
    [
        (False, {"chosen_tokens": 1, "take": 3}),
        # Blocks are smaller where rows of the one before lie; live ones are moved together.
        (True, {"chosen_tokens": 1, "take": 4}),
    ],
    ids=["all-live", "half-clipped"],
)
def test_the_host_waits_once_a_block(
    clipped: bool, waits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the calling function, with the cut and the rounded products of a GPU."""
    cut = Tiling(rows=16, strip=64, kept=32, update=300, grain=16, block=1 << 62)
    monkeypatch.setattr(Tiling, "of", staticmethod(lambda *_: cut))
    monkeypatch.setattr(cpu, "widens_bfloat16", lambda: False)
    torch.manual_seed(0)
    hidden = torch.randn(96, 8).bfloat16().requires_grad_()
    weight = torch.randn(300, 8).bfloat16().requires_grad_()
    targets = torch.randint(300, (96,))
    old = linear_logprob(hidden, weight, targets).detach()
    advantages = torch.where(torch.arange(96) % 4 < 2, 1.0, -1.0)
    if clipped:
        old[::2] -= advantages[::2]
    seen: Counter[str] = Counter()

    def counting(method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            caller = sys._getframe(1).f_code.co_name
            if caller not in ("locate", "compact"):  # of PyTorch's tiles, not of a GPU's
                seen[caller] += 1
            return method(*arguments, **named)

        return call

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    out = linear_policy_loss(hidden, weight, targets, old, advantages=advantages, backend="torch")
    monkeypatch.undo()
    assert float(out.stats.clipped_low + out.stats.clipped_high) == (0.5 if clipped else 0.0)
    assert seen == waits


@pytest.mark.parametrize(
    ("processors", "cache_mib", "strip"),
    [(132, 50, 6144), (108, 40, 5120), (148, 126, 16128), (4, 1, 256)],
    ids=["H100", "A100", "B200", "tiny"],
)
def test_products_end_together_and_stay_in_the_cache(
    processors: int, cache_mib: int, strip: int
) -> None:
    rows, columns = whole_waves(processors, cache_mib * MIB)
    assert (rows, columns) == (2048, strip)
    if cache_mib > 1:
        assert rows * columns * 4 <= cache_mib * MIB
        tiles = rows // 128 * (columns // 256)
        assert tiles / (-(-tiles // processors) * processors) >= 0.95
