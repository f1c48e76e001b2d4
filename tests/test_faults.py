"""Too little memory, a full disk, a taken port: one sentence with the number and the key."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elpo_fast import cli
from elpo_fast.config import ConfigError, parse_config
from elpo_fast.eval.trajectories import Trajectories
from elpo_fast.faults import enough_disk, enough_memory, size
from elpo_fast.rollout.sglang.process import ServerProcess
from elpo_fast.train.checkpoint import CheckpointError, Checkpoints
from elpo_fast.train.parallel import joined
from elpo_fast.train.run import RunFolder
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.types import RunError

SMALL = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 64}
CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"


def no_gpu_memory() -> None:
    raise torch.OutOfMemoryError(CUDA)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: torch.empty(2**48), r"out of memory while testing \(1 PiB more were asked"),
        (lambda: np.empty(10**15), r"out of memory while testing \(7.11 PiB more were asked"),
        (lambda: [0] * 10**15, "out of memory while testing; turn the key"),
        (no_gpu_memory, r"out of GPU memory while testing \(2.5 GiB more were asked for\); turn"),
    ],
    ids=["torch", "numpy", "python", "gpu"],
)
def test_memory_that_cannot_be_had(work: Callable[[], Any], said: str) -> None:
    with pytest.raises(RunError, match=said) as caught, enough_memory("testing", "turn the key"):
        work()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("x"), RunError("out of memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, enough_memory("testing", "-"), enough_disk(Path()):
        raise error
    assert caught.value is error


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1024, 1.5 * 2**30, 2**50)] == [
        *("0 bytes", "999 bytes", "1 KiB", "1.5 GiB", "1 PiB"),
    ]


def config_file(folder: Path, **more: Any) -> str:
    data = {
        "run": {"dir": str(folder), "threads": 1},
        "model": {"name": "scratch", "dtype": "float32", "scratch": SMALL},
        "task": {"options": {"steps": 4, "level": 1}, "system": "Go.", "seed": 0},
        "tools": {"workers": 1},
        "rollout": {"call_format": "code", "max_turn_tokens": 12, "max_tokens": 300},
        "algo": {"n_total": 4},
        "train": {"steps": 1, "tasks_per_step": 2, "skip_uniform": False},
        "eval": {"tasks": 1},
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(data | more))
    return str(file)


@pytest.mark.parametrize(
    ("where", "code", "said"),
    [
        ("elpo_fast.train.step.PolicyOptimizer.update", 1, "lower train.micro_batch_tokens=8192"),
        (
            "elpo_fast.rollout.local.batching.Batcher.step",
            1,
            "lower rollout.max_batch=64 or rollout.cac",
        ),
        ("elpo_fast.rollout.local.decoder.Decoder.__init__", 1, "lower rollout.cache_tokens=65536"),
        ("elpo_fast.model.load.scratch_model", 1, "lower model.scratch"),
        ("elpo_fast.train.checkpoint.DefaultStager.stage", 1, "train.checkpoint_every"),
    ],
    ids=["update", "decoding", "cache", "model", "checkpoint"],
)
def test_a_run_without_memory_names_the_key(
    where: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(where, lambda *_, **__: no_gpu_memory())
    assert cli.main(["train", config_file(tmp_path)]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: out of GPU memory while ") and "2.5 GiB" in error
    assert said in error and error.count("\n") == 1


def test_a_full_disk_ends_a_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elpo_fast.tree.io.save", full)
    assert cli.main(["train", config_file(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "step_000001.npz: No space left on device, " in error and "are free there" in error
    assert "set train.save_trees=false" in error and error.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
def test_records_that_a_full_disk_refuses(tmp_path: Path) -> None:
    config = parse_config({"run": {"dir": str(tmp_path)}})
    config.run_dir.mkdir()
    (config.run_dir / "metrics.jsonl").symlink_to("/dev/full")
    folder = RunFolder.create(config)
    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: No space .* free there"):
        folder.log("rl", 1, {"loss": 1.0})


def test_trajectories_that_a_full_disk_refuses(tmp_path: Path) -> None:
    class Full:
        def write(self, _: bytes) -> None:
            raise OSError(28, "No space left on device")

    file = Trajectories(tmp_path / "trajectories.jsonl")
    file._file = Full()  # type: ignore[assignment]
    with pytest.raises(RunError, match=r"cannot write .*trajectories.jsonl: No space .*--out"):
        file.add({"task": "a", "sample": 0})
    assert not file.records


def test_a_checkpoint_without_room_says_how_large_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Policy:
        updates = 0

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"weights.a": torch.zeros(512, 1024), "moments.a": torch.zeros(512, 1024)}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elpo_fast.train.checkpoint.dcp.save", full)
    from elpo_fast.train.checkpoint import TrainState

    checkpoints = Checkpoints(tmp_path, keep=2)
    policy: PolicyOptimizer = Policy()  # type: ignore[assignment]
    checkpoints.save(TrainState(step=1, weight_version=0, data_position=0), policy)
    said = r"of 4 MiB \(OSError: No space .*\); .* are free there; .*train.keep_checkpoints=2"
    with pytest.raises(CheckpointError, match=said):
        checkpoints.close()


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**environment, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        config = parse_config({"parallel": {"shard": 2}, "model": {"device": "cpu"}})
        with pytest.raises(ConfigError, match=f"port {port} .*--master-port"), joined(config):
            pass


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("RuntimeError: Not enough memory.", "raise rollout.sglang.args.mem_fraction_static=0.5"),
        (f"torch.OutOfMemoryError: {CUDA}", "lower rollout.sglang.args.mem_fraction_static=0.5"),
        ("OSError: [Errno 98] Address already in use", "nccl_port"),
        ("fine", None),
    ],
)
def test_what_a_servers_log_says(log: str, said: str | None, tmp_path: Path) -> None:
    file = tmp_path / "sglang.log"
    args = {"mem_fraction_static": 0.5}
    process = ServerProcess("python", tmp_path, file, args, on_cpu=False)
    assert process.remedy() is None
    file.write_text(f"{log}\nand more\n")
    remedy = process.remedy()
    assert remedy is None if said is None else remedy is not None and said in remedy
