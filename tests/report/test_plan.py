"""Estimates of steps, beside everything that was measured and recorded."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from elpo_fast.cli import main
from elpo_fast.config import AlgoConfig, Config, TrainConfig
from elpo_fast.regions import COMPUTED
from elpo_fast.report import plan
from elpo_fast.report.plan import Card, Model, Setting, Work
from elpo_fast.tree import io

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
# `bench` belongs to no distribution, and the root must not be on the path: `kernels/` lies there.
sys.modules.setdefault("bench", ModuleType("bench")).__path__ = [str(ROOT / "bench")]
forests = importlib.import_module("bench.forests")

ALONE = Setting(1, 1, 0, False)
GPU_TREES = forests.Shape(
    trajectories=16, from_root=3, steps=12, step_tokens=(100, 180), prompt=600
)
STAR = forests.Shape(trajectories=8, from_root=8, steps=3, step_tokens=(24, 36), prompt=600)
QWEN = {"0.5b": (896, 4864, 24, 14, 16384), "1.5b": (1536, 8960, 28, 12, 8192)}
# Of the machine of `step_emerald_rapids`: median rate of `engine/emerald_rapids/floor.txt`, fp32.
XEON = Card("Xeon", 24e9, 314e9, 24e9, 0.0)


@cache
def qwen(name: str) -> Model:
    hidden, mlp, layers, heads, _ = QWEN[name]
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Model.of(meta(Qwen2ForCausalLM, config), 2)


@cache
def smollm2(number: int) -> Model:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return Model.of(meta(LlamaForCausalLM, config), number)


def meta(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config)


def works(parts: Any) -> list[Work]:
    return [
        Work(len(part.trie), float(np.sum(part.trie.position + 1.0)), len(part.loss_rows))
        for part in parts
    ]


@cache
def gpu_parts(name: str, layout: str) -> list[Work]:
    rng = np.random.default_rng(0)
    grown = [forests.grow(rng, GPU_TREES, 151_936) for _ in range(2)]
    layouts = {"trees": forests.as_trees, "rows": forests.as_rows}
    return works(layouts[layout](grown, QWEN[name][-1]))


@cache
def cpu_parts(forest: str, layout: str) -> list[Work]:
    if forest == "star":
        rng = np.random.default_rng(0)
        grown = [forests.grow(rng, STAR, 49152) for _ in range(2)]
    else:
        recorded = io.load(ROOT / "bench" / "data" / "quickstart_step5.npz")
        grown = [forests.regrown(recorded, index) for index in range(2)]
    if layout == "rows":
        return works(forests.as_rows(grown, 2048))
    # Measured before prefixes that siblings have in common were merged.
    parts = [part for tree in grown for part in forests.as_trees([tree], 2048)]
    return works(map(forests.unshared, parts))


def updates() -> dict[str, tuple[float, float]]:
    """Estimated and measured seconds of every recorded update."""
    found = {}
    h200 = json.loads((RESULTS / "h200" / "gpu.json").read_text())["parts"]["update"]["rows"]
    for row in (row for row in h200 if "blocks" in row):
        shares = plan.COMPILED if row["blocks"] == "compiled" else plan.EAGER
        for layout, measured in row["ms"].items():
            parts = gpu_parts(row["model"], layout)
            seconds = plan.update_seconds(
                qwen(row["model"]), plan.CARDS["h200"], shares, parts, ALONE
            )
            found[f"H200 {row['model']} {row['blocks']} {layout}"] = seconds, measured / 1e3
    h100 = json.loads((RESULTS / "h100" / "attention_update.json").read_text())["training"]
    for layout in ("trees", "rows"):
        parts = gpu_parts("0.5b", layout)
        seconds = plan.update_seconds(
            qwen("0.5b"), plan.CARDS["h100"], plan.EAGER, parts, ALONE, optimizer=False
        )
        found[f"H100 0.5b eager {layout}"] = seconds, h100[0]["ms"][f"{layout}-triton"] / 1e3
    for name in ("recorded", "star"):
        text = (RESULTS / "step_emerald_rapids" / f"{name}.txt").read_text()
        last = json.loads(text.splitlines()[-1])["seconds"]
        for layout in ("trees", "rows"):
            parts = cpu_parts(name, layout)
            seconds = plan.update_seconds(smollm2(4), XEON, plan.CPU, parts, ALONE)
            found[f"Xeon {name} {layout}"] = seconds, statistics.median(last[layout])
    card, regions = profile()
    parts = [Work(*(regions["backward"][n] / 5 for n in ("tokens", "pairs")), 1365 / 5)] * 5
    once = plan.update_seconds(smollm2(4), card, plan.CPU, parts, ALONE, optimizer=False)
    step = plan.update_seconds(smollm2(4), card, plan.CPU, [], ALONE)
    measured = sum(regions[name]["seconds"] for name in COMPUTED)
    found["quickstart, profiled"] = once + regions["optimizer"]["passes"] * step, measured
    return found


def profile() -> tuple[Card, dict[str, Any]]:
    """Rates of a busy machine as they were measured then, and a profiled step's regions."""
    saved = json.loads((RESULTS / "profile" / "quickstart" / "profile.json").read_text())
    limits = saved["limits"]
    card = Card("busy Xeon", 24e9, limits["products"], limits["memory"], 0.0)
    return card, saved["steps"][0]["regions"]


def memories() -> dict[str, tuple[float, float]]:
    """Estimated and measured bytes of every recorded update on a GPU."""
    h200 = json.loads((RESULTS / "h200" / "gpu.json").read_text())["parts"]["update"]["rows"]
    found = {}
    for row in (row for row in h200 if "blocks" in row):
        shares = plan.COMPILED if row["blocks"] == "compiled" else plan.EAGER
        most = max(part.tokens for part in gpu_parts(row["model"], "trees"))
        parts = plan.memory(Config(), qwen(row["model"]), shares, most, ALONE)
        measured = row["memory_gib"] * 2**30
        found[f"H200 {row['model']} {row['blocks']}"] = sum(parts.values()), measured
    return found


def decodings() -> dict[str, tuple[float, float]]:
    """Estimated and measured seconds of decoding 64 rows by 128 tokens after prompts of 80."""
    found = {}
    for name, folder, number in (("EPYC", "engine", 2), ("Xeon", "engine/emerald_rapids", 4)):
        lines = (RESULTS / folder / "floor.txt").read_text().splitlines()
        rounds = [json.loads(line) for line in lines if line.startswith('{"load')]
        rate, bandwidth, tokens = (
            statistics.median(one[key] for one in rounds)
            for key in ("gigaflops_per_second", "gigabytes_per_second", "engine_per_s")
        )
        card = Card(name, 24e9, rate * 1e9, bandwidth * 1e9, 0.0)
        step = plan.decode_seconds(smollm2(number), card, plan.CPU, 64, 80 + 64)
        prompts = smollm2(number).costs.forward(16 * 80, 16 * 80 * 40) / (
            card.products * plan.CPU.body
        )
        found[name] = 128 * step + prompts, 64 * 128 / tokens
    card, regions = profile()
    decode = regions["decode"]
    rows, length = decode["rows"] / decode["passes"], decode["pairs"] / decode["tokens"]
    step = plan.decode_seconds(smollm2(2), card, plan.CPU, rows, length)
    found["quickstart, profiled"] = decode["passes"] * step, decode["seconds"]
    return found


CELLS = {
    "seconds of an update": updates,
    "memory of an update": memories,
    "CPU decoding": decodings,
}


@pytest.mark.parametrize("what", CELLS)
def test_the_error_that_is_stated_is_that_of_what_was_measured(what: str) -> None:
    cells = CELLS[what]()
    errors = {name: estimated / measured - 1 for name, (estimated, measured) in cells.items()}
    for name, (estimated, measured) in cells.items():
        print(f"{what}, {name}: {estimated:.4g} for {measured:.4g}, {errors[name]:+.1%}")
    assert max(map(abs, errors.values())) == pytest.approx(plan.MEASURED[what], abs=0.006)


@pytest.fixture
def seven(tmp_path: Path) -> str:
    """A folder that describes Qwen2.5-7B and has no weights."""
    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `elpo plan` prints."""
    paper = str(ROOT / "configs" / "qwen2.5_7b_paper.yaml")
    assert main(["plan", paper, "--lengths", "512", "4", "64", "64", *words]) == 0
    return capsys.readouterr().out


def test_the_papers_settings_fit_eight_gpus(seven: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "--gpus", "8", "--gpu", "h100", f"model.name={seven}")
    assert "7.62 billion weights on 8 x H100" in said
    assert "as configured" in said and "suggested" in said and "does not fit" not in said
    assert "seconds of an update 15%" in said and "not measured yet" in said


def test_what_does_not_fit_is_said(seven: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "--gpus", "1", "--gpu", "l40s", f"model.name={seven}")
    assert "parallel.shard=8 are not 1 GPUs" in said
    assert "nothing fits" in said and "does not fit: updating takes" in said


def test_sharding_divides_the_state_and_costs_the_link() -> None:
    config, model, card = Config(), qwen("1.5b"), plan.CARDS["h100"]
    whole, shard = (
        plan.memory(config, model, plan.COMPILED, 8192, Setting(1, n, 8192, False)) for n in (1, 8)
    )
    for name in ("float32 masters", "AdamW's moments", "gradients"):
        assert shard[name] == pytest.approx(whole[name] / 8)
    slow = card._replace(link=1e9)
    times = [
        plan.update_seconds(model, each, plan.COMPILED, [Work(8192, 8192 * 1000, 4096)], setting)
        for each, setting in ((card, ALONE), (slow, ALONE), (slow, Setting(1, 8, 0, False)))
    ]
    assert times[0] == times[1] < times[2]


def test_shared_prefixes_shorten_the_update() -> None:
    lengths = plan.Lengths(prompt=400, turns=4, said=32, answer=8)
    star, tree = (
        plan.grow(Config(algo=AlgoConfig(planner=name)), lengths) for name in ("star", "bel")
    )
    assert star.whole == tree.whole == 16 * (400 + 4 * 40 - 8)
    assert tree.unique < star.unique == 400 + 16 * (4 * 40 - 8)
    assert star.rows == 16 > tree.rows


def test_too_few_micro_batches_leave_ranks_idle() -> None:
    config = Config(train=TrainConfig(tasks_per_step=16))
    trees = plan.grow(config, plan.Lengths(prompt=200, turns=4, said=64, answer=16))
    update = {
        budget: plan.estimate(
            config, qwen("1.5b"), plan.CARDS["h100"], trees, Setting(8, 1, budget, False), True
        ).update
        for budget in (4096, 1 << 17)
    }
    assert update[1 << 17] > 3 * update[4096]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["configs/tiny.yaml"], "vocabulary of 'scratch'"),
        (["configs/quickstart.yaml", "--gpu", "abacus"], "--gpu abacus: known are a100"),
        (["configs/quickstart.yaml", "--gpus", "0"], "have to be at least 1"),
        (["configs/quickstart.yaml", "--trees", "none.npz"], "none.npz: there is no such file"),
    ],
)
def test_faults_of_the_user_are_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
