"""Every example runs, from its own folder, with a model so small that it takes seconds."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import elpo_fast as elpo
from elpo_fast.algo.planners import Trajectory
from elpo_fast.cli import main
from elpo_fast.config import load_config
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.train.summary import read_metrics
from elpo_fast.tree import io

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = (
    *("run.threads=1", "run.name=test", "model.name=scratch", "model.dtype=float32"),
    "model.scratch={hidden_size: 32, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 64}",
    *("rollout.max_tokens=960", "rollout.max_turn_tokens=8", "algo.n_total=4", "tools.workers=1"),
    *("train.steps=1", "train.tasks_per_step=2", "train.updates_per_step=1", "eval.tasks=2"),
    "sft.demonstrations=0",
)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Work in one of the folders of the examples, as its reader does."""

    def go(folder: str) -> None:
        monkeypatch.syspath_prepend(EXAMPLES)  # the path is restored at the end
        sys.path.remove(str(EXAMPLES))
        monkeypatch.chdir(EXAMPLES / folder)

    return go


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = elpo.parse_config({}, ["task.options.steps=3", *TINY])
    texts = ["What is to be done? " + "0123456789 abcdefghijklmnopqrstuvwxyz" * 3] * 5
    loaded = elpo.load_model(config.model, seed=0, tokenizer_texts=texts)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def train(out: Path, *overrides: str) -> elpo.Forest:
    """Run `elpo train train.yaml` here; the trees of its step."""
    assert main(["train", "train.yaml", *TINY, f"run.dir={out}", *overrides]) == 0
    phases = [record["phase"] for record in read_metrics(out / "test")]
    assert phases[-2:] == ["rl", "eval"]
    return io.load(out / "test" / "trees" / "step_000001.npz")


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.parent.name
)
def test_configurations_load(path: Path) -> None:
    load_config(path)


def test_own_reward(inside: Any, tmp_path: Path) -> None:
    inside("own_reward")
    forest = train(tmp_path)
    assert all(reason.startswith("sums:score gives") for reason in forest.reasons)
    rewards = forest.reward[forest.leaf_node]
    assert ((rewards >= 0) & (rewards <= 1)).all()
    assert set(forest.infos[0]) == {"sum"}


def test_own_tasks(inside: Any, tmp_path: Path) -> None:
    inside("own_tasks")
    forest = train(tmp_path)
    assert all(name.startswith("train-") for name in forest.task_ids)
    assert all(reason.startswith("went [") for reason in forest.reasons)


def test_own_tool(inside: Any, tmp_path: Path) -> None:
    inside("own_tool")
    assert set(train(tmp_path).reward[-1:]) <= {0.0, 1.0}
    from cellar import score  # type: ignore[import-not-found]

    async def pour() -> list[str]:
        box = Toolbox(load_config("train.yaml").tools)
        task = elpo.Task("t", (), "test", info={"litres": 3})

        async def call(state: Any, source: int, into: int) -> elpo.ToolResult:
            arguments = {"source": source, "into": into}
            return await box.execute(state, elpo.ToolCall("pour", arguments))

        full = await box.open(task)
        one = await call(full, 1, 2)
        two = await call(one.state, 2, 3)
        other = await call(one.state, 1, 3)  # branches from the same state
        wrong = await call(one.state, 1, 1)
        refused = await call(one.state, 1, 4)
        await box.release([full, one.state, two.state, other.state])
        await box.close()
        assert wrong.error and refused.error and wrong.state == refused.state == one.state
        said = {"role": "tool", "content": two.content}
        assert score(task, [said], elpo.End.ANSWER) == 1
        return [one.content, two.content, other.content]

    assert asyncio.run(pour()) == [
        "now [3, 5, 0] of [8, 5, 3] litres",
        "now [3, 2, 3] of [8, 5, 3] litres",
        "now [0, 5, 3] of [8, 5, 3] litres",
    ]


def test_own_algorithm(inside: Any, tmp_path: Path) -> None:
    inside("own_algorithm")
    forest = train(tmp_path)
    config = load_config("train.yaml", TINY).algo
    scored = elpo.score(forest, config)
    leaves = forest.leaf_node
    np.testing.assert_allclose(scored.advantage[leaves], forest.reward[leaves] + 0.5)
    assert (scored.pos >= 0).all() and (scored.neg <= 0).all()

    planner = elpo.make_planner(load_config("train.yaml").algo)
    asked = []
    while not planner.done:
        (request,) = planner.requests()
        asked.append(request)
        for _ in range(request.count):
            planner.observe(Trajectory(0, (1, 2), (1,), False, 0.0, (), 0.0))
    assert asked == [elpo.Request(0, 6), *[elpo.Request(1, 1)] * 6]


def test_own_format(inside: Any, tmp_path: Path) -> None:
    inside("own_format")
    train(tmp_path, "sft.demonstrations=2")  # written in it, read and run
    from actions import Actions  # type: ignore[import-not-found]

    read = Actions().read
    assert read("python_session[x[1]]") == elpo.ToolCall("python_session", {"code": "x[1]"})
    assert isinstance(read("python_session(x)"), elpo.MalformedCall)


def test_collect_trees_within_a_running_loop(
    inside: Any, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inside(".")
    collect = runpy.run_path("collect_trees.py")["main"]

    async def notebook() -> elpo.Forest:
        return await collect(model)

    forest = asyncio.run(notebook())
    assert np.diff(forest.leaf_start).tolist() == [8] * 4


def test_elpo_in_one_page(
    inside: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    inside(".")
    loop = runpy.run_path("elpo_in_one_page.py")["main"]
    monkeypatch.chdir(tmp_path)
    overrides = [each for each in TINY if not each.startswith(("model.name", "train.steps"))]
    asyncio.run(loop(model, "train.steps=2", *overrides))
    out = capsys.readouterr().out
    assert "step 1: loss" in out and "step 2: loss" in out and "success" in out
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def test_train_on_trajectories_of_an_evaluation(
    inside: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    inside(".")
    learn = runpy.run_path("train_on_trajectories.py")["main"]
    monkeypatch.chdir(tmp_path)
    limits = [each for each in TINY if each.startswith(("model.dtype", "rollout", "run.threads"))]
    sampled = ["eval.tasks=2", "eval.samples=3", "tools.workers=1", "run.dir=runs", *limits]
    assert main(["eval", model, *sampled, "--out", "evals"]) == 0
    rows = [json.loads(line) for line in Path("evals/trajectories.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):  # an untrained model earns the same everywhere
        row["reward"] = number
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    asyncio.run(learn(model, "rows.jsonl", "train.steps=2", *limits))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "gradient 0.000" not in said[0]
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def test_the_first_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The page's files, written as it says, and its commands in their order."""
    page = (EXAMPLES.parent / "docs" / "first_hour.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    files = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    assert list(files) == ["adding.py", "tally.py", "chats.py", "hour.yaml", "use.py"]
    assert len(files["adding.py"].splitlines()) <= 20
    for name, text in files.items():
        Path(name).write_text(text)
    runpy.run_path("chats.py")
    small = [each for each in TINY if not each.startswith(("run.name", "sft"))]
    said = {}
    for line in re.findall(r"^elpo .*", page, re.MULTILINE):
        _, *words = shlex.split(line, comments=True)
        own = [*small, "sft.batch=16"] if "hour.yaml" in words else []
        assert main([*words, *own]) == 0, line
        said[words[0]] = capsys.readouterr().out
    assert list(said) == ["sft", "train", "eval", "show", "tree", "report"]
    assert "held-out loss" in said["sft"] and "pass@8" in said["eval"]
    phases = [record["phase"] for record in read_metrics(Path("runs/hour"))]
    assert phases.count("rl") == 1 and {"sft", "eval"} <= set(phases)
    runpy.run_path("use.py")
    assert "<|im_start|>assistant" in capsys.readouterr().out
