"""The configuration: every file in configs/ loads, every kind of fault is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from elpo_fast.algo import check
from elpo_fast.config import (
    Config,
    ConfigError,
    differences,
    dump_config,
    load_config,
    parse_config,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
ALGORITHMS = sorted((Path(__file__).parents[1] / "configs" / "algorithms").glob("*.yaml"))


def test_there_are_configurations() -> None:
    assert {"quickstart.yaml", "tiny.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config


def test_defaults_are_the_papers() -> None:
    algo = Config().algo
    assert (algo.n_total, algo.bel.b_max, algo.bel.x_min, algo.bel.x_max) == (16, 3, 1, 3)
    assert (algo.bel.beta, algo.lambda_tree) == (5.0, 0.5)
    assert (algo.clip.eps_low, algo.clip.eps_high, algo.clip.eps_elc) == (0.2, 0.315, 0.115)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"trian": {}}, "unknown key trian; did you mean train?"),
        ({"train": {"lrr": 1}}, "unknown key train.lrr; did you mean train.lr?"),
        ({"train": {"n_total": 3}}, "did you mean algo.n_total?"),
        ({"tools": {"mcp": {"url": "http://x"}}}, "tools.mcp is a list of sections"),
        ({"tools": {"mcp": ["x"]}}, "tools.mcp.0 is a section"),
        ({"tools": {"mcp": [{"comand": ["x"]}]}}, "did you mean tools.mcp.0.command?"),
        ({"algo": {"bel": {"xmax": 3}}}, "unknown key algo.bel.xmax; did you mean algo.bel.x_max?"),
        ({"zzz": 1}, "known: run, model"),
        ({"train": 3}, "train is a section"),
        ({"train": {"lr": -1}}, "train.lr: Input should be greater than 0, got -1"),
        ({"train": {"lr": float("nan")}}, "train.lr"),
        ({"algo": {"bel": {"x_min": 5}}}, "x_min=5 must not exceed x_max=3"),
        ({"algo": {"clip": {"eps_low": 0.95}}}, "must not exceed 1"),
        ({"model": {"scratch": {"heads": 5}}}, "multiple"),
        ({"train": {"updates_per_step": 9}}, "needs at least as many tasks"),
        ({"run": {"name": "../up"}}, "run.name"),
        ({"rollout": {"top_p": 0.9}}, "train.old_logprob=recompute"),
        ({"train": {"importance_sampling": "token"}}, "set old_logprob=recompute"),
        ({"train": {"overlap": 1}}, "importance_sampling=token"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fault_is_one_clear_line(data: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr", "not of the form"),
        ("=3", "not of the form"),
        ("train.lr=[", "not valid YAML"),
        ("train.lr.deeper=1", "is a value, not a section"),
        ("train.lrr=1", "did you mean train.lr?"),
        ("actor_rollout_ref.rollout.n=8", "docs/migrating.md says where each of verl's keys went"),
    ],
)
def test_faulty_override_is_one_clear_line(override: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {lr: 1.0e-6}")
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")) as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)


def test_overrides_reach_nested_values(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("")
    config = load_config(path, ["train.lr=1e-6", "algo.bel.beta=2", "run.name=other"])
    assert (config.train.lr, config.algo.bel.beta, config.run.name) == (1e-6, 2.0, "other")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"a: [", "not valid YAML"),
        (b"- 1", "must hold"),
        (b"\xff", "UTF-8"),
    ],
    ids=["missing", "syntax", "list", "binary"],
)
def test_unreadable_file_is_one_clear_line(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", CONFIGS, ids=lambda path: path.stem)
def test_every_algorithm_goes_with_every_task(task: Path) -> None:
    alone = load_config(task)
    for file in ALGORITHMS:
        config = load_config(task, ["algo.n_total=8"], [file])
        check(config.algo)
        assert differences(alone, config)
        changed = [key for key in differences(alone, config) if not key.startswith("algo.")]
        assert not changed, f"{file.stem} changes {changed}"


def test_files_are_laid_over_key_by_key(tmp_path: Path) -> None:
    base, one, two = (tmp_path / f"{name}.yaml" for name in ("base", "one", "two"))
    base.write_text("train: {lr: 1.0e-3, steps: 3}\nalgo: {n_total: 7}\n")
    one.write_text("train: {lr: 1.0e-4}\nalgo: {planner: star}\n")
    two.write_text("algo: {planner: random, clip: {eps_low: 0.3}}\n")
    config = load_config(base, ["algo.clip.eps_low=0.4"], [one, two])
    assert (config.train.lr, config.train.steps, config.algo.n_total) == (1e-4, 3, 7)
    assert (config.algo.planner, config.algo.clip.eps_low) == ("random", 0.4)
    with pytest.raises(ConfigError, match="cannot read configuration"):
        load_config(base, [], [tmp_path / "nothing.yaml"])
