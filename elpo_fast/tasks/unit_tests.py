"""Judging programs by their tests, outside the process that the program runs in.

Tests come as data sets have them, an object or its JSON text:

    {"inputs": [...], "outputs": [...]}                  programs that read stdin and print
    {"inputs": [...], "outputs": [...], "fn_name": "f"}  functions, of the program or its `Solution`
    {"assert_case": ["assert f(1) == 2", ...]}           Python; so is a list of such texts, or one
                                                         text: assertions, a `check(candidate)`,
                                                         functions `test_...`, a `TestCase`

What is printed is compared as LiveCodeBench does; what functions return, as Python does. Tests that
are Python run in a grader (`assert_grader`), with the program in a process of its own.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from elpo_fast.tasks.assert_grader import PROGRAM
from elpo_fast.tasks.code_verifier import Call, plain, restore, stdout
from elpo_fast.tasks.common import RunFunction, run_verifier, shown

_RUN = "elpo_fast.tasks.code_verifier:run"
_ASSERT = "elpo_fast.tasks.assert_grader:run"
_HARMLESS = {"code": "", "stdin": "", "main": True, "prelude": False, "calls": [], "first": 0}
_NO_TEST = {"setup": "", "cases": [], "names": [], "entry": "", "calls": [], "results": []}
_ROUNDS = 100
_BLOCK = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Printed:
    """A program is given `stdin` and has to print `expected`."""

    stdin: str
    expected: str


@dataclass(frozen=True, slots=True)
class Returned:
    """`name(*arguments)` has to return `expected`."""

    name: str
    arguments: tuple[Any, ...]
    expected: Any


@dataclass(frozen=True, slots=True)
class Asserted:
    """Python code that must run through, see `assert_grader.run`. `setup` is run before the
    program too."""

    cases: tuple[str, ...]
    names: tuple[str, ...]
    entry: str = ""
    setup: str = ""


Tests = tuple[Printed, ...] | tuple[Returned, ...] | Asserted


def read_tests(truth: Any, *, entry: str = "", setup: str = "") -> Tests | None:
    """The tests in a ground truth; `None` where it holds none. `ValueError` for other forms.

    `entry`: the function to test, where it is known; `setup`: Python that both the tests and the
    program build on, such as the beginning of a file that the program completes.
    """
    if isinstance(truth, str) and truth.lstrip()[:1] in ("{", "[", '"'):
        try:
            truth = json.loads(truth)
        except ValueError:
            return None
    if isinstance(truth, str):
        return _asserted([truth], entry, setup) if _is_test(truth) else None
    if isinstance(truth, list) and truth and all(map(_is_test, truth)):
        return _asserted(truth, entry, setup)
    if isinstance(truth, list) and truth and isinstance(truth[0], dict):
        truth = truth[0] if len(truth) == 1 else {}
    if not isinstance(truth, dict):
        return None
    cases = truth.get("assert_case")
    if isinstance(cases, list) and cases:
        return _asserted(cases, entry, setup)
    inputs, outputs = truth.get("inputs"), truth.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
        raise ValueError("test cases need inputs and outputs, or assert_case, none of them empty")
    if len(inputs) != len(outputs):
        raise ValueError(f"there are {len(inputs)} inputs for {len(outputs)} outputs")
    name = truth.get("fn_name")
    pairs = list(zip(inputs, outputs, strict=True))
    if name:
        return tuple(_returned(name, given, expected) for given, expected in pairs)
    return tuple(Printed(_text(given), _text(expected)) for given, expected in pairs)


def read_program(text: str) -> str | None:
    """The last fenced block of Python in a message."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


async def judge(run: RunFunction, tests: Tests, code: str, timeout_s: float) -> tuple[bool, str]:
    """Whether the program passes every test, and a sentence why. It has `timeout_s` for each, and
    for all together where they are Python.

    Raises `RuntimeError` for tests that cannot be run here with any program.
    """
    if isinstance(tests, Asserted):
        return await _judge_asserted(run, tests, code, timeout_s)
    each: tuple[Printed | Returned, ...] = tests
    for number, test in enumerate(each, start=1):
        payload: dict[str, Any] = _HARMLESS | {"code": code, "prelude": True}
        if isinstance(test, Printed):
            payload["stdin"] = test.stdin
        else:
            call = ["call", [{"result": 0}, *map(plain, test.arguments)], {}]
            payload |= {"main": False, "calls": [["named", [test.name], {}], call]}
        result, problem = await run_verifier(run, _RUN, payload, _HARMLESS, timeout_s)
        if result is not None:
            problem = _fault(result, test)
        if problem:
            return False, f"test {number} of {len(tests)}: {shown(problem, 150)}"
    return True, f"passed {len(tests)} tests"


def _fault(result: Mapping[str, Any], test: Printed | Returned) -> str:
    """What is wrong with a result, which was made by a process in which unknown code ran."""
    try:
        if result["error"]:
            return str(result["error"])
        if isinstance(test, Printed):
            given, expected = stdout(result["stdout"]), test.expected
            same = _same_output(given, expected)
        else:
            for answer in result["results"]:
                if "error" in answer:
                    return ": ".join([answer["error"][0], answer["text"]])
            answer = result["results"][1]
            if "object" in answer:
                return f"gave an object of class {answer['object']}"
            given, expected = restore(answer["value"]), test.expected
            same = _listed(given) == _listed(expected)
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError, zlib.error):
        return "its result could not be read"
    return "" if same else f"gave {shown(str(given))}, expected {shown(str(expected))}"


async def _judge_asserted(
    run: RunFunction, tests: Asserted, code: str, timeout_s: float
) -> tuple[bool, str]:
    program = {"code": f"{tests.setup}\n{code}", "main": False}
    payload = {**_NO_TEST, "cases": tests.cases, "names": tests.names}
    payload |= {"entry": tests.entry, "setup": tests.setup}
    calls: list[Call] = []
    results: list[Any] = []
    for _ in range(_ROUNDS):
        known = {"calls": calls, "results": results}
        said, problem = await run_verifier(run, _ASSERT, payload | known, _NO_TEST, timeout_s)
        if said is None:
            return False, problem
        if "broken" in said:
            raise RuntimeError(f"its tests cannot be run here: {said['broken']}")
        if "passed" in said:
            count = len(tests.cases)
            place = f"test {said['case'] + 1} of {count}: "
            return (
                (True, f"passed {count} test{'s' if count > 1 else ''}")
                if said["passed"]
                else (False, place + shown(said["reason"], 150))
            )
        calls, results = calls[: said["known"]] + said["ask"], results[: said["known"]]
        request = _HARMLESS | program | {"calls": calls, "first": len(results)}
        result, problem = await run_verifier(run, _RUN, request, _HARMLESS, timeout_s)
        if result is not None:
            problem = str(result.get("error", ""))
        match result:  # made by a process in which unknown code ran
            case {"results": [_, *_] as more} if not problem and len(more) <= len(said["ask"]):
                results += more
            case _:
                return False, shown(problem or "its results could not be read", 150)
        calls = calls[: len(results)]
    return False, f"the tests were not done after {_ROUNDS} exchanges with the program"


# --- comparison --------------------------------------------------------------------------------


def _same_output(given: str, expected: str) -> bool:
    """Line by line, spaces around them and blank lines around all aside; lines of numbers by their
    values."""
    ours, theirs = given.strip().split("\n"), expected.strip().split("\n")
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(given: str, expected: str) -> bool:
    if given.strip() == expected.strip():
        return True
    try:
        return [*map(Decimal, given.split())] == [*map(Decimal, expected.split())]
    except InvalidOperation:  # words, or signalling NaN
        return False


def _listed(value: Any) -> Any:
    """Tuples as lists: expected values come from JSON, which has no tuples."""
    match value:
        case list() | tuple():
            return [_listed(part) for part in value]
        case dict():
            return {key: _listed(part) for key, part in value.items()}
    return value


# --- reading -----------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """What is read or printed: text, or lines of it."""
    lines = value if isinstance(value, list) else [value]
    return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)


def _returned(name: str, given: Any, expected: Any) -> Returned:
    """Arguments: a list, or text with one JSON value a line."""
    if not name.isidentifier():
        raise ValueError(f"fn_name {name!r} is not a name")
    if isinstance(given, str):
        given = [json.loads(line) for line in given.split("\n") if line.strip()]
    if isinstance(expected, str):
        expected = json.loads(expected)
    return Returned(name, tuple(given), expected)


def _is_test(text: Any) -> bool:
    """Whether this is Python that asserts something."""
    if not isinstance(text, str) or not re.search(r"\bassert|\bself\.fail", text):
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def _asserted(cases: Sequence[Any], entry: str, setup: str) -> Asserted:
    whole, calls = [], []
    for case in cases:
        try:
            tree = ast.parse(case)
        except (SyntaxError, ValueError, TypeError):
            raise ValueError(f"{shown(str(case))} is not Python") from None
        whole += tree.body
        calls.append(_calls(tree, entry))
    if any("check(" in more for more in calls) and not entry:
        raise ValueError("tests by check(candidate) need the name of the function they test")
    imported = any(
        PROGRAM in (getattr(node, "module", None), *(alias.name for alias in node.names))
        for node in whole
        if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    names = _foreign(whole)
    if not (names or entry or imported):  # a name of Python's own, which the program defines anew
        functions = [
            n.func.id
            for node in whole
            for n in ast.walk(node)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        entry = functions[0] if functions else ""
    names = sorted({*names, entry} - {""})
    if not names and not imported:
        raise ValueError("the tests call nothing of the program")
    return Asserted(
        tuple(case + more for case, more in zip(cases, calls, strict=True)),
        tuple(names),
        entry,
        setup,
    )


def _calls(tree: ast.Module, entry: str) -> str:
    """Calls of what a piece of code defines for others to call."""
    called = {
        node.value.func.id
        for node in tree.body
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
    }
    lines = []
    for node in tree.body:
        match node:
            case ast.FunctionDef(name="check", args=ast.arguments(args=[_])):
                call = f"check({entry})"
            case ast.FunctionDef(name=name, args=ast.arguments(args=[])) if name[:5] == "test_":
                call = f"{name}()"
            case ast.ClassDef(name=name, bases=[*bases]) if any(
                ast.unparse(base).endswith("TestCase") for base in bases
            ):
                call = f"__run_case__({name})"
            case _:
                continue
        if node.name not in called:
            lines.append(f"\n{call}")
    return "".join(lines)


def _foreign(body: Sequence[ast.stmt]) -> list[str]:
    """Names that the code uses and nobody but the program can have defined."""
    used, bound = set(), set(dir(builtins)) | {"__file__", "__name__"}
    for node in (inner for statement in body for inner in ast.walk(statement)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.alias(name=name, asname=other):
                bound.add(other or name.partition(".")[0])
    return sorted(used - bound)
