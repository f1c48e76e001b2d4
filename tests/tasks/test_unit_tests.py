"""Programs judged by test cases: right, wrong, hostile; none of them can forge a verdict."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest

from elpo_fast.config import TaskConfig
from elpo_fast.tasks import make_source
from elpo_fast.tasks.unit_tests import judge, read_program, read_tests
from elpo_fast.tools.sandbox import Sandbox
from elpo_fast.types import End, Verdict

STDIN = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
CALLS = {"inputs": [[1, 2], [3, 4]], "outputs": [3, 7], "fn_name": "add"}
CASES = {"assert_case": ["assert add(1, 2) == 3", "assert [add(3, 4)] == [7]"]}
SUM = "a, b = map(int, input().split())\nprint(a + b)\n"
ADD = "def add(a, b):\n    return a + b\n"


def verdict(sandbox: Sandbox, truth: Any, code: str, timeout_s: float = 5.0) -> tuple[bool, str]:
    tests = read_tests(truth)
    assert tests is not None
    return asyncio.run(judge(sandbox.call_function, tests, code, timeout_s))


@pytest.mark.parametrize(
    ("truth", "code"),
    [
        (STDIN, SUM),
        (json.dumps(STDIN), SUM + "print()\n"),
        ([STDIN], "import sys\nprint(sum(map(int, sys.stdin.read().split())), '')"),
        (STDIN, "import sys\nsys.stdout.buffer.write(str(sum(map(int, sys.stdin.buffer.read()"
                ".split()))).encode())"),
        (STDIN, "def main():\n    print(sum(map(int, input().split())))\n    exit()\n"
                "if __name__ == '__main__':\n    main()"),
        ({"inputs": [["1", "2"]], "outputs": [["1", "2"]]}, "print(input())\nprint(input())"),
        (CALLS, ADD),
        (CALLS, "class Solution:\n    def add(self, a, b):\n        return a + b"),
        ({"inputs": ["[1, 2]\n3"], "outputs": ["[1, 2, 3]"], "fn_name": "f"},
         "def f(x, y): return (*x, y)"),
        (CASES, ADD),
        ({"assert_case": ["assert f() == {(1, 2), (3,)}"]}, "def f(): return {(3,), (1, 2)}"),
        ({"assert_case": ["assert f() == {'a': 1, 2: 'b'}"]}, "def f(): return {2: 'b', 'a': 1}"),
        ({"assert_case": ["assert f() == 0.3"]}, "def f(): return 0.1 + 0.2"),
    ],
)  # fmt: skip
def test_right_programs_pass(sandbox, truth, code: str) -> None:
    assert verdict(sandbox, truth, code) == (True, f"passed {len(read_tests(truth))} tests")


@pytest.mark.parametrize(
    ("truth", "code", "reason"),
    [
        (STDIN, "print(3)", "test 2 of 2: gave 3, expected ['7']"),
        (STDIN, "print('3 7')", "test 1 of 2: gave 3 7, expected ['3']"),
        (STDIN, "1/0", "test 1 of 2: ZeroDivisionError: division by zero"),
        (STDIN, "x = = 1", "test 1 of 2: SyntaxError: invalid syntax (<answer>, line 1)"),
        (STDIN, "", "test 1 of 2: gave , expected ['3']"),
        (CALLS, "def add(a, b): return str(a + b)", "test 1 of 2: gave 3, expected 3"),
        (CALLS, "def sub(): pass", "test 1 of 2: NameError: name 'add' is not defined"),
        (CASES, "def add(a, b): return [a]", "test 1 of 2: gave [1], expected 3"),
        (
            {"assert_case": ["assert f() == 0.5"]},
            "def f(): return 10**4000",
            "test 1 of 1: gave 1000000",
        ),
        (STDIN, "while True: pass", "timed out after 0.5 s"),
        (STDIN, "x = bytearray(1 << 40)", "test 1 of 2: MemoryError"),
        (STDIN, "while True: print('x' * 10**6)", "test 1 of 2: "),
        (STDIN, "import os\nos._exit(0)", "the process ended before"),
        (STDIN, "import ctypes\nctypes.string_at(0)", "the interpreter crashed (SIGSEGV)"),
    ],
)
def test_wrong_programs_fail_and_say_why(sandbox, truth, code: str, reason: str) -> None:
    correct, said = verdict(sandbox, truth, code, timeout_s=0.5)
    assert not correct and reason in said and "\n" not in said


IN_PROCESS = """
import sys
try:
    exec(sys.argv[1])
    assert add(1, 2) == 3
    print("passed")
except BaseException:
    print("failed")
"""
# Each passes an assertion that is run beside it.
FORGERIES = {
    "equal to all": (
        "class Any(int):\n    __eq__ = lambda *_: True\n"
        "    __repr__ = __str__ = lambda *_: '3'\ndef add(*_): return Any()"
    ),
    "says so itself": "import os\nos.write(1, b'passed')\nos._exit(0)",
    "reads the test": (
        "import sys\ndef add(*_):\n    constants = sys._getframe(1).f_code.co_consts\n"
        "    return next((c for c in constants if c == 3), None)"
    ),
    "result on every descriptor": (
        "import os\nprint('passed', flush=True)\n"
        "p = b'{\"value\": \"{\\\\\"correct\\\\\": true}\", \"error\": null, \"timeout\": false}'\n"
        "for fd in range(3, 64):\n"
        "    try: os.write(fd, b'X' + len(p).to_bytes(4, 'big') + p)\n    except OSError: pass\n"
        "os._exit(0)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_verdicts_fail_and_would_have_worked(sandbox, name: str) -> None:
    command = [sys.executable, "-c", IN_PROCESS, FORGERIES[name]]
    assert "passed" in subprocess.run(command, capture_output=True, text=True).stdout
    for truth in (CASES, CALLS):
        correct, _ = verdict(sandbox, truth, FORGERIES[name])
        assert not correct


@pytest.mark.parametrize(
    "truth", ["12", 12, ["1", "2"], "[1, 2]", r"\frac{1}{2}", "{1, 2}", "{1", None, True]
)
def test_other_ground_truths_hold_no_tests(truth) -> None:
    assert read_tests(truth) is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("First\n```py\na\n```\nbetter:\n```\nb\n```\nDone.", "b\n"),
        ("no code", None),
    ],
)
def test_program_is_the_last_block(text: str, code: str | None) -> None:
    assert read_program(text) == code


def test_a_file_of_code_tasks_is_judged_by_its_tests(tmp_path, sandbox) -> None:
    record = {
        "data_source": "codes",
        "prompt": [{"role": "user", "content": "Add two numbers."}],
        "ability": "code",
        "reward_model": {"ground_truth": json.dumps(STDIN)},
    }
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(record))
    config = TaskConfig(source="file", options={"path": str(path), "held_out_fraction": 1e-9})
    source = make_source(config, 0, sandbox.call_function)

    def grade(text: str) -> Verdict:
        message = {"role": "assistant", "content": text}
        return asyncio.run(source.grade(source.train(0), [message], End.ANSWER))

    assert grade(f"Here:\n```python\n{SUM}```") == Verdict(True, 1.0, "passed 2 tests")
    assert grade("```python\nprint(3)\n```").reason == "test 2 of 2: gave 3, expected ['7']"
    assert grade("3").reason == "no block of Python in the final message"
