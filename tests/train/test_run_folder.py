"""The run folder: one process at a time, and what a resumed run may change."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from elpo_fast.cli import main
from elpo_fast.config import Config, ConfigError, load_config, parse_config
from elpo_fast.train.run import RunFolder

_HOLDER = """
import sys, time
from elpo_fast.config import load_config
from elpo_fast.train.run import RunFolder
folder = RunFolder.create(load_config(sys.argv[1]))
print("there", flush=True)
time.sleep(600)
"""


def config_in(folder: Path, **sections: object) -> Config:
    return parse_config({"run": {"dir": str(folder)}, **sections})


def test_a_second_process_is_refused_and_told_who_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"run": {"dir": str(tmp_path)}}))
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "there\n"
        for arguments in ([], ["--resume"]):
            assert main(["train", str(file), *arguments]) == 2
            said = capsys.readouterr().err
            assert f"is in use by process {holder.pid} on {socket.gethostname()}" in said
            assert said.count("\n") == 1
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    RunFolder.resume(load_config(file)).close()  # nobody has to remove a lock that a kill left


def test_what_was_closed_or_refused_is_not_locked(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    for _ in range(2):  # nothing to lose yet: it may be created again
        RunFolder.create(config).close()
    (config.run_dir / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="already exists"):
        RunFolder.create(config)
    RunFolder.resume(config).close()


def test_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    folder = RunFolder.create(config_in(tmp_path))
    child = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        folder.close()
        RunFolder.resume(config_in(tmp_path)).close()
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"max_tokens": 4096, "max_turn_tokens": 64}},
        {"eval": {"tasks": 3, "samples": 2, "temperature": 0.5}},
        {"train": {"steps": 99, "checkpoint_every": 3, "micro_batch_tokens": 512}},
        {"tools": {"workers": 1, "timeout_s": 60.0}},
        {"rollout": {"engine": "sglang", "sglang": {"urls": ["http://localhost:1"]}}},
        {"parallel": {"shard": 2}},
    ],
    ids=str,
)
def test_resume_may_change_what_is_not_mathematics_and_says_so(
    tmp_path: Path, sections: dict[str, object]
) -> None:
    RunFolder.create(config_in(tmp_path)).close()
    changed = config_in(tmp_path, **sections)
    folder = RunFolder.resume(changed)
    folder.close()
    (name, values), *_ = sections.items()
    assert isinstance(values, dict)
    for key, value in values.items():
        said = next(text for text in folder.changes if text.startswith(f"{name}.{key}"))
        if not isinstance(value, dict):
            assert said.endswith(f"is now {value!r}")
    assert load_config(changed.run_dir / "config.yaml") == changed
    again = RunFolder.resume(changed)
    again.close()
    assert not again.changes


@pytest.mark.parametrize("key", ["train.lr", "train.tasks_per_step", "algo.n_total", "run.seed"])
def test_mathematics_changes_with_allow_change_alone(tmp_path: Path, key: str) -> None:
    RunFolder.create(config_in(tmp_path)).close()
    section, name = key.split(".")
    values = {name: 1e-3 if name == "lr" else 9}
    data = {"run": {"dir": str(tmp_path)}}
    changed = parse_config(data | {section: data.get(section, {}) | values})
    with pytest.raises(ConfigError, match=rf"{key} was .* --allow-change"):
        RunFolder.resume(changed)
    assert load_config(changed.run_dir / "config.yaml") == config_in(tmp_path)
    folder = RunFolder.resume(changed, allow_change=True)
    folder.close()
    assert [text.split()[0] for text in folder.changes] == [key]


def test_another_model_is_never_a_continuation(tmp_path: Path) -> None:
    RunFolder.create(config_in(tmp_path)).close()
    other = config_in(tmp_path, model={"name": "scratch"})
    with pytest.raises(ConfigError, match=r"another model: model.name was .*start a new run"):
        RunFolder.resume(other, allow_change=True)


def test_a_moved_run_resumes(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    RunFolder.create(config).close()
    os.rename(config.run_dir, tmp_path / "moved")
    moved = parse_config({"run": {"dir": str(tmp_path), "name": "moved"}})
    folder = RunFolder.resume(moved)
    folder.close()
    assert not folder.changes
