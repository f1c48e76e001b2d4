"""Where a run's numbers and texts go beside its folder: TensorBoard, W&B, trackio, MLflow.

All have one axis, the steps since the run began, those of the cold start included, so that the
evaluations before and after each stage are points of their own. A resumed run goes on in the same
runs of the services; what is done again after a crash is there twice, and alike.

A service that cannot be started ends the run before it begins; one that fails later is left out
from then on, with a warning. TensorBoard's files lie on the run's own disk, whose faults are the
run's.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from elpo_fast.config import Config, ConfigError, dump_config, flat
from elpo_fast.types import RunError

_log = logging.getLogger(__name__)
_PROJECT = "elpo-fast"
_IDS = "trackers.json"
_POSITION = "steps"
_LONGEST = 500  # characters of a parameter in MLflow


class Tracker(Protocol):
    """`position` is the number of steps so far."""

    @property
    def id(self) -> str | None: ...  # what the service knows the run by
    def numbers(self, position: int, values: Mapping[str, float]) -> None: ...
    def text(self, position: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `path/tensorboard`. What lies there at `purge` and after it is replaced."""

    id = None

    def __init__(self, path: Path, purge: int | None) -> None:
        # Imported late: TensorBoard takes longer to import than a short command takes to run.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(path / "tensorboard"), purge_step=purge)

    def numbers(self, position: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, position)

    def text(self, position: int, name: str, text: str) -> None:
        # Markdown: indented lines stay as they are.
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.split("\n")), position)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; `WANDB_PROJECT`, `WANDB_MODE` and the like hold as ever."""

    def __init__(self, config: Config, known: str | None) -> None:
        import wandb

        self.id = known or secrets.token_hex(4)
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=config.run.name,
            id=self.id,
            resume="allow",
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
        )
        self._run.define_metric("*", step_metric=_POSITION)

    def numbers(self, position: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, _POSITION: position})

    def text(self, position: int, name: str, text: str) -> None:
        table = self._wandb.Table(columns=[_POSITION, "text"], data=[[position, text]])
        self._run.log({name: table, _POSITION: position})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio; `TRACKIO_SPACE_ID` and the like hold as ever."""

    def __init__(self, config: Config, known: str | None) -> None:
        import trackio

        self.id = known or f"{config.run.name}-{secrets.token_hex(4)}"
        self._trackio: Any = trackio
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=self.id,
            resume="allow",
            config=config.model_dump(mode="json"),
            embed=False,
        )

    def numbers(self, position: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=position)

    def text(self, position: int, name: str, text: str) -> None:
        shown = self._trackio.Markdown(f"````\n{text}\n````")
        self._run.log({name: shown}, step=position)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow; `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` hold as ever."""

    def __init__(self, config: Config, known: str | None) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        self.id = mlflow.start_run(run_id=known, run_name=config.run.name).info.run_id
        if known is None:  # parameters are given once
            settings = flat(config.model_dump(mode="json"))
            mlflow.log_params({key: str(value)[:_LONGEST] for key, value in settings.items()})
        mlflow.log_text(dump_config(config), "config.yaml")

    def numbers(self, position: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=position)

    def text(self, position: int, name: str, text: str) -> None:
        self._mlflow.log_text(text, f"{name}_{position:06d}.txt")

    def close(self) -> None:
        self._mlflow.end_run()


_SERVICES: dict[str, Callable[[Config, str | None], Tracker]] = {
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class Trackers:
    """Those that `run.log` names, started with the first thing they are given. Raises `ConfigError`
    for a package that is not installed."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._path = config.run_dir
        self._started: dict[str, Tracker] | None = None
        self._purge: int | None = None
        for name in set(config.run.log) & _SERVICES.keys():
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ConfigError(
                    f"run.log: {name} cannot be imported ({error}); run `pip install {name}`, or "
                    "leave it out"
                ) from error

    def numbers(self, position: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.numbers(position, values))

    def text(self, position: int, name: str, text: str) -> None:
        self._each(lambda tracker: tracker.text(position, name, text))

    def rewind(self, position: int | None) -> None:
        """What comes after `position`, or everything, is done again."""
        self.close()
        self._purge = None if position is None else position + 1
        if position is None:
            shutil.rmtree(self._path / "tensorboard", ignore_errors=True)

    def close(self) -> None:
        self._each(lambda tracker: tracker.close(), start=False)
        self._started = None

    def _each(self, work: Callable[[Tracker], None], *, start: bool = True) -> None:
        if self._started is None:
            self._started = self._start() if start else {}
        for name, tracker in list(self._started.items()):
            try:
                work(tracker)
            except Exception as error:
                if name == "tensorboard":
                    raise
                del self._started[name]
                _log.warning("run.log: %s failed and is left out from now on (%s)", name, error)

    def _start(self) -> dict[str, Tracker]:
        file = self._path / _IDS
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        started: dict[str, Tracker] = {}
        for name in self._config.run.log:
            if name == "tensorboard":
                started[name] = TensorBoard(self._path, self._purge)
                continue
            try:
                started[name] = _SERVICES[name](self._config, known.get(name))
            except Exception as error:  # whatever a service provokes, a person reads one line
                said = " ".join(str(error).split()) or type(error).__name__
                raise RunError(
                    f"run.log: {name} cannot be started ({said}); mend that, or leave it out"
                ) from error
            known[name] = started[name].id
        if known:
            file.write_text(json.dumps(known), encoding="utf-8")
        return started
