"""The training loop end to end on a model so small that a step takes a second."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from elpo_fast.config import Config, ConfigError, load_config, parse_config
from elpo_fast.model import load
from elpo_fast.model.tokenizer import CHATML
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.train import loop, parts, update
from elpo_fast.train.checkpoint import latest
from elpo_fast.train.export import export_run
from elpo_fast.train.parts import settled
from elpo_fast.train.run import RunFolder
from elpo_fast.train.step import NonFiniteError, PolicyOptimizer
from elpo_fast.train.summary import read_metrics
from elpo_fast.tree import io as tree_io
from elpo_fast.tree.store import Forest
from elpo_fast.types import RunError


def make_config(folder: Path, **sections: dict[str, Any]) -> Config:
    data: dict[str, Any] = {
        "run": {"dir": str(folder), "threads": 1},
        "model": {
            "name": "scratch",
            "dtype": "float32",
            "scratch": {
                "hidden_size": 32,
                "layers": 1,
                "heads": 2,
                "kv_heads": 1,
                "intermediate_size": 64,
            },
        },
        "task": {"options": {"steps": 4, "level": 1}, "system": "Go.", "seed": 0},
        "tools": {"workers": 1},
        "rollout": {"call_format": "code", "max_turn_tokens": 12, "max_tokens": 300},
        "algo": {"n_total": 6},
        "sft": {"demonstrations": 4, "batch": 2, "lr": 1e-3},
        "train": {
            "steps": 3,
            "tasks_per_step": 2,
            "updates_per_step": 2,
            "lr": 1e-3,
            "checkpoint_every": 1,
        },
        "eval": {"tasks": 2},
    }
    for name, values in sections.items():
        data[name] = data.get(name, {}) | values
    return parse_config(data)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def random_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never succeeds; verdicts by the answer's length give it gradients."""

    async def grade(self: Any, task: Any, messages: Any, end: Any) -> Any:
        return self.options.verdict(len(messages[-1]["content"]) % 2 == 0, end.value)

    monkeypatch.setattr("elpo_fast.tasks.ledger.Ledger.grade", grade)
    monkeypatch.setattr("elpo_fast.train.loop.cold_start", _no_cold_start)


async def _no_cold_start(*_: Any, **__: Any) -> None:
    """Demonstrations would be judged wrong under random rewards."""


def trees_of(run: Path) -> list[Forest]:
    return [tree_io.load(path) for path in sorted((run / "trees").glob("*.npz"))]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def plotted(run: Path) -> dict[str, list[int]]:
    """Steps of every TensorBoard curve."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_run_leaves_everything_it_promises(tmp_path: Path) -> None:
    console = quiet()
    run = loop.train(make_config(tmp_path), console=console)
    records = read_metrics(run)
    assert [record["phase"] for record in records] == [
        "eval", "sft", "sft", "eval", "rl", "rl", "rl", "eval",
    ]  # fmt: skip
    assert [r["name"] for r in records if r["phase"] == "eval"] == [
        "before SFT",
        "after SFT",
        "after ELPO",
    ]
    for forest in trees_of(run):
        assert np.diff(forest.leaf_start).tolist() == [6, 6]
    assert len(list((run / "tensorboard").iterdir())) == 1
    checkpoint = latest(run)
    assert checkpoint is not None and checkpoint.name.endswith("3")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.chat_template == CHATML, "the model's own, where none is set"
    assert all(tensor.dtype == torch.float32 for tensor in weights(run).values())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for said in (
        "before SFT",
        "after SFT",
        "after ELPO",
        "95 % interval",
        str(run),
    ):
        assert said in shown
    searched = any(record.get("searches") for record in records)
    assert ("localized step" in shown) == searched


def test_the_engine_lends_its_memory_to_all_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def record(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    for name in ("generate", "release", "update_weights"):
        record(LocalEngine, name)
    record(PolicyOptimizer, "nll_update")
    record(loop._Run, "update")
    loop.train(make_config(tmp_path, train={"steps": 1}), console=quiet())
    assert [name for name, _ in groupby(called)] == [
        *("generate", "release", "nll_update", "update_weights"),
        *("generate", "release", "update", "update_weights", "generate"),
    ]


@pytest.mark.parametrize(
    "algo",
    [
        {},
        {"planner": "star", "advantage": "group"},
        {"clip": {"scope": "tree", "eps_elc": 0.2}},
        {"merge_equal_steps": True},
    ],
    ids=["ELPO", "GRPO", "ELPO, clip scope tree", "ELPO, equal steps merged"],
)
def test_algorithms_are_a_matter_of_configuration(
    algo: dict[str, Any], tmp_path: Path, random_rewards: None
) -> None:
    run = loop.train(
        make_config(tmp_path, algo={"n_total": 6, **algo}, train={"steps": 2}), console=quiet()
    )
    steps = [record for record in read_metrics(run) if record["phase"] == "rl"]
    assert [record["trajectories"] for record in steps] == [12, 12]
    assert sum(record["updates"] for record in steps) > 0
    for forest in trees_of(run):
        assert set(np.unique(forest.weight_version)) <= {0, 1, 2, 3}
        if algo.get("planner") == "star":
            assert not len(forest.critical_node) and forest.depth.max() <= 5


def test_eight_updates_a_step_against_recomputed_log_probs(
    tmp_path: Path, random_rewards: None
) -> None:
    train = {"tasks_per_step": 8, "updates_per_step": 8, "old_logprob": "recompute", "steps": 1}
    run = loop.train(make_config(tmp_path, train=train), console=quiet())
    (record,) = [r for r in read_metrics(run) if r["phase"] == "rl"]
    assert record["updates"] > 4
    # The same weights in fp32 on both sides, and ratios that move as the updates go on.
    assert 0 < record["mismatch_mean"] <= record["mismatch_max"] < 1e-4
    assert record["approx_kl"] > 0 and record["ratio_max"] > 1.001
    assert record["prompt_tokens"] == sum(
        record[f"prompt_tokens_{how}"] for how in ("cached", "computed")
    )


def test_resume_does_every_step_once(
    tmp_path: Path, random_rewards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.train(make_config(tmp_path / "whole"), console=quiet())
    config = make_config(tmp_path / "cut")

    saved = tree_io.save

    def crash(forest: Forest, path: Path) -> None:
        saved(forest, path)
        if path.name == "step_000002.npz":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tree_io, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, console=quiet())
    # What a kill leaves that falls into the writing of trees.
    partial = config.run_dir / "trees" / f".step_000003.npz.1{tree_io.TEMPORARY}"
    partial.write_bytes(b"PK")
    run = loop.train(config, resume=True, console=quiet())
    assert not partial.exists()
    records, expected = read_metrics(run), read_metrics(whole)
    assert [(r["phase"], r["step"]) for r in records] == [(r["phase"], r["step"]) for r in expected]
    for ours, theirs in zip(trees_of(run), trees_of(whole), strict=True):
        assert ours.task_ids == theirs.task_ids
        assert np.array_equal(ours.weight_version, theirs.weight_version)
    assert plotted(run) == plotted(whole)
    # The first step comes before the crash and is the same work.
    assert np.array_equal(trees_of(run)[0].token_ids, trees_of(whole)[0].token_ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_are_trained_saved_and_resumed(
    dtype: str, tmp_path: Path, random_rewards: None
) -> None:
    base = make_config(tmp_path).model
    model = base.model_dump() | {"dtype": dtype, "lora": {"rank": 2, "alpha": 8}}
    train = {"steps": 2, "lr": 0.02}
    loop.train(make_config(tmp_path / "cut", model=model, train=train), console=quiet())
    runs = [
        loop.train(
            make_config(tmp_path / name, model=model, train=train | {"steps": 3}),
            resume=name == "cut",
            console=quiet(),
        )
        for name in ("cut", "whole")
    ]
    export_run(runs[0], tmp_path / "exported", adapters_alone=True)
    export_run(runs[0], tmp_path / "merged")
    folders = (runs[0] / "adapters", runs[1] / "adapters", tmp_path / "exported")
    cut, whole, exported = (load_file(path / "adapter_model.safetensors") for path in folders)
    assert len(cut) == 2 * 7
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)
    assert "adapter_config.json" not in {file.name for file in (runs[0] / "model").iterdir()}
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == weights(runs[0]).keys()
    torch.testing.assert_close(weights(runs[0]), merged, rtol=0, atol=0)
    torch.testing.assert_close(cut, exported, rtol=0, atol=0)
    assert max(float(tensor.abs().max()) for name, tensor in cut.items() if "lora_B" in name) > 0.01
    ours, theirs = (read_metrics(run)[-2] for run in runs)
    assert ours["grad_norm"] > 0
    assert ours["loss"] == theirs["loss"]


OVERLAP = {"overlap": 1, "old_logprob": "recompute", "importance_sampling": "token"}


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_overlap_collects_the_next_trees_while_training(
    level: str, tmp_path: Path, random_rewards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, overlapped = loop._Run.update, []

    def waiting(self: Any, step: int, *rest: Any) -> dict[str, Any]:
        following = self.folder.tree_file(step + 2)
        until = time.monotonic() + 20
        while step + 1 < self.config.train.steps and not following.is_file():
            assert time.monotonic() < until, "nothing was collected during the update"
            time.sleep(0.01)
        overlapped.append(step)
        return real(self, step, *rest)

    monkeypatch.setattr(loop._Run, "update", waiting)
    train = {**OVERLAP, "importance_sampling": level}
    run = loop.train(make_config(tmp_path, train=train), console=quiet())
    assert overlapped == [0, 1, 2]
    steps = [record for record in read_metrics(run) if record["phase"] == "rl"]
    assert [r["staleness_max"] for r in steps] == [0, 1, 1]
    assert [r["staleness_mean"] for r in steps] == [0, 1, 1]
    # Version 1 are the weights after the cold start; a push between them would be seen here.
    assert [np.unique(f.weight_version[1:]).tolist()[-1] for f in trees_of(run)] == [1, 1, 2]
    assert steps[0]["mismatch_max"] < 1e-4 < steps[1]["mismatch_max"]
    assert all(0 < r["mismatch_ess"] <= 1 for r in steps)


def test_overlap_resumes_with_the_trees_that_were_waiting(
    tmp_path: Path, random_rewards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.train(make_config(tmp_path / "whole", train=OVERLAP), console=quiet())
    config = make_config(tmp_path / "cut", train=OVERLAP)
    real = loop._Run.update

    def crash(self: Any, step: int, *rest: Any) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return real(self, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "update", crash)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, console=quiet())
    (config.run_dir / "trees" / "step_000003.npz").unlink()  # the checkpoint has its own
    run = loop.train(config, resume=True, console=quiet())
    ours, theirs = read_metrics(run), read_metrics(whole)
    assert [(r["phase"], r["step"]) for r in ours] == [(r["phase"], r["step"]) for r in theirs]
    assert [r["staleness_max"] for r in ours if r["phase"] == "rl"] == [0, 1, 1]
    assert ours[-2]["trajectories"] == theirs[-2]["trajectories"]


def test_overlap_that_fails_stops_both_halves(
    tmp_path: Path, random_rewards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise NonFiniteError("the loss", [0])

    monkeypatch.setattr(loop._Run, "update", broken)
    with pytest.raises(NonFiniteError):
        loop.train(make_config(tmp_path, train=OVERLAP), console=quiet())


def test_resume_before_the_first_checkpoint_and_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, train={"steps": 1})
    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(config, console=quiet())
    assert len(read_metrics(config.run_dir)) == 3  # an evaluation, two updates
    run = loop.train(config, resume=True, console=quiet())
    records = read_metrics(run)
    assert [r["phase"] for r in records] == ["eval", "sft", "sft", "eval", "rl", "eval"]
    console = quiet()
    loop.train(config, resume=True, console=console)
    assert read_metrics(run) == records
    assert "after ELPO" in console.file.getvalue()  # type: ignore[attr-defined]


def test_step_that_is_not_finite_stops_with_its_trees_and_the_weights_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, train={"updates_per_step": 1})
    real = update.score

    def poisoned(forest: Forest, *rest: Any) -> Any:
        scored = real(forest, *rest)
        pos = scored.pos.copy()
        pos[forest.node_start[1] :] = np.inf
        return dataclasses.replace(scored, pos=pos)

    monkeypatch.setattr(update, "score", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        loop.train(config, console=quiet())
    (saved,) = config.run_dir.glob("nonfinite_*.npz")
    forest = tree_io.load(saved)
    assert caught.value.trees == (1,)
    assert forest.task_ids[1] in str(caught.value) and forest.task_ids[0] not in str(caught.value)
    checkpoint = export_run(config.run_dir, tmp_path / "before")
    assert checkpoint.name.endswith("0")
    before = load_file(tmp_path / "before" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in before.values())


def test_a_step_in_which_everything_raises_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would with a reward function that is wrong; one that raises now and then does not."""

    async def grade(self: Any, task: Any, messages: Any, end: Any) -> Any:
        raise KeyError("answer")

    monkeypatch.setattr("elpo_fast.tasks.ledger.Ledger.grade", grade)
    config = make_config(tmp_path, sft={"demonstrations": 0}, eval={"tasks": 0})
    with pytest.raises(RunError, match=r"step 1: all 12 trajectories .* KeyError: 'answer'; mend"):
        loop.train(config, console=quiet())
    assert len(trees_of(config.run_dir)) == 1 and latest(config.run_dir) is not None


def test_trains_inside_a_running_loop_as_a_notebook_has(tmp_path: Path) -> None:
    config = make_config(tmp_path, sft={"demonstrations": 0}, train={"steps": 0})

    async def cell() -> Path:
        return loop.train(config, console=quiet())

    assert (asyncio.run(cell()) / "model").is_dir()


def test_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="already exists; continue it with --resume"):
        loop.train(config, console=quiet())


def test_run_that_failed_before_it_began_can_be_started_again(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup):
        loop.train(make_config(tmp_path, rollout={"max_tokens": 3}), console=quiet())
    config = make_config(tmp_path, sft={"demonstrations": 0}, train={"steps": 0})
    assert config.run_dir.is_dir()
    assert loop.train(config, console=quiet()) == config.run_dir


def test_resume_refuses_another_configuration(tmp_path: Path) -> None:
    config = make_config(tmp_path, sft={"demonstrations": 0}, train={"steps": 0})
    loop.train(config, console=quiet())
    other = make_config(tmp_path, sft={"demonstrations": 0}, train={"steps": 0, "lr": 0.5})
    with pytest.raises(ConfigError, match=r"train.lr was 0.001 and is now 0.5"):
        loop.train(other, resume=True, console=quiet())
    with pytest.raises(ConfigError, match="nothing to resume"):
        loop.train(make_config(tmp_path / "none"), resume=True, console=quiet())


def test_a_run_that_is_older_than_a_key_resumes(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    RunFolder.create(config).close()
    saved = config.run_dir / "config.yaml"
    saved.write_text(saved.read_text().replace("  compile: auto\n", ""))
    assert load_config(saved) == config
    RunFolder.resume(config).close()
    assert "  compile: auto\n" in saved.read_text()


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_auto_dtype_stays_what_it_was_when_the_run_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    parts = {"model": {"dtype": "auto"}, "sft": {"demonstrations": 0}, "train": {"steps": 0}}
    config = make_config(tmp_path, **parts)
    widens = "elpo_fast.model.load.widens_bfloat16"
    monkeypatch.setattr(widens, lambda: first == "float32")
    loop.train(config, console=quiet())
    monkeypatch.setattr(widens, lambda: first != "float32")
    run = loop.train(config, resume=True, console=quiet())
    assert load_config(run / "config.yaml").model.dtype == first


def test_what_is_left_to_the_machine_is_decided_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU first, and on a CPU when the run goes on."""
    names = ("trees_in_flight", "max_batch", "cache_tokens")
    given = make_config(tmp_path, rollout={"max_batch": 7})
    with monkeypatch.context() as patched:
        for module in (load, parts):
            patched.setattr(module, "resolve_device", lambda _: torch.device("cuda"))
        patched.setattr(load, "has_compiler", lambda: True)
        first = settled(given)
    assert [getattr(first.rollout, name) for name in names] == [128, 7, 131072]
    assert first.model.compile is True
    here = settled(given)
    assert [getattr(here.rollout, name) for name in names] == [16, 7, 65536]
    assert here.model.compile is False
    RunFolder.create(first).close()
    assert settled(given, goes_on=True) == first
    assert settled(given) == here


def test_source_without_solver_refuses_a_cold_start(tmp_path: Path) -> None:
    gym = {"source": "reasoning_gym", "options": {"dataset": "chain_sum", "size": 50}}
    config = make_config(tmp_path, task=gym | {"system": None})
    with pytest.raises(ConfigError, match="no solver to demonstrate"):
        loop.train(config, console=quiet())


def test_metrics_are_plain_json_numbers(tmp_path: Path, random_rewards: None) -> None:
    run = loop.train(make_config(tmp_path, train={"steps": 1}), console=quiet())
    (record,) = [r for r in read_metrics(run) if r["phase"] == "rl"]
    for name in ("success", "failures_localized", "sharing", "approx_kl", "clipped_low", "entropy"):
        assert isinstance(record[name], float), name
    assert (
        record["sharing_computed"] >= record["sharing"] > 1
    )  # all tasks have the same system text
    text = (run / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert all(json.loads(line) for line in text.splitlines())
