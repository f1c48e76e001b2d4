"""Judging programs by test cases: what a program gives is compared here, outside its process.

Test cases come as verl's data sets have them, an object or its JSON text:

    {"inputs": [...], "outputs": [...]}                  programs that read stdin and print
    {"inputs": [...], "outputs": [...], "fn_name": "f"}  functions, of the program or its `Solution`
    {"assert_case": ["assert f(1) == 2", ...]}           calls compared with a literal

An assertion of any other form would have to be believed to the program that it tests, which could
forge it: it is refused.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elpo_fast.tasks.code_verifier import plain
from elpo_fast.tasks.common import RunFunction, run_verifier, shown

_RUN = "elpo_fast.tasks.code_verifier:run"
_HARMLESS = {"code": "", "stdin": "", "expression": ""}
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class UnitTest:
    """One test: of what is printed for `stdin`, or of `expression` where that is not empty."""

    expected: Any
    stdin: str = ""
    expression: str = ""


def read_tests(truth: Any) -> tuple[UnitTest, ...] | None:
    """The tests in a ground truth; `None` where it holds none. `ValueError` for other forms."""
    if isinstance(truth, str) and truth.lstrip()[:1] in ("{", "["):
        try:
            truth = json.loads(truth)
        except ValueError:
            return None
    if isinstance(truth, list) and truth and isinstance(truth[0], dict):
        truth = truth[0] if len(truth) == 1 else {}
    if not isinstance(truth, dict):
        return None
    cases = truth.get("assert_case")
    if isinstance(cases, list) and cases:
        return tuple(_assertion(case) for case in cases)
    inputs, outputs = truth.get("inputs"), truth.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
        raise ValueError("test cases need inputs and outputs, or assert_case, none of them empty")
    if len(inputs) != len(outputs):
        raise ValueError(f"there are {len(inputs)} inputs for {len(outputs)} outputs")
    name = truth.get("fn_name")
    pairs = zip(inputs, outputs, strict=True)
    if name:
        return tuple(_call(name, given, expected) for given, expected in pairs)
    return tuple(UnitTest(_lines(_text(expected)), stdin=_text(given)) for given, expected in pairs)


def read_program(text: str) -> str | None:
    """The last fenced block of Python in a message."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


async def judge(
    run: RunFunction, tests: Sequence[UnitTest], code: str, timeout_s: float
) -> tuple[bool, str]:
    """Whether the program passes every test, each in a process of its own, and a sentence why."""
    for number, test in enumerate(tests, start=1):
        payload = {"code": code, "stdin": test.stdin, "expression": test.expression}
        result, problem = await run_verifier(run, _RUN, payload, _HARMLESS, timeout_s)
        passed = False
        given: Any = None
        match result:  # made by a process in which unknown code ran
            case {"error": "", "value": given} if test.expression:
                passed = _same(given, test.expected)
            case {"error": "", "stdout": str() as given}:
                passed = _lines(given) == test.expected
            case {"error": str() as error}:
                problem = error
            case None:
                pass  # `problem` says why
            case _:
                problem = "its result could not be read"
        if not passed:
            problem = problem or f"gave {shown(str(given))}, expected {shown(str(test.expected))}"
            return False, f"test {number} of {len(tests)}: {shown(problem, 150)}"
    return True, f"passed {len(tests)} tests"


def _same(given: Any, expected: Any) -> bool:
    """As `==`, but floats up to rounding."""
    match given, expected:
        case float(), float():
            return math.isclose(given, expected, rel_tol=1e-9, abs_tol=1e-9)
        case list(), list():
            return len(given) == len(expected) and all(map(_same, given, expected))
        case dict(), dict():
            return given.keys() == expected.keys() and all(
                _same(given[key], expected[key]) for key in expected
            )
        case _:
            return given == expected


def _lines(text: str) -> list[str]:
    """What is printed, spaces at the ends of lines and blank lines at the end aside."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _text(value: Any) -> str:
    """What is read or printed: text, or lines of it."""
    lines = value if isinstance(value, list) else [value]
    return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)


def _call(name: str, given: Any, expected: Any) -> UnitTest:
    """Arguments: a list, or text with one JSON value a line."""
    if not name.isidentifier():
        raise ValueError(f"fn_name {name!r} is not a name")
    if isinstance(given, str):
        given = [json.loads(line) for line in given.split("\n") if line.strip()]
    if isinstance(expected, str):
        expected = json.loads(expected)
    place = f"(Solution().{name} if 'Solution' in globals() else {name})"
    return UnitTest(plain(expected), expression=f"{place}(*{given!r})")


def _assertion(case: str) -> UnitTest:
    """`assert expression == literal`."""
    try:
        (statement,) = ast.parse(case.strip()).body
        match statement:
            case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])):
                return UnitTest(plain(ast.literal_eval(right)), expression=ast.unparse(left))
    except (ValueError, SyntaxError):
        pass
    raise ValueError(f"{shown(case)} is not of the form `assert call == literal`")
