"""Servers that die, hang or lose their parent: nothing is lost, nothing counted twice or left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from elpo_fast.config import RolloutConfig
from elpo_fast.rollout.sglang import process, watch
from elpo_fast.rollout.sglang import server as server_module
from elpo_fast.rollout.sglang.engine import SGLangEngine
from elpo_fast.train.probe import check_engine
from elpo_fast.types import RunError, Sampling

ROWS, TOKENS = 16, 200


def members(server: process.ServerProcess) -> list[psutil.Process]:
    """SGLang's own processes, without the one that watches them and Python's resource tracker."""
    assert server._process is not None
    found = psutil.Process(server._process.pid).children(recursive=True)
    return [member for member in found if "resource_tracker" not in " ".join(member.cmdline())]


def session(pid: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for other in psutil.process_iter(["status"]):
        try:
            inside = os.getsid(other.pid) == pid
        except ProcessLookupError:
            continue
        if inside and other.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(other.pid)
    return found


def gone(pid: int) -> bool:
    """Whether within a few seconds no process of the session is left."""
    deadline = time.monotonic() + 10
    while session(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def ask_for_many(
    prompt: Any, break_it: Callable[[SGLangEngine], None]
) -> Callable[[SGLangEngine], Any]:
    """`ROWS` requests of two completions each; `break_it` is called while they run."""

    async def work(engine: SGLangEngine) -> Any:
        await engine.generate(prompt(10), 1, Sampling(max_tokens=1))
        before = engine.stats()
        asked = [
            asyncio.create_task(engine.generate(prompt(20, seed), 2, Sampling(max_tokens=TOKENS)))
            for seed in range(ROWS)
        ]
        while not all(server.load for server in engine._servers):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in asked)
        break_it(engine)
        done = await asyncio.gather(*asked)
        stats = engine.stats()
        assert [len(completions) for completions in done] == [2] * ROWS
        assert stats.generated_tokens - before.generated_tokens == ROWS * 2 * TOKENS
        assert stats.prompt_tokens - before.prompt_tokens == ROWS * 2 * 20
        return done

    return work


def test_a_killed_and_a_hanging_server_are_replaced_by_the_other(
    qwen3: Any,
    servers: Any,
    use_sglang: Any,
    prompt: Any,
    check: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "_HEALTH_PERIOD_S", 0.5)
    urls = [url for _, url in servers]
    victim = servers[1][0]

    def hang(_: SGLangEngine) -> None:
        for member in members(victim):
            member.suspend()

    def kill(_: SGLangEngine) -> None:
        for member in members(victim):
            if "scheduler" in " ".join(member.cmdline()):
                member.kill()

    for break_it in (hang, kill):
        work = ask_for_many(prompt, break_it)
        done = use_sglang(qwen3, work, urls, health_timeout_s=8)
        for seed, completions in enumerate(done):
            for completion in completions:
                check(qwen3, prompt(20, seed), completion)
        if break_it is hang:
            for member in members(victim):
                member.resume()


def test_our_server_is_restarted_with_the_current_weights_and_leaves_nothing(
    qwen3: Any, tokenizer: Any, sglang_python: str, tmp_path: Path, prompt: Any, check: Any
) -> None:
    new = type(qwen3)(qwen3.config).eval()
    new.load_state_dict(qwen3.state_dict())
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1)
    sglang = {"python": sglang_python, "top_logprobs": 320}
    config = RolloutConfig.model_validate(
        {"max_tokens": 256, "cache_tokens": 16384, "sglang": sglang}
    )
    before = set(Path("/dev/shm").iterdir())
    sessions = []

    def kill(engine: SGLangEngine) -> None:
        ours = engine._servers[0].process
        assert ours is not None
        sessions.append(ours._process.pid)
        for member in members(ours):
            member.kill()

    async def work() -> Any:
        engine = SGLangEngine(config, qwen3, tokenizer, dtype=torch.float32, log=tmp_path / "log")
        try:
            await engine.generate(prompt(10), 1, Sampling(max_tokens=1))
            await engine.update_weights(new.named_parameters(), 3)
            done = await ask_for_many(prompt, kill)(engine)
            await check_engine(engine, new, torch.float32)
            sessions.append(engine._servers[0].process._process.pid)
            return done
        finally:
            await engine.close()
            await engine.close()

    for seed, completions in enumerate(asyncio.run(work())):
        for completion in completions:
            assert completion.weight_version == 3
            check(new, prompt(20, seed), completion)
    assert len(set(sessions)) == 2 and all(not session(pid) for pid in sessions)
    assert set(Path("/dev/shm").iterdir()) <= before


def test_stopping_ends_a_server_that_lost_its_watcher(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 600 & exec sleep 600\n")
    python.chmod(0o755)
    ours = process.ServerProcess(str(python), tmp_path, tmp_path / "log", {}, on_cpu=True)
    ours.start(0)
    watch = ours._process
    assert watch is not None
    while len(session(watch.pid)) < 3:
        time.sleep(0.05)
    watch.kill()
    watch.wait()
    assert not ours.alive and session(watch.pid)
    ours.stop()
    assert gone(watch.pid)


def test_nobody_else_takes_the_port_of_a_server_that_is_starting(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    ours = process.ServerProcess(str(python), tmp_path, tmp_path / "log", {}, on_cpu=True)
    try:
        port = int(ours.start(0).rpartition(":")[2])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port)):  # by number, as the server does
            pass
    finally:
        ours.stop()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


def test_a_server_that_cannot_start_says_why(
    qwen3: Any, tokenizer: Any, sglang_python: str, tmp_path: Path, prompt: Any
) -> None:
    sglang = {"python": sglang_python, "args": {"no_such_flag": 1}}
    config = RolloutConfig.model_validate({"max_tokens": 256, "sglang": sglang})

    async def work() -> None:
        engine = SGLangEngine(config, qwen3, tokenizer, dtype=torch.float32, log=tmp_path / "log")
        try:
            await engine.generate(prompt(4), 1, Sampling(max_tokens=1))
        finally:
            await engine.close()

    with pytest.raises(RunError, match=r"ended while starting[^$]*unrecognized arguments"):
        asyncio.run(work())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_the_server_does_not_outlive_its_parent(
    sglang_python: str, tmp_path: Path, how: signal.Signals
) -> None:
    folder = tmp_path / f"model-{how.name}-{os.getpid()}"
    folder.mkdir()
    code = textwrap.dedent(f"""
        import pathlib, time
        from elpo_fast.rollout.sglang.process import ServerProcess
        folder = pathlib.Path({str(folder)!r})
        server = ServerProcess({sys.executable!r}, folder, folder / "log", {{}}, on_cpu=True)
        server.start(0)
        print(server._process.pid, flush=True)
        time.sleep(600)
    """)
    stand_in = tmp_path / "sglang"  # its children ignore every polite signal
    stand_in.mkdir()
    (stand_in / "launch_server.py").write_text(
        "import os, signal, time\n"
        "from _multiprocessing import SemLock\n"
        "for name in ('SIGTERM', 'SIGINT', 'SIGHUP'):\n"
        "    signal.signal(getattr(signal, name), signal.SIG_IGN)\n"
        "os.fork(), os.fork()\n"
        "name = f'/mp-{os.path.basename(os.getcwd())}-{os.getpid()}'\n"
        "lock = SemLock(1, 1, 1, name, False)  # which nobody but its process knows of\n"
        "time.sleep(600)\n"
    )
    (folder / "sglang").symlink_to(stand_in)  # the working directory comes first on sys.path
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    watched = int(parent.stdout.readline())
    deadline = time.monotonic() + 30
    semaphores = f"sem.mp-{folder.name}-*"
    while len(list(Path("/dev/shm").glob(semaphores))) < 4:  # the server's and three forks'
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(how)
    parent.wait(10)
    assert gone(watched)
    assert not folder.exists()
    assert not list(Path("/dev/shm").glob(semaphores))


def test_stats_are_those_of_the_answers(
    qwen3: Any, server: Any, use_sglang: Any, prompt: Any
) -> None:
    async def work(engine: SGLangEngine) -> None:
        (first,) = await engine.generate(prompt(64), 1, Sampling(max_tokens=8))
        prefix = np.concatenate([prompt(64), first.token_ids])
        await engine.generate(prefix, 3, Sampling(max_tokens=5))
        stats = engine.stats()
        assert stats.prompt_tokens == 64 + 3 * 72
        assert stats.generated_tokens == 8 + 3 * 5
        # The prompt, its last token once more to sample, the last sampled token, and for each
        # sibling the prefix's last token.
        assert stats.computed_tokens == 64 + 1 + 1 + 3
        assert stats.cached_tokens == stats.prompt_tokens - stats.computed_tokens

    use_sglang(qwen3, work, [server[1]])


def test_a_process_whose_name_is_not_utf8_disturbs_nobody() -> None:
    code = (
        "import ctypes, time\nctypes.CDLL(None).prctl(15, b'caf\\xe9', 0, 0, 0)\n"
        "print(flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        process.stdout.readline()
        with pytest.raises(UnicodeDecodeError):
            Path(f"/proc/{process.pid}/stat").read_text()
        try:
            assert watch.shared_files(os.getpid()) == set()
        finally:
            process.kill()
