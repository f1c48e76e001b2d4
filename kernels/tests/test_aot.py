"""Every shipped kernel compiles for chips that are not here, without spills."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from elpo_kernels import aot


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_kernel_fits(target: str) -> None:
    usages = [aot.measure(configuration, target) for configuration in aot.shipped(target)]
    assert len({usage.name for usage in usages}) == len(usages) == 78
    misfits = [usage for usage in usages if not usage.fits]
    assert not misfits, "\n".join(map(str, misfits))
    assert all(usage.registers > 0 for usage in usages)


def test_a_kernel_that_cannot_fit_is_noticed() -> None:
    configuration = next(aot.shipped("sm_80"))
    constants = {**configuration.constants, "BLOCK": 8192}
    usage = aot.measure(replace(configuration, constants=constants, warps=1), "sm_80")
    assert usage.spilled > 0 and not usage.fits
    assert not replace(usage, spilled=0, shared=164 << 10).fits
