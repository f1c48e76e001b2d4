"""`run.log`: each service is given the same numbers and texts; their packages are stand-ins."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from elpo_fast.config import Config, ConfigError, load_config, parse_config
from elpo_fast.train import display
from elpo_fast.train.display import Display
from elpo_fast.train.metrics import sample_texts
from elpo_fast.train.run import RunFolder
from elpo_fast.tree.store import Forest, Tree
from elpo_fast.types import RunError

STAGES = [
    ("eval", 0, {"name": "before SFT", "success": 0.0}),
    ("sft", 1, {"loss": 2.0}),
    ("sft", 2, {"loss": 1.0}),
    ("eval", 0, {"name": "after SFT", "success": 0.25}),
    ("rl", 1, {"success": 0.5, "entropy": 0.1}),
    ("eval", 1, {"name": "after ELPO", "success": 0.75}),
]
POSITIONS = [0, 1, 2, 2, 3, 3]


class Service(ModuleType):
    """As much of wandb, trackio and mlflow as is used; keeps what it is given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: list[str] = []
        self.numbers: list[tuple[int, dict[str, float]]] = []
        self.texts: list[tuple[int, str, str]] = []
        self.ended = 0
        self.broken = False

    # wandb and trackio

    def init(self, **options: Any) -> Any:
        assert options["project"] == "elpo-fast" and options["resume"] == "allow"
        assert options["config"]["run"]["seed"] == 0
        self.runs.append(options.get("id") or options["name"])
        return SimpleNamespace(
            log=self.log, finish=self.end_run, define_metric=lambda *_, **__: None
        )

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.broken:
            raise ConnectionError("no route to host")
        values = dict(values)
        at = values.pop("steps") if step is None else step
        for name in [name for name, value in values.items() if isinstance(value, Text)]:
            self.texts.append((at, name, values.pop(name).text))
        if values:
            self.numbers.append((at, values))

    def Table(self, columns: list[str], data: list[list[Any]]) -> Any:
        return Text(data[0][columns.index("text")])

    def Markdown(self, text: str) -> Any:
        return Text(text.removeprefix("````\n").removesuffix("\n````"))

    # MLflow

    def set_experiment(self, name: str) -> None:
        assert name == "elpo-fast"

    def start_run(self, run_id: str | None, run_name: str) -> Any:
        self.runs.append(run_id or "made up")
        return SimpleNamespace(info=SimpleNamespace(run_id=self.runs[-1]))

    def log_params(self, values: dict[str, str]) -> None:
        assert values["train.steps"] == "10" and len(self.runs) == 1

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.log(values, step)

    def log_text(self, text: str, file: str) -> None:
        if file != "config.yaml":
            name, step = re.fullmatch(r"(.+)_(\d+)\.txt", file).groups()  # type: ignore[union-attr]
            self.texts.append((int(step), name, text))

    def end_run(self) -> None:
        self.ended += 1


class Text(SimpleNamespace):
    def __init__(self, text: str) -> None:
        super().__init__(text=text)


@pytest.fixture
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return made


each = pytest.mark.parametrize("service", ["wandb", "trackio", "mlflow"], indirect=True)


def config_of(folder: Path, *log: str) -> Config:
    return parse_config({"run": {"dir": str(folder), "log": list(log)}})


def records(folder: RunFolder, stages: list[Any]) -> None:
    for phase, step, values in stages:
        folder.log(phase, step, values)
    folder.show("rl/failed", "what it said\n# not a title")


@each
def test_a_service_is_given_numbers_and_texts_each_stage_at_its_own_point(
    service: Service, tmp_path: Path
) -> None:
    config = config_of(tmp_path, service.__name__)
    folder = RunFolder.create(config)
    assert not service.runs, "nothing is started before there is something to log"
    records(folder, STAGES)
    folder.close()
    assert [at for at, _ in service.numbers] == POSITIONS
    assert service.numbers[4][1] == {"rl/step": 1, "rl/success": 0.5, "rl/entropy": 0.1}
    success = [(at, v["eval/success"]) for at, v in service.numbers if "eval/success" in v]
    assert success == [(0, 0.0), (2, 0.25), (3, 0.75)]
    assert service.texts == [(3, "rl/failed", "what it said\n# not a title")]
    assert service.ended == 1 and not (folder.path / "tensorboard").exists()


@each
def test_a_resumed_run_goes_on_in_the_same_run(service: Service, tmp_path: Path) -> None:
    config = config_of(tmp_path, service.__name__)
    for again in (False, True):
        folder = RunFolder.resume(config) if again else RunFolder.create(config)
        folder.rewind(4 if again else 0)
        records(folder, STAGES[4:] if again else STAGES)
        folder.close()
    assert len(service.runs) == 2 and service.runs[0] == service.runs[1]
    assert [at for at, _ in service.numbers] == [*POSITIONS, *POSITIONS[4:]]


@each
def test_a_service_that_fails_later_is_left_out_with_a_warning(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder.create(config_of(tmp_path, service.__name__, "tensorboard"))
    folder.log(*STAGES[0])
    service.broken = True
    for stage in STAGES[1:]:
        folder.log(*stage)
    folder.close()
    assert len(service.numbers) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"run.log: {service.__name__} failed and is left out from now on (no route to host)"
    ]
    assert len(plotted(folder.path)["eval/success"]) == 3


@each
def test_a_service_that_cannot_be_started_is_one_sentence(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no API key\nconfigured")

    monkeypatch.setattr(service, "init", refuse)
    monkeypatch.setattr(service, "start_run", refuse)
    folder = RunFolder.create(config_of(tmp_path, service.__name__))
    with pytest.raises(RunError, match=r"cannot be started \(no API key configured\); mend"):
        folder.log(*STAGES[0])
    folder.close()


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_package_that_is_not_installed_is_said_before_anything(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"run `pip install {name}`, or leave it out"):
        RunFolder.create(config_of(tmp_path, name))
    assert not (tmp_path / "run").exists()


def plotted(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_no_point_twice_after_a_resume(tmp_path: Path) -> None:
    config = config_of(tmp_path, "tensorboard")
    folder = RunFolder.create(config)
    records(folder, STAGES)
    folder.close()
    folder = RunFolder.resume(config)
    folder.rewind(4)
    records(folder, [("rl", 1, {"success": 0.625}), STAGES[5]])
    folder.close()
    found = plotted(folder.path)
    assert found["eval/success"] == [(0, 0.0), (2, 0.25), (3, 0.75)]
    assert found["rl/success"] == [(3, 0.625)]
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    text = events.Tensors("rl/failed/text_summary")[-1]
    assert text.tensor_proto.string_val[0].decode() == "    what it said\n    # not a title"


def test_nothing_may_be_logged_anywhere_else(tmp_path: Path) -> None:
    folder = RunFolder.create(config_of(tmp_path))
    records(folder, STAGES)
    folder.close()
    assert not (folder.path / "tensorboard").exists()
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == len(STAGES)
    assert load_config(folder.path / "config.yaml").run.log == []


def test_sample_texts_are_whole_trajectories() -> None:
    tree = Tree([1, 2], task_id="t\ud83d")
    for token, correct in ((3, False), (4, True)):
        step = tree.add_step(0, [token, 9], [1, 0], [0.0, 0.0], [0.0, 0.0], tool_call=True)
        leaf = tree.add_step(step, [token + 2], [1], [0.0], [0.0], tool_call=False)
        tree.finish(leaf, reward=float(correct), correct=correct, end="answer", reason="so it is")
    texts = sample_texts(Forest.from_trees([tree]), lambda ids: str(np.asarray(ids).tolist()))
    assert texts == {
        "correct": "t\\ud83d\nreward 1, ended by answer: so it is\n\n[1, 2, 4, 9, 6]",
        "failed": "t\\ud83d\nreward 0, ended by answer: so it is\n\n[1, 2, 3, 9, 5]",
    }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_lines_of_a_file_have_the_time_and_the_time_left(clock: Callable[[float], None]) -> None:
    shown = io.StringIO()
    with Display(Console(file=shown)).phase("ELPO", 10, 4) as phase:
        clock(30)
        phase.advance("success [50%]")
        clock(10)
        phase.advance("quick", report=False)
        clock(60)
        phase.advance("long in coming", report=False)
        for _ in range(3):
            phase.advance(report=False)
        phase.advance("done", units=0)
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ELPO         +"
    for line, said in zip(
        shown.getvalue().splitlines(),
        (
            r"5/10  left \?  success \[50%\]",
            r"7/10  left 0:01:45  long in coming",
            r"10/10  left 0:00:00  done",
        ),
        strict=True,
    ):
        assert re.fullmatch(stamp + said, line), line


def test_a_terminal_has_neither(clock: Callable[[float], None]) -> None:
    shown = io.StringIO()
    with Display(Console(file=shown, force_terminal=True, width=100)).phase("ELPO", 2) as phase:
        phase.advance("one step")
    assert "ELPO            1/2  one step\n" in shown.getvalue()
    assert not re.search(r"\d{4}-\d\d-\d\d", shown.getvalue())
