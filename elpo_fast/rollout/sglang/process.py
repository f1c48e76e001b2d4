"""An SGLang server process of our own: its command line, its log, and its certain end.

SGLang kills the process that started it when it fails and all children of that process when it
shuts down, so it runs under `watch.py`, in a session of its own: what happens there stays there,
and ends when we do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elpo_fast.config import ConfigError
from elpo_fast.rollout.sglang.watch import shared_files

_HERE = Path(__file__).parent
_CPU_ARGS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "grammar_backend": "none",
    "sleep_on_idle": True,  # else a core is busy waiting
}
# What torchrun tells its workers about themselves. PyTorch reads it in the server too, which would
# take torchrun's store for its own and wait for it until its start times out.
_TORCHRUN = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
_REMEDIES = {
    "Not enough memory": "its share of the GPU's memory leaves no room for keys and values; raise "
    "rollout.sglang.args.mem_fraction_static={share}, or give it another GPU",
    "out of memory": "the GPU's memory ran out; lower "
    "rollout.sglang.args.mem_fraction_static={share}, or give it another GPU",
    "ddress already in use": "a port is taken by another process; start again, or name other ones "
    "by rollout.sglang.args, nccl_port or dist_init_addr",
}
_REMEDY_CHARACTERS = 20_000  # the log's end: it holds earlier servers, too
_TAIL_LINES = 12
_STOP_TIMEOUT_S = 20.0


class ServerProcess:
    """One server process after another on the same model folder; at most one at a time."""

    def __init__(
        self, python: str, model: Path, log: Path, args: Mapping[str, Any], *, on_cpu: bool
    ) -> None:
        self.model, self.log = model, log
        self._python = python
        self._args = {
            "model_path": str(model),
            "host": "127.0.0.1",
            "log_level_http": "warning",
            **(_CPU_ARGS if on_cpu else {}),
            **args,
        }
        self._environment: dict[str, str] = {
            name: value
            for name, value in os.environ.items()
            if name not in _TORCHRUN and not name.startswith("TORCHELASTIC_")
        }
        # Sockets and other leavings go where our own files go, and are removed with them.
        self._environment["TMPDIR"] = str(model)
        path = _python_path()
        if on_cpu:
            self._environment["SGLANG_USE_CPU_ENGINE"] = "1"
            path.insert(0, str(_HERE / "cpu"))
        self._environment["PYTHONPATH"] = os.pathsep.join(path)
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None

    def start(self, version: int) -> str:
        """Start on a free port, its weights (those in the folder) named `version`; the URL."""
        assert not self.alive
        # Bound but not listening, it keeps the port from everyone but those who ask for it by
        # number, which the server does when its imports are through, half a minute later.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        port = self._port.getsockname()[1]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(_HERE / "watch.py"), str(os.getpid())),
                    *(self._python, "-m", "sglang.launch_server"),
                    *_flags(self._args | {"port": port, "weight_version": version}),
                ],
                cwd=self.model,  # the server puts its working directory on sys.path
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return f"http://127.0.0.1:{port}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End all of it and wait until it is gone; without a server, nothing happens."""
        if self._process is None:
            return
        watch, self._process = self._process, None
        if self._port is not None:
            self._port.close()
        watch.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            watch.wait(_STOP_TIMEOUT_S)
        if watch.returncode != 0:  # it did not see to the end, killed perhaps: the group is left
            files = shared_files(watch.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(watch.pid, signal.SIGKILL)
            watch.wait()
            for file in files:
                Path(file).unlink(missing_ok=True)

    def remedy(self) -> str | None:
        """What helps, where the log says that memory or a port was missing."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        share = self._args.get("mem_fraction_static", "SGLang's own choice")
        for sign, hint in _REMEDIES.items():
            if sign in text[-_REMEDY_CHARACTERS:]:
                return hint.format(share=share)
        return None

    def tail(self) -> str:
        """The log's last lines."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-_TAIL_LINES:])


def find_python(configured: str | None) -> str:
    """The interpreter that has SGLang, in its environment or on PYTHONPATH: the configured one,
    that of `.venv-sglang` beside our own environment, or our own. Raises `ConfigError` where it has
    none."""
    beside = Path(sys.prefix).parent / ".venv-sglang" / "bin" / "python"
    python = configured or (str(beside) if beside.exists() else sys.executable)
    code = (
        "import sys; sys.path[:] = filter(None, sys.path)\n"  # not what lies in this folder
        "import importlib.util; sys.exit(importlib.util.find_spec('sglang') is None)"
    )
    try:
        found = subprocess.run([python, "-c", code], timeout=60).returncode == 0
    except OSError as error:
        raise ConfigError(
            f"rollout.sglang.python: {python} cannot be run ({error.strerror})"
        ) from None
    if not found:
        raise ConfigError(
            f"rollout.engine sglang: {python} has no package sglang; run `make sglang-cpu` on a "
            "machine without a GPU, else install sglang and set rollout.sglang.python"
        )
    return python


def _python_path() -> list[str]:
    """PYTHONPATH as it is for us, from whatever folder."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(folder) for folder in given if folder]


def _flags(args: Mapping[str, Any]) -> list[str]:
    """`{"tp_size": 2, "enable_x": True, "y": None}` as `--tp-size 2 --enable-x`."""
    flags = []
    for name, value in args.items():
        if value is None or value is False:
            continue
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags += [str(item) for item in (value if isinstance(value, list) else [value])]
    return flags
