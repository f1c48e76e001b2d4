"""The two Python tools: branching equals running from scratch, snapshots are only a cache."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from typing import Any

import pytest

from elpo_fast.tools.interpreter import CodeInterpreter, PythonSession, SessionState
from elpo_fast.tools.sandbox import _LIGHT
from elpo_fast.types import Task


def task(setup: str = "", name: str = "t1") -> Task:
    return Task(id=name, messages=(), source="test", setup=setup)


async def call(session: PythonSession, state: SessionState, code: str) -> tuple[str, Any]:
    result = await session.call(state, {"code": code})
    return result.content, result.state


def test_code_interpreter_forgets(any_box) -> None:
    async def main() -> None:
        tool = CodeInterpreter(any_box.sandbox)
        state = await tool.open(task())
        first = await tool.call(state, {"code": "x = 1\nx"})
        second = await tool.call(first.state, {"code": "x"})
        assert state is None and first.state is None and second.state is None
        assert first.content == "1" and not first.error and first.seconds > 0
        assert second.content == "line 1: x\nNameError: name 'x' is not defined" and second.error

    asyncio.run(main())


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("```python\nprint(1)\n```", "1"),
        (" ```\nfor x in 'ab':\n    print(x)\n\n```\n", "a\nb"),
        ("print('```\\n```')", "```\n```"),
        ("print(1)\nexit()\nprint(2)", "1"),
        ("import sys\nprint(1)\nsys.exit(0)", "1"),
        ("raise SystemExit", "(no output)"),
    ],
)
def test_marks_around_code_and_its_exit_are_no_errors(any_box, code: str, shown: str) -> None:
    async def main() -> None:
        result = await CodeInterpreter(any_box.sandbox).call(None, {"code": code})
        assert (result.content, result.error) == (shown, False)
        session = PythonSession(any_box.sandbox)
        result = await session.call(await session.open(task("y = 3")), {"code": code})
        assert (result.content, result.error) == (shown, False)
        assert (await call(session, result.state, "y"))[0] == "3"
        await session.close()

    asyncio.run(main())


def test_session_remembers_branches_and_keeps_old_states(any_box) -> None:
    async def main() -> None:
        session = PythonSession(any_box.sandbox)
        root = await session.open(task("x = 40\nprint('not shown')"))
        text, one = await call(session, root, "x += 1\nx")
        assert text == "41"
        branches = await asyncio.gather(
            *(call(session, one, f"x += {number}\nx") for number in range(8))
        )
        assert [text for text, _ in branches] == [str(41 + number) for number in range(8)]
        assert (await call(session, root, "x"))[0] == "40"
        assert (await call(session, branches[3][1], "x"))[0] == "44"
        await session.close()

    asyncio.run(main())


def test_what_a_task_reveals_comes_from_outside_one_line_a_call(any_box) -> None:
    async def main() -> None:
        session = PythonSession(any_box.sandbox)
        root = await session.open(Task("t", (), "test", setup="x = 1", reveals=("one", "two")))
        text, first = await call(session, root, "x += 1\nx")
        assert text == "2\none"
        text, failed = await call(session, first, "1/0")
        assert text.endswith("ZeroDivisionError: division by zero")
        text, second = await call(session, failed, "print(x)")
        assert text == "2\ntwo"
        await session.release([second])  # to be rebuilt
        assert (await call(session, second, "x"))[0] == "2\ntwo"
        assert (await call(session, root, "x"))[0] == "1\none"
        await session.close()

    asyncio.run(main())


def test_a_hundred_sessions_at_once(any_box) -> None:
    """More descriptors in the server than a confined process may have open."""

    async def main() -> None:
        session = PythonSession(any_box.sandbox)
        roots = await asyncio.gather(
            *(session.open(task(f"x = {number}", f"t{number}")) for number in range(100))
        )
        answers = await asyncio.gather(*(call(session, root, "x + 1") for root in roots))
        assert [text for text, _ in answers] == [str(number + 1) for number in range(100)]
        await session.close()

    asyncio.run(main())


def test_session_that_uses_scipy_finds_it_loaded_and_stays_a_session(make_box) -> None:
    async def main() -> None:
        session = PythonSession(make_box().sandbox)
        root = await session.open(task("import sys\nx = 1"))
        text, one = await call(session, root, "x += 1\nx")
        assert text == "2"
        text, two = await call(
            session, root, "import scipy\nx += 2\n'scipy.stats' in sys.modules, x"
        )
        assert text == "(True, 3)"
        await session.release([two])  # to be rebuilt
        assert (await call(session, two, "x, scipy.stats.norm.cdf(0)"))[0] == "(3, np.float64(0.5))"
        assert (await call(session, one, "x"))[0] == "2"
        assert (await call(session, root, "x"))[0] == "1"

    asyncio.run(main())


def test_definitions_classes_and_modules_live_on(any_box) -> None:
    async def main() -> None:
        session = PythonSession(any_box.sandbox)
        state = await session.open(task())
        cells = [
            "import math\ndef area(r):\n    return math.pi * r ** 2",
            "class P:\n    def __init__(self): self.a = area(1)",
            "p = P()",
            "round(p.a, 2)",
        ]
        for cell in cells:
            text, state = await call(session, state, cell)
        assert text == "3.14"
        text, _ = await call(session, state, "area('x')")
        assert text.splitlines()[:2] == [
            "line 1: area('x')",
            "call 1, line 3, in area: return math.pi * r ** 2",
        ]
        await session.close()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["math.factorial(n)", "random", "numpy"])
def test_exception_keeps_what_was_done_before_it(any_box, name: str) -> None:
    async def main() -> None:
        session = PythonSession(any_box.sandbox)
        root = await session.open(task())
        result = await session.call(root, {"code": f"x = {name!r}\n1/0"})
        assert result.error and result.state is not root
        assert (await call(session, result.state, "x"))[0] == repr(name)
        await session.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 2\nwhile True: pass", "timed out after 0.5 s"),
        ("x = 2\nimport os\nos._exit(0)", "the process ended before the code was finished"),
        ("x = 2\nimport ctypes\nctypes.string_at(0)", "the process ended"),
        ("x = 2\nwhile True: print('x' * 10**6)", "too much output"),
    ],
    ids=["timeout", "exit", "crash", "flood"],
)
def test_killed_call_leaves_the_state_and_says_so(make_box, code: str, said: str) -> None:
    async def main() -> None:
        session = PythonSession(make_box(timeout_s=0.5).sandbox)
        root = await session.open(task("x = 1"))
        result = await session.call(root, {"code": code})
        assert result.error and result.state is root
        assert said in result.content
        assert result.content.endswith("the session is as it was before this call")
        assert (await call(session, root, "x"))[0] == "1"

    asyncio.run(main())


CELLS = [
    "x = x * 3 + 1\nx",
    "import random\nrandom.random()",
    "random.shuffle(items)\nitems",
    "import numpy as np\nnp.random.rand()",
    "generator = np.random.default_rng(x)\ngenerator.normal()",
    "own.gauss(0, 1), generator.integers(100)",
    "items.append(len(items))\nitems[-3:]",
    "open('notes', 'a').write(f'{x}\\n')",
    "open('notes').read()",  # fails where no cell has written it, or nothing can be written
    "items.append(0)\n1 / (len(items) - len(set(items)) - 1)",
    "def step(n):\n    global x\n    x += n\n    return x / (n % 3)\nstep(x)",
    "np.random.shuffle(items)\nitems, np.random.get_state()[1][:3]",
    "{str(v) for v in items}",
    "import threading\nt = threading.Thread(target=items.append, args=(x,))\nt.start()\nt.join()",
    "print(x, end='')\nx // (x % 5)",
]
SETUP = (
    "import random\nimport numpy as np\nx = 1\nitems = [5, 3, 8]\nown = random.Random(7)\n"
    "generator = np.random.default_rng(1)"
)


async def random_tree(session: PythonSession, seed: int, nodes: int = 8) -> None:
    """Grow a tree in random order, dropping snapshots on the way; the longest path and another
    must then show, one cell after the other in a session of their own, what they showed."""
    dice = random.Random(seed)
    root = await session.open(task(SETUP))
    paths: list[tuple[tuple[str, ...], tuple[str, ...], SessionState]] = [((), (), root)]
    for _ in range(nodes):
        cells, texts, state = dice.choice(paths)
        if dice.random() < 0.2:
            await session.release([state])  # its next call rebuilds it
        cell = dice.choice(CELLS)
        text, new = await call(session, state, cell)
        paths.append(((*cells, cell), (*texts, text), new))
    for cells, texts, _ in (max(paths, key=lambda path: len(path[0])), dice.choice(paths[1:])):
        state = await session.open(task(SETUP))
        for cell, text in zip(cells, texts, strict=True):
            replayed, state = await call(session, state, cell)
            assert replayed == text, (seed, cells)
    await session.release([state for *_, state in paths])
    await session.close()


@pytest.mark.parametrize(
    ("isolation", "seeds", "settings"),
    [
        ("bubblewrap", range(120), {}),
        ("landlock", range(120, 150), {}),
        ("bubblewrap", range(150, 200), {"max_snapshots": 4}),
    ],
    ids=["bubblewrap", "landlock", "hardly any snapshots"],
)
def test_200_random_trees_equal_a_replay_from_scratch(
    make_box, isolation: str, seeds: range, settings: dict[str, int]
) -> None:
    async def main() -> None:
        sandbox = make_box(isolation, **settings).sandbox
        for pair in zip(seeds[::2], seeds[1::2], strict=True):
            await asyncio.gather(*(random_tree(PythonSession(sandbox), seed) for seed in pair))

    asyncio.run(main())


def test_branching_100_mb_of_state_takes_milliseconds(make_box) -> None:
    """10 ms is what a quiet machine must show (see the benchmark); this one may be busy."""

    async def main() -> float:
        session = PythonSession(make_box().sandbox)
        root = await session.open(task("import numpy\nx = 1\nbig = numpy.ones(100 << 17)"))
        times = []
        for _ in range(40):
            started = time.perf_counter()
            _, state = await call(session, root, "x += 1\nx")
            times.append(time.perf_counter() - started)
            await session.release([state])
        await session.close()
        return sorted(times)[20]

    assert asyncio.run(main()) < 0.05


def test_trees_with_a_server_killed_in_between(make_box) -> None:
    async def main() -> None:
        box = make_box()
        session = PythonSession(box.sandbox)
        root = await session.open(task("x = 1"))
        _, one = await call(session, root, "x += 1\nx")
        _, two = await call(session, one, "import random\nx += 1\nrandom.random()")
        box.sandbox._link(_LIGHT)._process.kill()
        assert (await call(session, two, "x"))[0] == "3"
        assert (await call(session, one, "x"))[0] == "2"

    asyncio.run(main())


def test_snapshots_are_bounded_and_released(make_box, descendants) -> None:
    async def main() -> None:
        before = descendants()
        box = make_box(max_snapshots=5)
        session = PythonSession(box.sandbox)
        await box.sandbox.run("1")
        idle = len(descendants() - before)
        root = await session.open(task("x = 0"))
        states = [root]
        for number in range(20):
            states.append((await call(session, states[number // 2], "x += 1"))[1])
        assert len(session._snapshots) <= 5
        time.sleep(0.3)
        assert (
            len(descendants() - before) <= idle + 10
        )  # five snapshots, their sessions' first ones
        await session.release(states)
        assert not session._snapshots
        time.sleep(0.3)
        assert len(descendants() - before) <= idle
        assert (await call(session, states[-1], "x"))[0].isdigit()  # a cache, not a promise

    asyncio.run(main())


def test_snapshots_are_bounded_by_memory(make_box) -> None:
    async def main() -> None:
        sandbox = make_box().sandbox
        session = PythonSession(sandbox, memory_mb=100)
        state = await session.open(task())
        for _ in range(4):
            _, state = await call(session, state, "x = b'x' * (40 << 20)")
        assert len(session._snapshots) == 2
        assert (await call(session, state, "len(x) >> 20"))[0] == "40"

    asyncio.run(main())


def test_rebuilt_session_says_what_is_not_as_before(make_box) -> None:
    """What it cost: a repeat. Addresses are no difference."""

    async def main() -> None:
        session = PythonSession(make_box().sandbox)
        root = await session.open(task())
        _, state = await call(session, root, "import time\ntime.time_ns()")
        _, same = await call(session, root, "object()")
        await session.release([state, same])
        result = await session.call(state, {"code": "1"})
        assert not result.error and result.state is not state
        expected = "1\n(the session was rebuilt; call 1 now shows something else)"
        assert result.content == expected
        assert (await call(session, same, "2"))[0] == "2"

    asyncio.run(main())


def test_branches_have_their_own_files(make_box) -> None:
    async def main() -> None:
        session = PythonSession(make_box("bubblewrap").sandbox)
        root = await session.open(task("import os\nos.mkdir('d')\nos.chdir('d')"))
        _, one = await call(session, root, "open('f', 'w').write('one')")
        _, two = await call(session, root, "open('f', 'w').write('two')")
        text, three = await call(session, one, "open('g', 'w').write('x')\nopen('f').read()")
        assert text == "'one'"
        assert (await call(session, two, "os.listdir()"))[0] == "['f']"
        assert (await call(session, three, "sorted(os.listdir())"))[0] == "['f', 'g']"
        assert (await call(session, root, "os.listdir()"))[0] == "[]"

    asyncio.run(main())


def test_failing_setup_names_the_task(any_box) -> None:
    session = PythonSession(any_box.sandbox)
    with pytest.raises(
        RuntimeError, match=r"(?s)setup of task 'bad-task' failed.*ZeroDivisionError"
    ):
        asyncio.run(session.open(task("1/0", "bad-task")))


def test_background_threads_end_with_their_call(any_box) -> None:
    async def main() -> None:
        session = PythonSession(any_box.sandbox)
        root = await session.open(task("n = 0"))
        code = (
            "import threading, time\ndef count():\n    global n\n    while True:\n"
            "        n += 1\n        time.sleep(0.001)\n"
            "threading.Thread(target=count, daemon=True).start()\ntime.sleep(0.05)\nn > 0"
        )
        text, state = await call(session, root, code)
        assert text == "True"
        assert (await call(session, state, "threading.active_count()"))[0] == "1"
        first, after = await call(session, state, "n")
        await asyncio.sleep(0.1)
        assert (await call(session, after, "n"))[0] == first
        assert int((await call(session, state, "n"))[0].splitlines()[0]) > 0  # another branch
        await session.close()

    asyncio.run(main())


def test_states_are_small_immutable_and_hashable(any_box) -> None:
    async def main() -> None:
        session = PythonSession(any_box.sandbox)
        root = await session.open(task("data = b'x' * (50 << 20)"))
        _, state = await call(session, root, "len(data)")
        assert len({root, state, state}) == 2
        with pytest.raises(AttributeError):
            state.code = "y"
        assert not hasattr(state, "__dict__")
        await session.close()

    asyncio.run(main())


def test_open_survives_a_server_that_is_killed(make_box, descendants) -> None:
    """A task's setup has no effects outside: it is run again, and only its own fault counts."""
    before = descendants()
    box = make_box()
    session = PythonSession(box.sandbox)

    async def main() -> None:
        opening = asyncio.create_task(session.open(task("import time\ntime.sleep(1)\nx = 7")))
        await box.sandbox.start()
        await asyncio.sleep(0.3)
        for _ in range(3):  # the first while it runs the setup, others while they start
            for pid in descendants() - before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.15)
        assert (await call(session, await opening, "x"))[0] == "7"

    asyncio.run(main())
