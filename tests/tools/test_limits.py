"""What the supervisor holds programs to, whatever they say of themselves."""

from __future__ import annotations

import asyncio
import mmap
import os
from pathlib import Path
from typing import Any

import psutil

from elpo_fast.tools._look import THREADS
from elpo_fast.tools.interpreter import ATTEMPTS, PythonSession
from elpo_fast.tools.sandbox import _LIGHT
from elpo_fast.types import Task

LOSE = """
import json, mmap, os
asked, real = mmap.mmap(-1, 8), json.loads
def lose(text):
    asked[0] = (asked[0] + 1) % 5
    if asked[0]:
        os._exit(1)
    return real(text)
json.loads = lose
"""


def test_work_for_one_call_is_bounded(make_box, isolation: str, monkeypatch) -> None:
    """Snapshots that lose four of five requests: retries of retries would be `ATTEMPTS` to the
    power of the depth."""
    asked = mmap.mmap(-1, 8)
    for _ in range(3):
        if (pid := os.fork()) == 0:
            asked[0] += 1
            os._exit(0)
        os.waitpid(pid, 0)  # `wait` might take the end of another process of this worker
    assert asked[0] == 3, "the counter is not shared, the attack is not one"
    sandbox = make_box(isolation).sandbox
    session = PythonSession(sandbox)
    steps = []
    step = sandbox.step

    async def counted(*arguments: Any, **options: Any) -> Any:
        steps.append(1)
        return await step(*arguments, **options)

    monkeypatch.setattr(sandbox, "step", counted)

    async def main() -> None:
        state = await session.open(Task("t", (), "test"))
        for depth in range(1, 6):
            steps.clear()
            result = await session.call(state, {"code": LOSE})
            assert len(steps) <= ATTEMPTS * depth
            state = result.state
        await session.close()

    asyncio.run(main())


def test_memory_is_counted_from_outside(make_box, isolation: str) -> None:
    """Whatever a process says of itself, and however it holds it."""
    lie = (
        "import json\nreal = json.dumps\n"
        "json.dumps = lambda o, **k: real(o | {'grown_kb': 0} if 'value' in o else o, **k)\n"
    )
    holds = {
        "in its heap": "x = bytearray(b'x') * (100 << 20)",
        "shared": "import mmap\nm = mmap.mmap(-1, 100 << 20)\nm[:] = b'x' * (100 << 20)",
    }
    sandbox = make_box(isolation, memory_mb=512).sandbox

    async def main() -> None:
        for code in holds.values():
            root = await sandbox.open_session()
            _, snapshot = await sandbox.step(root, lie + code, 1)
            assert 95 < snapshot.grown_mb < 250
            boast = "import json\njson.dumps = lambda *_, **__: '{\"grown_kb\": 1e9}'"
            _, small = await sandbox.step(root, boast, 1)
            assert small is None or small.grown_mb < 20
            sandbox.drop([root, snapshot, *filter(None, [small])])

    asyncio.run(main())


def test_the_confined_die_first_when_memory_runs_out(make_box, descendants, isolation: str) -> None:
    before = descendants()

    def score(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    box = make_box(isolation)
    assert box.run("1").value == "1"
    scores = [score(pid) for pid in descendants() - before]
    assert score("self") < 900
    assert {900, 1000} <= set(scores), scores


def test_threads_do_not_starve_a_neighbour(make_box, isolation: str, unprotected) -> None:
    many = (
        "import threading, time\nthreading.stack_size(1 << 16)\nstarted = 0\ntry:\n"
        "    while started < 1600:\n"
        "        threading.Thread(target=time.sleep, args=(2,), daemon=True).start()\n"
        "        started += 1\nexcept RuntimeError: pass\ntime.sleep(1)\nstarted"
    )
    assert int(unprotected(many)) == 1600, "the attack is not one"
    box = make_box(isolation, workers=3, timeout_s=20.0)
    few = (
        "import threading, time\nfor _ in range(8):\n"
        "    threads = [threading.Thread(target=time.sleep, args=(0.05,)) for _ in range(8)]\n"
        "    for t in threads: t.start()\n    for t in threads: t.join()\n'all'"
    )

    async def main() -> None:
        hostile, _, honest = await asyncio.gather(
            box.sandbox.run(many), box.sandbox.run(many), box.sandbox.run(few)
        )
        assert honest.value == "'all'", honest
        if isolation == "landlock":
            assert hostile.error == f"stopped: more than {THREADS} threads"
        else:
            assert int(hostile.value) < 1600

    asyncio.run(main())


def test_nothing_is_left_of_a_server_that_was_killed(
    make_box, descendants, eventually, isolation: str
) -> None:
    """Nor of the one process that would have ended the rest."""
    before = descendants()
    box = make_box(isolation)

    async def main() -> set[int]:
        root = await box.sandbox.open_session()
        _, snapshot = await box.sandbox.step(root, "x = 1", 1)
        await box.sandbox.step(snapshot, "open('f', 'w').write('x')", 2)
        asyncio.create_task(box.sandbox.run("while True: pass")).add_done_callback(lambda _: None)
        await asyncio.sleep(0.3)
        started = descendants() - before
        box.sandbox._link(_LIGHT)._process.kill()
        await asyncio.sleep(0)
        return started

    folder = box.run("import os\nos.getcwd()").value.strip("'")
    started = asyncio.run(main())
    assert eventually(lambda: not started & set(psutil.pids()), 30)
    if isolation == "landlock":
        assert eventually(lambda: not Path(folder).parent.exists())
