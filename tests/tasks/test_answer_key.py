"""Programs look for what their task hides, through every door there is: each is open where nothing
protects, and shows nothing in the sandbox, for every source, isolation and kind of user."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elpo_fast.config import TaskConfig
from elpo_fast.tasks import make_source
from elpo_fast.tasks.ledger import Ledger, LedgerOptions
from elpo_fast.tools import _confine, _view
from elpo_fast.tools.interpreter import CodeInterpreter, PythonSession
from elpo_fast.tools.sandbox import Sandbox
from elpo_fast.types import End, Task

ROOT = Path(__file__).parents[2]
MARK = "planted ground truth 7b1946ac"

# Each makes `texts`; `sources` are the files that hold answers or make them.
DOORS = {
    "names": "texts = [repr(globals())]",
    "lines": "import linecache\ntexts = [str(entry) for entry in linecache.cache.values()]",
    "objects": (
        "import gc\ntexts = [text for thing in gc.get_objects() for text in gc.get_referents(thing)"
        " if isinstance(text, (str, bytes))]"
    ),
    "frames": (
        "import sys\nframe, texts = sys._getframe(), []\nwhile frame is not None:\n"
        "    texts += map(repr, list(frame.f_locals.values()))\n    frame = frame.f_back"
    ),
    "modules": (
        "import sys\ntexts = [repr(value) for module in list(sys.modules.values())\n"
        "    for value in list(getattr(module, '__dict__', {{}}).values())\n"
        "    if isinstance(value, (str, bytes, list, tuple, dict))]"
    ),
    "environment": "import os\ntexts = [repr(os.environ)]",
    "processes": (
        "import glob\ntexts = []\nfor path in glob.glob('/proc/[0-9s]*/[ec][nm][vd]*'):\n"
        "    try: texts.append(open(path, 'rb').read())\n    except OSError: pass"
    ),
    "descriptors": (
        "import os\ntexts = []\nfor fd in range(64):\n"
        "    try: texts.append(os.pread(fd, 1 << 20, 0))\n    except OSError: pass"
    ),
    "memory": """
import ctypes, mmap, os
libc = ctypes.CDLL(None)
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
def texts():
    ours, theirs = os.pipe()
    mapped = ctypes.addressof(ctypes.c_char.from_buffer(mmap.mmap(-1, 4096)))
    for middle in (libc.sbrk(0), id(object()), id(os), mapped):
        for address in range((middle >> 12 << 12) - (32 << 20), middle + (32 << 20), 4096):
            if libc.write(theirs, address, 4096) == 4096:  # fails where there is nothing
                yield os.read(ours, 4096)
texts = texts()
""",
    "files": (
        "texts = []\nfor path in {sources!r}:\n    try: texts.append(open(path, 'rb').read())\n"
        "    except OSError: pass"
    ),
}
LOOK = """
import re
def look():
{body}
    wanted, wanted_bytes = re.compile({wanted!r}), re.compile({wanted!r}.encode())
    return any((wanted if isinstance(t, str) else wanted_bytes).search(t) for t in texts)
"""
IMPORTS = (
    *("elpo_fast.tasks.ledger", "elpo_fast.tasks.operations", "elpo_fast.tasks.gym_verifier"),
    *("elpo_fast.tools._link", "elpo_fast.config", "reasoning_gym", "math_verify", "transformers"),
)
IMPORTED = f"""
import importlib, sys
def imported(name):
    try: return bool(importlib.import_module(name))
    except ImportError: return False
names = {{name for name in {IMPORTS!r} if imported(name)}}
"""
# Files that can be opened in folders that can be listed.
FOUND = """
import os, sys
found = set()
for start in {{'/', *sys.path, {folder!r}}}:
    for folder, folders, files in os.walk(start):
        if folder in ('/proc', '/sys', '/dev'):
            folders.clear()
        elif {{'elpo_fast', 'reasoning_gym', 'math_verify'}} & {{*folder.split('/')}}:
            for name in files:
                try: found.add(open(folder + '/' + name, 'rb').name)
                except OSError: pass
"""


def hidden_lines(task: Task) -> str:
    return "|".join(map(obscured, task.reveals[:-1]))


def obscured(text: str) -> str:
    """A pattern that matches `text` and not itself: who looks for a text has it."""
    return "".join(f"[{letter}]" for letter in text)


def looking(wanted: str, sources: list[str], doors: Any = DOORS) -> str:
    """A program that looks through these doors; `found` are those through which it sees it."""
    program = "found = set()\n"
    for name in doors:
        body = DOORS[name].format(sources=sources).strip().replace("\n", "\n    ")
        program += LOOK.format(body=f"    {body}", wanted=wanted)
        program += f"if look(): found.add({name!r})\n"
    return program


def write_rows(folder: Path) -> Path:
    def row(question: str, truth: Any) -> str:
        prompt = [{"role": "user", "content": question}]
        reward = {"ground_truth": truth}
        return json.dumps({"data_source": "t", "prompt": prompt, "reward_model": reward})

    tests = {"inputs": ["1"], "outputs": [MARK]}
    file = folder / "tasks.jsonl"
    file.write_text(row("Say it.", rf"\text{{{MARK}}}") + "\n" + row("Print it.", tests) + "\n")
    return file


async def look_everywhere(isolation: str, folder: Path) -> dict[str, Any]:
    """What is seen of the truth of a task of every source, by the doors of `DOORS`."""
    sandbox = Sandbox(isolation=isolation, timeout_s=60.0)  # type: ignore[arg-type]
    sources = list(map(str, secret_files(folder)))
    rows = next(file for file in secret_files(folder) if file.name == "tasks.jsonl")
    seen: dict[str, Any] = {}
    try:
        await sandbox.start()

        async def interpreter(code: str) -> str:
            return (await CodeInterpreter(sandbox).call(None, {"code": code})).content

        # What others of the same task print, before and meanwhile, is in nobody else's memory.
        tell = f"import time\nprint({MARK[:9]!r} + {MARK[9:]!r}, flush=True)"
        other = asyncio.create_task(interpreter(f"{tell}\ntime.sleep(50)"))
        await asyncio.sleep(1)
        for _ in range(3):  # so that later processes were made after it
            assert await interpreter(tell) == MARK

        task = long_lines()
        session = PythonSession(sandbox)
        state = await session.open(task)
        first = await session.call(state, {"code": f"do({task.info['code'][0]})"})
        assert first.content.splitlines()[1] == task.reveals[0]
        code = looking(hidden_lines(task), sources) + "sorted(found), 'lines' in globals()"
        seen["ledger"] = (await session.call(first.state, {"code": code})).content
        assert task.reveals[1] in seen["ledger"]  # from outside, with the result
        seen["ledger"] = seen["ledger"].splitlines()[0]

        gym = make_source(
            TaskConfig(source="reasoning_gym", options={"dataset": "word_sequence_reversal"}),
            *(0, sandbox.call_function),
        )
        problem = gym.train(0)
        truth = problem.truth["answer"]
        right = [{"role": "assistant", "content": f"<answer>{truth}</answer>"}]
        assert (await gym.grade(problem, right, End.ANSWER)).correct
        seen["reasoning_gym"] = await interpreter(
            looking(obscured(truth), sources) + "sorted(found)"
        )

        options = {"path": str(rows), "held_out_fraction": 1e-9}
        file = make_source(
            TaskConfig(source="file", options=options), 0, run_function=sandbox.call_function
        )
        by_question = {t.messages[0]["content"]: t for t in (file.train(0), file.train(1))}
        said = rf"\boxed{{\text{{{MARK} }}}}"
        for question, answer in {
            "Say it.": said,
            "Print it.": f"```python\nprint({MARK!r})\n```",
        }.items():
            right = [{"role": "assistant", "content": answer}]
            assert (await file.grade(by_question[question], right, End.ANSWER)).correct
        program = looking(obscured(MARK), sources)
        seen["file"] = await interpreter(program + "sorted(found)")
        spy = f"```python\n{program}print(sorted(found))\n```"
        verdict = await file.grade(
            by_question["Print it."], [{"role": "assistant", "content": spy}], End.ANSWER
        )
        seen["file, in its tests"] = verdict.reason
        other.cancel()
        seen["imported"] = await interpreter(IMPORTED + "sorted(names)")
        seen["found"] = await interpreter(FOUND.format(folder=str(ROOT)) + "sorted(found)")
    finally:
        await sandbox.close()
    return seen


def long_lines() -> Task:
    """A ledger task none of whose lines is said by chance."""
    source = Ledger(LedgerOptions(kinds=("add", "subtract", "remainder")), seed=0, key="secret")
    tasks = (source.train(index) for index in range(10_000))
    return next(task for task in tasks if all(len(line) > 12 for line in task.reveals[:-1]))


def secret_files(folder: Path) -> list[Path]:
    """Files with answers or the code that makes them, compiled too; `folder`: of this test."""
    import math_verify
    import reasoning_gym

    import elpo_fast.tasks

    packages = [Path(module.__file__).parent for module in (elpo_fast.tasks, reasoning_gym)]
    packages.append(Path(math_verify.__file__).parent)
    return [*folder.glob("*"), *(f for p in packages for f in p.glob("**/*.py*")), Path(__file__)]


class Seen:
    """`look_everywhere` in a process of its own: as this user, or as an ordinary one."""

    def __init__(self, isolation: str, ordinary: bool, folder: Path) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "src")])
        done = subprocess.run(
            [sys.executable, __file__, isolation, str(folder)],
            env=os.environ | {"PYTHONPATH": paths},
            preexec_fn=_confine.enter_user_namespace if ordinary else None,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if "no safe way" in done.stderr:
            pytest.skip(done.stderr.splitlines()[-1])
        assert done.returncode == 0, done.stderr
        self.uid, self.seen = json.loads(done.stdout)


USERS = ["this user", "an ordinary user"]


@pytest.fixture(scope="module", params=[(i, u) for u in USERS for i in ("bubblewrap", "landlock")])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    isolation, user = request.param
    ordinary = user != USERS[0]
    if ordinary and os.getuid() != 0:
        pytest.skip("this user is an ordinary one")
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder)
    found = Seen(isolation, ordinary, folder)
    assert (found.uid == 0) is (os.getuid() == 0 and not ordinary)
    yield found.seen


@pytest.mark.parametrize(
    ("source", "nothing"),
    [
        ("ledger", "([], False)"),
        ("reasoning_gym", "[]"),
        ("file", "[]"),
        ("file, in its tests", f"test 1 of 1: gave [], expected {MARK}"),
    ],
)
def test_no_door_leads_to_the_truth(seen: dict[str, str], source: str, nothing: str) -> None:
    assert seen[source] == nothing


def test_no_task_generator_or_grader_can_be_imported(seen: dict[str, str]) -> None:
    assert seen["imported"] == "[]"


def test_no_file_of_a_task_generator_or_grader_can_be_opened(seen: dict[str, str]) -> None:
    sandbox = {"_boot.py", *(f"{name}.py" for names in _view._RUNTIME.values() for name in names)}
    assert {Path(name).name for name in eval(seen["found"])} <= sandbox


# --- each door is one ----------------------------------------------------------------------------

TRAINER = """
import json, linecache, os, sys
text, code = json.load(sys.stdin)
def call(hidden):
    linecache.cache["<call 0>"] = (1, None, [hidden], "<call 0>")
    space = {"lines": [hidden], "__name__": "__main__"}
    exec(code, space)
    return space["found"]
this = sys.modules["this"] = type(sys)("this")
this.hidden = [text]
os.write(os.memfd_create("x"), text.encode())
print(sorted(call(text)))
"""


@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_open_where_nothing_protects(door: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", TRAINER],
        input=json.dumps([MARK, looking(obscured(MARK), [str(file)], [door])]),
        env=os.environ | {"ELPO_TEST_HIDDEN": MARK},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == f"[{door!r}]", done.stderr


def test_imports_and_files_are_there_where_nothing_protects() -> None:
    def shown(code: str) -> set[str]:
        command = [sys.executable, "-c", f"{code}\nprint(sorted(found or names))"]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "src")])
        environment = os.environ | {"PYTHONPATH": paths}
        return set(eval(subprocess.check_output(command, text=True, env=environment)))

    assert shown(f"found = set()\n{IMPORTED}") == set(IMPORTS)
    walk = FOUND.replace("'/', *sys.path, ", "")
    names = {Path(name).name for name in shown(walk.format(folder=str(ROOT)))}
    assert {"ledger.py", "gym_verifier.py", "operations.py"} <= names


# --- drawing the tasks again ---------------------------------------------------------------------


def clues(task: Task) -> tuple[Any, ...]:
    """What a program gets to see of a task at its beginning, and after a call."""
    return task.messages, task.setup, task.reveals[:1]


def attack_by_seeds(make: Callable[[int, int], Any], task: Task) -> Any:
    """The truth of the task that shows the same, drawn by someone who has all our code."""
    for key in range(3):
        for seed in range(3):
            source = make(seed, key)
            for split in (source.train, source.held_out):
                for index in range(20):
                    other = split(index)
                    if clues(other) == clues(task):
                        return other.truth
    return None


@pytest.mark.parametrize(
    "options", [("ledger", {}), ("reasoning_gym", {"dataset": "chain_sum"})], ids=lambda o: o[0]
)
def test_only_public_seeds_let_tasks_be_drawn_again(options: tuple[str, dict[str, Any]]) -> None:
    name, settings = options

    def make(seed: int, key: int | None) -> Any:
        config = TaskConfig(source=name, options=settings, seed=key)
        return make_source(config, seed, run_function=None)  # type: ignore[arg-type]

    for split in ("train", "held_out"):
        task = getattr(make(0, 0), split)(7)
        assert attack_by_seeds(make, task) == task.truth, "the attack is not one"
        private = make(0, None)
        truths = [attack_by_seeds(make, getattr(private, split)(i)) for i in range(3)]
        assert truths == [None] * 3


if __name__ == "__main__":
    found = asyncio.run(look_everywhere(sys.argv[1], Path(sys.argv[2])))
    print(json.dumps([os.getuid(), found]))
