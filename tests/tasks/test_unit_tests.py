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
        (STDIN, "print(sum(map(int, open(0).read().split())))"),
        (STDIN, "import os\nos.write(1, b'%d\\n' % sum(map(int, os.read(0, 100).split())))"),
        (STDIN, "import sys\nsys.__stdout__.write(str(sum(map(int, sys.__stdin__.readline()"
                ".split()))))"),
        (STDIN, "print(sum(map(int, stdin.readline().split())))\nexit()"),
        (STDIN, "import sys\nsys.stdin, sys.stdout = open('/dev/stdin'), open('/dev/stdout', 'w')\n"
                "print(sum(map(int, input().split())))"),
        (STDIN, "import threading, time\ndef main():\n    time.sleep(0.2)\n"
                "    print(sum(map(int, input().split())))\nthreading.Thread(target=main).start()"),
        (STDIN, "import atexit, io, sys\nsys.stdout = io.StringIO()\n"
                "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\n"
                "print(sum(map(int, input().split())))"),
        ({"inputs": ["2"], "outputs": ["0.5"]}, "print(f'{1 / int(input()):.2f}')"),
        ({"inputs": ["2"], "outputs": ["yes\n1.0 2e1\n"]}, "print(' yes \\n1   20.000\\n\\n')"),
        ({"inputs": ["9" * 200_000], "outputs": ["9" * 200_000]}, "print(input())"),
        ({"inputs": ["300000"], "outputs": ["\n".join(map(str, range(300_000)))]},
         "for i in range(int(input())): print(i)"),
        ({"inputs": [[10]], "outputs": [3], "fn_name": "f"}, "def f(x): return math.isqrt(x)"),
        ({"inputs": [[[3, 1]]], "outputs": [[1, 3]], "fn_name": "f"},
         "class Solution:\n    def f(self, x: List[int]) -> List[int]: return sorted(x)"),
        ({"inputs": [[9]], "outputs": [0], "fn_name": "f"},
         "def f(n): return n and f(n - 1)\nif __name__ == '__main__': print(f(int(input())))"),
        ({"inputs": [[5000]], "outputs": [0], "fn_name": "f"}, "def f(n): return n and f(n - 1)"),
    ],
)  # fmt: skip
def test_right_programs_pass(sandbox, truth, code: str) -> None:
    correct, said = verdict(sandbox, truth, code)
    assert (correct, said[:7]) == (True, "passed "), said


POINT = (
    "class Point:\n    def __init__(self, x): self.x = x\n    def twice(self): return 2 * self.x"
)
TEST_CASE = """
import unittest
from solution import f
class TestF(unittest.TestCase):
    def test_f(self):
        self.assertEqual(f(2), 4)
        with self.assertRaises(ValueError):
            f(-1)
"""


@pytest.mark.parametrize(
    ("truth", "right", "wrong"),
    [
        (["assert abs(f(2) - 1.41421356) < 1e-6"], "def f(x): return x ** .5",
         "def f(x): return x / 2"),
        (["assert f(2) is True"], "def f(x): return x == 2", "def f(x): return 1"),
        (["assert f(2)", "assert not f(3)"], "def f(x): return x == 2", "def f(x): return x"),
        (["assert f() == 0.1 + 0.2"], "def f(): return 0.1 + 0.2", "def f(): return 0.3"),
        (["assert f(1) == (1, [2])"], "def f(x): return x, [2]", "def f(x): return [x, [2]]"),
        (["import math\nassert math.isnan(f())"], "def f(): return float('nan')",
         "def f(): return 0"),
        (["assert f(f(1)) - f(2) == 0", "assert {f(3): 1}"], "def f(x): return x + 1",
         "def f(x): return x - 1"),
        (["l = [3, 1]\nf(l)\nassert l == [1, 3]"], "def f(x): x.sort()",
         "def f(x): return sorted(x)"),
        (["for n, s in zip(range(3), f(3)):\n    assert n * n == s"],
         "def f(n):\n    for i in range(n): yield i * i", "def f(n): return range(n)"),
        (["p = Point(3)\nassert p.x == 3 and p.twice() == 6", "p.x = 4\nassert p.twice() == 8"],
         POINT, POINT.replace("2 *", "3 *")),
        (["try:\n    f()\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'"],
         "def f(): raise ValueError('no')", "def f(): raise KeyError('no')"),
        (["assert isinstance(f(1), str) and len(f(1)) == 1"], "def f(x): return str(x)",
         "def f(x): return x"),
        (["assert sum(10, 15) == 6"], "def sum(a, b): return 6", "def sum(a, b): return a + b"),
        (["assert f(10 ** 5000) == 10 ** 5000 + 1"], "def f(x): return x + 1",
         "def f(x): return x"),
        (TEST_CASE, "def f(x):\n    if x < 0: raise ValueError\n    return x * x",
         "def f(x): return x * x"),
        ("def test_one():\n    assert f(1) == 2", "def f(x): return 2", "def f(x): return 1"),
        ("def check(candidate):\n    total = 0\n    while total < 5:\n"
         "        total += candidate(total)\n    assert total == 5\ncheck(f)",
         "def f(x): return 1", "def f(x): return 2"),
    ],
)  # fmt: skip
def test_tests_of_any_form_are_judged(sandbox, truth, right: str, wrong: str) -> None:
    for form in (truth, json.dumps(truth), *([{"assert_case": truth}] * isinstance(truth, list))):
        assert verdict(sandbox, form, right)[0], verdict(sandbox, form, right)
    correct, said = verdict(sandbox, truth, wrong)
    assert not correct and said.startswith("test ") and "\n" not in said


def test_tests_build_on_what_was_given(sandbox) -> None:
    setup = "def poly(xs, x): return sum(c * x ** i for i, c in enumerate(xs))\ndef root(xs): ..."
    truth = "def check(candidate):\n    assert abs(poly([1, 2], candidate([1, 2]))) < 1e-6\n"
    tests = read_tests(truth, entry="root", setup=setup)
    assert tests is not None

    def judged(code: str) -> tuple[bool, str]:
        return asyncio.run(judge(sandbox.call_function, tests, code, 5.0))

    assert judged("def root(xs): return -xs[0] / xs[1]") == (True, "passed 1 test")
    # A helper that the program defines anew is not the one that judges it.
    assert not judged("def poly(xs, x): return 0\ndef root(xs): return 7")[0]
    assert not judged("")[0]


def test_tests_that_cannot_be_run_are_no_verdict(sandbox) -> None:
    tests = read_tests("import no_such_package\nassert f(1) == 2")
    assert tests is not None
    with pytest.raises(RuntimeError, match="its tests cannot be run here: ModuleNotFoundError"):
        asyncio.run(judge(sandbox.call_function, tests, "def f(x): return 2", 5.0))


@pytest.mark.parametrize(
    ("truth", "code", "reason"),
    [
        (STDIN, "print(3)", "test 2 of 2: gave 3, expected 7"),
        (STDIN, "print('3 7')", "test 1 of 2: gave 3 7, expected 3"),
        (STDIN, "1/0", "test 1 of 2: ZeroDivisionError: division by zero"),
        (STDIN, "x = = 1", "test 1 of 2: SyntaxError: invalid syntax (<answer>, line 1)"),
        (STDIN, "", "test 1 of 2: gave , expected 3"),
        ({"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}, "x = 1", "'add' is not defined"),
        (CALLS, "def add(a, b): return str(a + b)", "test 1 of 2: gave 3, expected 3"),
        (CALLS, "def sub(): pass", "test 1 of 2: NameError: name 'add' is not defined"),
        (CASES, "def add(a, b): return [a]", "assert add(1, 2) == 3: the last call gave [1]"),
        (CASES, "def sub(): pass", "assert add(1, 2) == 3: NameError: name 'add' is not defined"),
        (CASES, "1/0", "ZeroDivisionError: division by zero"),
        (CASES, f"{ADD}import os\nos._exit(0)", "the process ended before"),
        (CASES, "class add:\n    def __init__(*_): pass", "an object of a class of its own, which"),
        (["assert f() == 0.3"], "def f(): return 0.1 + 0.2", "the last call gave 0.30000"),
        (["assert f() == 0.5"], "def f(): return 10**4000", "the last call gave 1000000"),
        (
            ["assert f() == []"],
            "def f():\n    x = []\n    x.append(x)\n    return x",
            "RecursionError",
        ),
        (["assert f() == 1"], "def f(): return 'x' * (1 << 20)", "is too large"),
        (["assert f() == 1"], "def f(): exit()", "assert f() == 1: RuntimeError: SystemExit"),
        ({"inputs": ["2"], "outputs": ["0.5"]}, "print('0.51')", "gave 0.51, expected 0.5"),
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
    check = "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)"
    for truth in (CASES, CALLS, check):
        correct, _ = verdict(sandbox, truth, FORGERIES[name])
        assert not correct


@pytest.mark.parametrize(
    "truth",
    ["12", 12, ["1", "2"], "[1, 2]", r"\frac{1}{2}", "{1, 2}", "{1", None, True, "we assert that"],
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
    assert grade("```python\nprint(3)\n```").reason == "test 2 of 2: gave 3, expected 7"
    assert grade("3").reason == "no block of Python in the final message"
