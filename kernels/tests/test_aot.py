"""Every shipped kernel, and every tile it may run with instead, fits chips that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import aot
from elpo_kernels.attention.tiles import CANDIDATES, TILES, candidates


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_kernel_fits(target: str) -> None:
    usages = [aot.measure(configuration, target) for configuration in aot.shipped(target)]
    assert len(usages) == 84
    usages += [aot.measure(configuration, target) for configuration in aot.candidates(target)]
    assert len({usage.name for usage in usages}) == len(usages)
    misfits = [usage for usage in usages if not usage.fits]
    assert not misfits, "\n".join(map(str, misfits))
    assert all(usage.registers > 0 for usage in usages)


@pytest.mark.parametrize("chip", CANDIDATES)
def test_candidates_are_few_and_hold_what_ships(chip: str) -> None:
    lists = [(dim, *item) for dim, some in CANDIDATES[chip].items() for item in some.items()]
    assert sum(len(set(tiles)) for _, _, tiles in lists) <= 20
    for dim, kernel, tiles in lists:
        assert len(tiles) > 1 and getattr(TILES[chip][2, dim], kernel) in tiles
    cpu = torch.device("cpu")  # has the tiles of sm_80, and a head of 96 those of 128
    assert [kernel for kernel, _ in candidates(cpu, 96)] == 2 * ["forward"] + 3 * ["query"] + 3 * [
        "key"
    ]


def test_a_kernel_that_cannot_fit_is_noticed() -> None:
    configuration = next(aot.shipped("sm_80"))
    constants = {**configuration.constants, "BLOCK": 8192}
    usage = aot.measure(replace(configuration, constants=constants, warps=1), "sm_80")
    assert usage.spilled > 0 and not usage.fits
    assert not replace(usage, spilled=0, shared=164 << 10).fits
