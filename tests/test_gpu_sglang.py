"""`bench.gpu_sglang` on a CPU, with the real SGLang; and what it takes to a bare machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
STANDINS = ROOT / "bench" / "gpu_sglang" / "standins"
WHEEL_MIB = 55


def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    if not (Path(sys.prefix).parent / ".venv-sglang" / "bin" / "python").exists():
        pytest.skip("the real SGLang is not installed; run `make sglang-cpu`")
    out = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_sglang", "--tiny", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    parts = json.loads(out.read_text())["parts"]
    assert parts.keys() == {"agrees", "collects", "speed"}
    assert [row["mean"]["decoded"] < 1e-4 for row in parts["agrees"]["rows"] if "mean" in row] == [
        True
    ] * 6
    assert 0 < parts["collects"]["rows"][-1]["cached_share"] < 1
    assert parts["speed"]["rows"][-1]["tokens_per_s"].keys() == {"0", "5", "16"}


STANDIN = """
import sys, torch, flashinfer.sampling, sgl_kernel.kvcacheio
from sgl_kernel import fused_add_rmsnorm, rmsnorm, silu_and_mul
from sgl_kernel.utils import is_arch_support_pdl
x, residual, weight, out = torch.load(sys.argv[1])
normed = rmsnorm(x, weight, 1e-3, out=out)
assert normed is out and is_arch_support_pdl() is False
added = x.clone(), residual.clone()
assert fused_add_rmsnorm(*added, weight, 1e-3) is None
torch.save((normed, *added), sys.argv[1])
try:
    silu_and_mul(x)
except RuntimeError as error:
    assert "sgl_kernel.silu_and_mul is not installed" in str(error)
else:
    raise SystemExit("a placeholder was called")
"""


def test_standins_compute_what_a_dense_model_asks(tmp_path: Path) -> None:
    def expected(x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight

    x, residual, weight = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
    file = tmp_path / "tensors"
    torch.save((x, residual, weight, torch.full_like(x, torch.nan)), file)
    subprocess.run(
        [sys.executable, "-c", STANDIN, str(file)],
        env={**os.environ, "PYTHONPATH": str(STANDINS)},
        cwd=tmp_path,
        check=True,
    )
    normed, added, summed = torch.load(file)
    torch.testing.assert_close(normed, expected(x))
    torch.testing.assert_close(summed, x + residual)
    torch.testing.assert_close(added, expected(x + residual))


def test_wheels_resolve_and_fit(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    name = (ROOT / "bench" / "gpu_sglang_wheels.txt").read_text().split()[1]
    if subprocess.run([*pip, str(tmp_path / "one"), name], check=False).returncode:
        pytest.skip("no package registry is reached")
    wheels = tmp_path / "wheels"
    command = [sys.executable, "-m", "bench.gpu_sglang", "--wheels", str(wheels)]
    subprocess.run(command, cwd=ROOT, check=True)
    size = sum(wheel.stat().st_size for wheel in wheels.iterdir())
    assert size < WHEEL_MIB << 20
