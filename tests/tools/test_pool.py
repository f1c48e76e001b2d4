"""The life of the pool: servers that end, are killed or hang, cancelled calls, callers that die."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from elpo_fast.tools import _link
from elpo_fast.tools.sandbox import (
    _LIGHT,
    ATTEMPTS,
    Sandbox,
    SnapshotLostError,
)


def test_close_leaves_no_process_thread_or_descriptor(make_box, descendants) -> None:
    make_box().close()  # imports and caches of the first use
    gc.collect()
    before = os.listdir("/proc/self/fd"), threading.active_count(), descendants()
    box = make_box()

    async def use() -> None:
        sandbox = box.sandbox
        snapshot = await sandbox.open_session()
        await asyncio.gather(
            *(sandbox.run("1") for _ in range(10)),
            sandbox.step(snapshot, "x = 1", 1),
            sandbox.call_function("math:factorial", 3),
        )
        assert len(descendants()) > len(before[2])

    asyncio.run(use())
    box.close()
    gc.collect()
    after = os.listdir("/proc/self/fd"), threading.active_count(), descendants()
    assert (len(after[0]), *after[1:]) == (len(before[0]), *before[1:])


def test_use_after_close_is_refused(make_box) -> None:
    box = make_box()
    box.close()
    with pytest.raises(RuntimeError, match="closed"):
        box.run("1")


def kill_all(pids: set[int]) -> None:
    """Parents first, or a call would die before its server; some then end by themselves."""
    for pid in sorted(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("op", ["call", "function", "step"])
def test_killed_server_is_replaced_and_nothing_is_lost(make_box, descendants, op: str) -> None:
    before = descendants()
    box = make_box()
    sandbox = box.sandbox

    async def main() -> None:
        async def kill() -> None:
            await asyncio.sleep(0.3)
            kill_all(descendants() - before)

        slow = "import time\ntime.sleep(1)\n'slept'"
        await sandbox.start()
        await sandbox.call_function("time:sleep", 0)
        killing = asyncio.create_task(kill())
        if op == "call":
            assert (await sandbox.run(slow)).value == "'slept'"
        elif op == "function":
            assert await sandbox.call_function("time:sleep", 1) is None
        else:
            snapshot = await sandbox.open_session()
            with pytest.raises(SnapshotLostError):
                await sandbox.step(snapshot, slow, 1)
        await killing
        assert (await sandbox.run("1 + 1")).value == "2"

    asyncio.run(main())


def test_call_right_after_a_kill_gets_a_new_server(make_box) -> None:
    """Before the thread that reads from the server has noticed its end."""
    box = make_box()
    link = box.sandbox._link(_LIGHT)
    link._process.kill()
    link._thread.join()
    link.alive = True
    assert box.run("1 + 1").value == "2"


@pytest.mark.parametrize("op", ["call", "function", "step"])
def test_hanging_server_is_replaced_and_nothing_is_lost(
    monkeypatch, make_box, descendants, op: str
) -> None:
    monkeypatch.setattr(_link, "HANG_S", 4)  # a new server starts within, also beside other work
    before = descendants()
    sandbox = make_box().sandbox

    async def main() -> None:
        await sandbox.start()
        if op == "function":
            await sandbox.call_function("time:sleep", 0)
        snapshot = await sandbox.open_session()
        hanging = descendants() - before
        for pid in hanging:
            with contextlib.suppress(
                ProcessLookupError
            ):  # the one that began the session has ended
                os.kill(pid, signal.SIGSTOP)
        if op == "call":
            calls = [sandbox.run(f"{number}") for number in range(20)]
            values = [execution.value for execution in await asyncio.gather(*calls)]
            assert values == [str(number) for number in range(20)]
        elif op == "function":
            assert await sandbox.call_function("math:factorial", 5) == 120
            assert await sandbox.call_function("time:sleep", 0) is None
        else:
            with pytest.raises(SnapshotLostError):
                await sandbox.step(snapshot, "1", 1)
            assert (await sandbox.run("1 + 1")).value == "2"

    asyncio.run(main())


def test_silence_while_a_call_works_is_no_hang(make_box, monkeypatch) -> None:
    """Beats tell a long call from a hanging server; an idle server owes nothing."""
    monkeypatch.setattr(_link, "HANG_S", 2)
    box = make_box(timeout_s=20.0)
    link = box.sandbox._link(_LIGHT)
    assert box.run("import time\ntime.sleep(4)\n'slept'").value == "'slept'"
    time.sleep(3)
    assert box.run("1").value == "1" and box.sandbox._link(_LIGHT) is link


def test_cancelled_calls_are_not_awaited_for_ever(make_box, monkeypatch) -> None:
    monkeypatch.setattr(_link, "HANG_S", 2)
    box = make_box(timeout_s=20.0)
    link = box.sandbox._link(_LIGHT)

    async def main() -> None:
        calls = [asyncio.create_task(box.sandbox.run("while True: pass")) for _ in range(3)]
        await asyncio.sleep(0.5)
        for call in calls:
            call.cancel()

    asyncio.run(main())
    time.sleep(3)
    assert not link._pending and link.alive


def test_server_that_hangs_while_it_starts_is_given_up(monkeypatch, tmp_path) -> None:
    boot = tmp_path / "boot.py"
    boot.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(_link, "START_S", 1)
    monkeypatch.setattr(_link, "BOOT", str(boot))
    sandbox = Sandbox(isolation="landlock")
    with pytest.raises(RuntimeError, match="landlock: it did not start within 1 s"):
        asyncio.run(sandbox.start())
    asyncio.run(sandbox.close())


def test_server_that_always_dies_gives_an_error_result(make_box, descendants) -> None:
    before = descendants()
    box = make_box()

    async def main() -> None:
        call = asyncio.create_task(box.sandbox.run("import time\ntime.sleep(9)"))
        for _ in range(ATTEMPTS):
            await box.sandbox.start()
            await asyncio.sleep(0.3)
            kill_all(descendants() - before)
            await asyncio.sleep(0.2)
        execution = await call
        assert "restarted" in execution.error and not execution.finished

    asyncio.run(main())


def test_cancelling_frees_the_worker(make_box) -> None:
    box = make_box(workers=1, timeout_s=60.0)

    async def main() -> None:
        running = asyncio.create_task(box.sandbox.run("while True: pass"))
        waiting = asyncio.create_task(box.sandbox.run("while True: pass"))
        await asyncio.sleep(0.3)
        running.cancel()
        waiting.cancel()
        assert (await asyncio.wait_for(box.sandbox.run("1"), 20)).value == "1"

    asyncio.run(main())


def test_workers_bound_what_runs_at_once(make_box) -> None:
    box = make_box(workers=2)

    async def main() -> float:
        started = time.monotonic()
        await asyncio.gather(*(box.sandbox.run("import time\ntime.sleep(0.3)") for _ in range(4)))
        return time.monotonic() - started

    assert asyncio.run(main()) >= 0.6


PARENT = """
import asyncio, signal, sys
from elpo_fast.tools.sandbox import Sandbox

# Ignored in whatever a shell started in the background, and inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)

async def main():
    sandbox = Sandbox(isolation=sys.argv[1], timeout_s=60)
    root = await sandbox.open_session()
    _, first = await sandbox.step(root, "x = 1", 1)
    print("ready", flush=True)
    sleep = sandbox.step(first, "import time\\ntime.sleep(50)", 2)
    await asyncio.gather(sandbox.run("while True: pass"), sleep)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_survives_the_caller(any_box, descendants, eventually, number) -> None:
    command = [sys.executable, "-c", PARENT, any_box.isolation]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout.readline() == "ready\n"
        time.sleep(0.2)
        started = descendants(parent.pid)
        assert len(started) >= 3
        parent.send_signal(number)
        parent.wait(20)
    assert eventually(lambda: not any(map(_alive, started)))


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_calls_from_several_event_loops_and_threads(any_box) -> None:
    answers: list[str | None] = []
    threads = [
        threading.Thread(target=lambda: answers.append(any_box.run("6 * 7").value))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["42"] * 4


def test_server_outlives_the_thread_that_started_it(make_box) -> None:
    boxes: list = []
    thread = threading.Thread(target=lambda: boxes.append(make_box()))
    thread.start()
    thread.join()
    time.sleep(0.2)
    link = boxes[0].sandbox._link(_LIGHT)
    assert boxes[0].run("1").value == "1" and boxes[0].sandbox._link(_LIGHT) is link
