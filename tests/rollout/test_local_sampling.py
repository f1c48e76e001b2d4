"""Sampling: the fused kernel against plain PyTorch, transformers and the distribution itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from elpo_fast.rollout.local.sampling import (
    SamplingBatch,
    row_keys,
    sample,
    sample_on_cpu,
    uniforms,
)

RUNS = pytest.mark.parametrize("run", [sample, sample_on_cpu], ids=["torch", "fused"])


def batch_of(
    rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    which: np.ndarray | None = None,
) -> SamplingBatch:
    return SamplingBatch(
        which=np.arange(rows) if which is None else which,
        temperature=np.full(rows, temperature, np.float32),
        top_k=np.full(rows, top_k, np.int64),
        top_p=np.full(rows, top_p, np.float32),
        min_p=np.full(rows, min_p, np.float32),
        uniform=uniforms(row_keys(seed, rows), np.zeros(rows, np.int64)),
    )


SETTINGS = [
    {"temperature": t, "top_k": k, "top_p": p, "min_p": m}
    for t, k, p, m in [
        (1.0, 0, 1.0, 0.0),
        (0.3, 0, 1.0, 0.0),
        (2.5, 0, 1.0, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.0, 7, 1.0, 0.0),
        (1.0, 10_000, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (1.0, 0, 0.01, 0.0),
        (1.0, 0, 1.0, 0.05),
        (0.7, 7, 0.9, 0.0),
        (0.7, 50, 0.5, 0.05),
        (2.5, 0, 0.9, 0.2),
        (2.5, 3, 1.0, 0.01),
    ]
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [1, 2, 255, 257, 2000])
def test_fused_equals_plain(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    for seed, setting in enumerate(SETTINGS):
        logits = (torch.randn(6, vocab_size, generator=generator) * 4).to(dtype)
        batch = batch_of(6, seed=seed, **setting)
        plain, fused = sample(logits, batch), sample_on_cpu(logits, batch)
        same = plain.tokens == fused.tokens
        assert same.sum() >= 5  # a uniform number on the edge between two may go either way
        for ours, theirs in zip(fused[1:], plain[1:], strict=True):
            np.testing.assert_allclose(ours[same], theirs[same], atol=2e-5)


@RUNS
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_truncation_equals_transformers(run, setting) -> None:
    logits = torch.randn(64, 400, generator=torch.Generator().manual_seed(1)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(setting["temperature"])])
    if setting["top_k"]:
        warpers.append(TopKLogitsWarper(setting["top_k"]))
    if setting["top_p"] < 1:
        warpers.append(TopPLogitsWarper(setting["top_p"]))
    if setting["min_p"]:
        warpers.append(MinPLogitsWarper(setting["min_p"]))
    expected = warpers(None, logits).double().log_softmax(-1)
    probabilities = expected.exp()
    expected_entropies = -torch.where(probabilities > 0, probabilities * expected, 0).sum(-1)
    drawn = run(logits, batch_of(64, **setting))
    rows, tokens = torch.arange(64), torch.from_numpy(drawn.tokens).long()
    np.testing.assert_allclose(drawn.logprobs, expected[rows, tokens], atol=2e-5)
    np.testing.assert_allclose(drawn.entropies, expected_entropies, atol=2e-5)
    full = (logits.double() / setting["temperature"]).log_softmax(-1)
    np.testing.assert_allclose(drawn.full_logprobs, full[rows, tokens], atol=2e-5)
    np.testing.assert_allclose(drawn.full_entropies, -(full.exp() * full).sum(-1), atol=2e-5)


@RUNS
@pytest.mark.parametrize(
    "setting",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}],
    ids=["plain", "temperature", "top-k", "top-p", "min-p"],
)
def test_samples_follow_the_distribution(run, setting) -> None:
    rows = 20_000
    logits = torch.tensor([[0.0, 1.5, -1.0, 0.3, 2.0, -0.5, 0.9]])
    batch = batch_of(rows, which=np.zeros(rows, np.int64), seed=11, **setting)
    tokens, logprobs, entropies = run(logits, batch)[:3]
    probabilities = np.zeros(7)
    probabilities[tokens] = np.exp(logprobs)
    counts = np.bincount(tokens, minlength=7)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    kept = probabilities > 0
    expected = rows * probabilities[kept]
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    assert chi_square < 22.5  # 0.1 % of true samplers exceed this with 6 degrees of freedom
    # The mean surprise estimates the entropy.
    assert -logprobs.mean() == pytest.approx(entropies[0], abs=0.02)


@RUNS
def test_temperature_zero_takes_the_first_of_the_most_likely(run) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 3.0, 1.0, 3.0]])
    drawn = run(logits, batch_of(2, temperature=0.0, top_p=0.5))
    assert drawn.tokens.tolist() == [1, 0]
    assert drawn.logprobs.tolist() == drawn.entropies.tolist() == [0, 0]
    full = logits.log_softmax(-1)
    np.testing.assert_allclose(drawn.full_logprobs, [full[0, 1], full[1, 0]], atol=1e-6)
    np.testing.assert_allclose(drawn.full_entropies, -(full.exp() * full).sum(-1), atol=1e-6)


@RUNS
def test_ties_with_the_last_kept_token_are_kept(run) -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).repeat(200, 1)
    for setting in ({"top_k": 2}, {"top_p": 0.6}):
        assert set(run(logits, batch_of(200, **setting)).tokens.tolist()) == {0, 1, 2, 3}


@RUNS
@pytest.mark.parametrize("scale", [1e-3, 1e4], ids=["flat", "steep"])
def test_extreme_logits(run, scale: float) -> None:
    logits = torch.randn(16, 3001, generator=torch.Generator().manual_seed(2)) * scale - 5e4
    for setting in ({}, {"top_p": 0.5}, {"top_k": 3000}):
        tokens, logprobs, entropies = run(logits, batch_of(16, **setting))[:3]
        assert ((tokens >= 0) & (tokens < 3001)).all()
        assert np.isfinite(logprobs).all() and np.isfinite(entropies).all()
        assert (entropies > -1e-6).all() and (entropies < np.log(3001) + 1e-4).all()


@RUNS
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval_give_kept_tokens(run, uniform: float) -> None:
    logits = torch.full((3, 700), -40.0)
    logits[:, 100:200] = torch.randn(3, 100, generator=torch.Generator().manual_seed(3))
    batch = SamplingBatch(
        which=np.arange(3),
        temperature=np.ones(3, np.float32),
        top_k=np.full(3, 90),
        top_p=np.ones(3, np.float32),
        min_p=np.zeros(3, np.float32),
        uniform=np.full(3, uniform),
    )
    tokens, logprobs, *_ = run(logits, batch)
    assert ((tokens >= 100) & (tokens < 200)).all() and (logprobs > -20).all()


def test_not_a_number_shows() -> None:
    logits = torch.full((2, 300), torch.nan)
    for setting in ({}, {"top_p": 0.9}, {"top_k": 3}):
        assert not np.isfinite(sample_on_cpu(logits, batch_of(2, **setting))[1:]).any()


def test_uniform_numbers_depend_on_seed_row_and_step_alone() -> None:
    keys = row_keys(5, 300)
    steps = np.arange(400)
    grid = uniforms(np.repeat(keys, 400), np.tile(steps, 300)).reshape(300, 400)
    assert grid.min() >= 0 and grid.max() < 1
    assert len(np.unique(grid)) == grid.size
    assert grid.mean() == pytest.approx(0.5, abs=0.005) and grid.std() == pytest.approx(
        12**-0.5, abs=0.005
    )
    for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
    assert (uniforms(keys[7:8], steps[9:10]) == grid[7, 9]).all()
    assert not np.isin(row_keys(6, 300), keys).any()


PRINT_A_SAMPLE = """
import torch
from tests.rollout.test_local_sampling import batch_of
from elpo_fast.rollout.local.sampling import sample_on_cpu

logits = torch.randn(32, 520, generator=torch.Generator().manual_seed(0))
print([array.tobytes().hex() for array in sample_on_cpu(logits, batch_of(32))])
"""


def test_code_that_is_compiled_computes_what_code_from_disk_does(tmp_path: Path) -> None:
    """Else a run could not be resumed bitwise where its first process had to compile."""

    def printed() -> str:
        return subprocess.run(
            [sys.executable, "-c", PRINT_A_SAMPLE],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    compiled = printed()
    assert list(tmp_path.rglob("*.nbc")), "code was to be kept here"
    assert printed() == compiled
