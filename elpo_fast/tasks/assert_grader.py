"""Runs tests written in Python, in a grader's server; the program that they test is elsewhere.

What they import from the program, or call by a name that is not theirs, is a `Remote`: calling it
is a call for the program's process (see `code_verifier`), and what comes back are plain values.
Those that the program keeps, objects of its own classes, stay `Remote`, and cannot be compared.

The two processes do not talk to each other. This one runs the tests with the results so far and
says which calls it needs beyond them, is run again with their results, and so on until no call is
missing. To need few rounds it goes on without a result as far as it can: a statement that cannot do
without one is skipped. What was skipped is run in the next round; calls that turn out to be others
than those asked for are asked again.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import json
import sys
import traceback
import types
import unittest
from collections.abc import Iterator, Mapping, Sequence
from functools import partialmethod
from typing import Any, NoReturn

from elpo_fast.tasks.code_verifier import Call, plain, restore

PROGRAM = "solution"
"""The module that tests import the program as, where they import it."""

_ASK_BYTES = 512 << 10  # of calls asked for at once, as JSON
_ASK_CALLS = 2_000


class _Missing(BaseException):
    """A result is needed that is not there yet; skips the statement."""


class _Enough(BaseException):
    """So many calls are asked for that they come first; ends the round."""


class Failure(Exception):
    """The tests failed for a reason of ours, not by an exception of theirs."""


class _Program:
    """The calls of a round and the results that are known."""

    def __init__(self, calls: Sequence[Call], results: Sequence[Mapping[str, Any]]) -> None:
        self._known = list(zip(calls, results, strict=True))
        self.calls: list[Call] = []  # of this round
        self.missing: int | None = None  # of these, the first without a result
        self.given = ""  # the last result, for a reason
        self._asked_bytes = 0

    def call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        call: Call = [function, [*map(_said, args)], {k: _said(v) for k, v in kwargs.items()}]
        number = len(self.calls)
        self.calls.append(call)
        if number < len(self._known) and not self._same(call, self._known[number][0]):
            del self._known[number:]
        if number >= len(self._known):
            if self.missing is None:
                self.missing = number
            self._asked_bytes += len(json.dumps(call))
            if self._asked_bytes > _ASK_BYTES or len(self.calls) - self.missing > _ASK_CALLS:
                raise _Enough
            return Remote(self, number, known=False)
        result = self._known[number][1]
        for index, now in result.get("changed", {}).items():
            _become(args[int(index)], restore(now))
        match result:
            case {"error": [*kinds], "text": str(text)}:
                self.given = f"{kinds[0]}: {text}"
                _raise(kinds, text)
            case {"object": str(kind)}:
                self.given = f"an object of class {kind}"
                return Remote(self, number, known=True)
            case {"value": value}:
                restored = restore(value)
                self.given = _short(restored)
                return restored
        raise Failure("a result could not be read")

    def _same(self, call: Call, asked: Call) -> bool:
        """Whether this is the call that was asked, when some arguments were not known yet."""

        def known(part: Any) -> Any:
            match part:
                case {"result": int(number)}:
                    return self._known[number][1].get("value", part)
                case [*parts]:
                    return [known(inner) for inner in parts]
                case dict():
                    return {key: known(inner) for key, inner in part.items()}
            return part

        return call == asked or call == known(asked)


class Remote:
    """Something in the program's process: see the module."""

    __slots__ = ("_known", "_number", "_program")

    def __init__(self, program: _Program, number: int, *, known: bool) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_known", known)

    def _ask(self, function: str, *args: Any, **kwargs: Any) -> Any:
        if not self._known:
            raise _Missing
        return self._program.call(function, self, *args, **kwargs)

    def _reference(self) -> dict[str, int]:
        return {"result": self._number}

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not self._known:  # `isinstance` cannot say yet
            raise _Missing
        return Remote

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("attribute", name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("elements"))

    __call__ = partialmethod(_ask, "call")
    __setattr__ = partialmethod(_ask, "set attribute")  # type: ignore[misc]
    __getitem__ = partialmethod(_ask, "item")
    __setitem__ = partialmethod(_ask, "set item")
    __contains__ = partialmethod(_ask, "contains")
    __len__ = partialmethod(_ask, "length")
    __bool__ = partialmethod(_ask, "truth")
    __str__ = partialmethod(_ask, "text")
    __repr__ = partialmethod(_ask, "repr")

    def _no(self, *_: Any) -> NoReturn:
        if not self._known:
            raise _Missing
        raise Failure("it gave an object of a class of its own, which cannot be compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _no
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _no
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _no
    __pow__ = __rpow__ = __and__ = __or__ = __xor__ = __neg__ = __abs__ = __invert__ = _no
    __int__ = __float__ = __index__ = __round__ = __enter__ = __hash__ = _no


class _Named(Remote):
    """A function or class of the program, by name: there before it is first used."""

    __slots__ = ("_name",)

    def __init__(self, program: _Program, name: str) -> None:
        super().__init__(program, -1, known=True)
        object.__setattr__(self, "_name", name)

    def _reference(self) -> dict[str, int]:
        if self._number < 0:
            object.__setattr__(self, "_number", len(self._program.calls))
            self._program.call("named", self._name)
        return super()._reference()


def run(payload: Mapping[str, Any]) -> dict[str, Any]:
    """One round. `setup`: code that the tests build on; `cases`: the tests, pieces of code run one
    after the other; `names`: what they take from the program unless `setup` has it; `entry`: what
    they take from it in any case; `calls` and `results`: of earlier rounds.

    Returns `known`, of how many calls the results hold, and `ask`, those to be made after them; or
    `passed`, and if it is false the `case`, its number from 0, and the `reason`; or `broken`, why
    the tests cannot be run with any program.
    """
    program = _Program(payload["calls"], payload["results"])
    tests = sys.modules["tests"] = types.ModuleType("tests")
    space = tests.__dict__

    def go_on() -> None:
        """Raises what a statement has raised, unless that may be for want of a result."""
        problem = sys.exc_info()[1]
        waiting = program.missing is not None and isinstance(problem, Exception)
        if problem is not None and not (waiting or isinstance(problem, _Missing)):
            raise problem

    def named(name: str) -> _Named:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(program, name)

    solution = sys.modules[PROGRAM] = types.ModuleType(PROGRAM)
    solution.__dict__["__getattr__"] = named
    space |= {"__go_on__": go_on, "__run_case__": _run_case}
    try:
        exec(payload["setup"], space)
    except Exception as problem:
        return {"broken": f"{type(problem).__name__}: {problem}"}
    for name in payload["names"]:
        if name not in space or name == payload["entry"]:
            space[name] = _Named(program, name)
    number, reason = 0, ""
    try:
        for case in payload["cases"]:
            exec(_skipping(case), space)
            number += 1
    except (_Missing, _Enough):
        pass
    except ImportError as problem:
        return {"broken": f"{type(problem).__name__}: {problem}"}
    except BaseException as problem:
        if type(problem).__module__.startswith("elpo_fast.tools"):  # its time is up
            raise
        reason = _in_words(problem, payload["cases"][number], program.given)
    if program.missing is not None:
        return {"known": program.missing, "ask": program.calls[program.missing :]}
    return {"passed": not reason, "case": number, "reason": reason}


def _run_case(case: type[unittest.TestCase]) -> None:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    for _, trace in itertools.chain(result.errors, result.failures):
        raise Failure(trace.strip().rpartition("\n")[2])


_TEMPLATE = "try: pass\nexcept BaseException: __go_on__()"


def _skipping(case: str) -> types.CodeType:
    """The code, with every statement that checks something able to be skipped."""

    class Skipping(ast.NodeTransformer):
        def _wrap(self, node: ast.stmt) -> ast.stmt:
            self.generic_visit(node)
            (guard,) = ast.parse(_TEMPLATE).body
            assert isinstance(guard, ast.Try)
            guard.body = [node]
            return ast.copy_location(guard, node)

        visit_Assert = visit_Expr = visit_With = _wrap

    return compile(ast.fix_missing_locations(Skipping().visit(ast.parse(case))), "<test>", "exec")


def _said(value: Any) -> Any:
    """An argument as a call has it."""
    return value._reference() if issubclass(type(value), Remote) else plain(value)


def _become(argument: Any, now: Any) -> None:
    """The program has changed an argument in place."""
    argument.clear()
    (argument.extend if isinstance(argument, list) else argument.update)(now)


def _raise(kinds: Sequence[str], text: str) -> NoReturn:
    """The exception that the program raised, if it is one of Python's own."""
    for name in kinds:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                problem = kind(text)
            except TypeError:  # it wants more than a text
                continue
            raise problem
    raise RuntimeError(f"{kinds[0]}: {text}")


def _in_words(problem: BaseException, case: str, given: str) -> str:
    """Which line failed and why."""
    lines = [
        n
        for frame, n in traceback.walk_tb(problem.__traceback__)
        if frame.f_code.co_filename == "<test>"
    ]
    line = case.splitlines()[lines[-1] - 1].strip() if lines else ""
    why = f"{type(problem).__name__}: {problem}"
    if isinstance(problem, Failure):
        why = str(problem)
    elif isinstance(problem, AssertionError):
        why = str(problem) or f"the last call gave {given}"
    return f"{line}: {why}" if line else why


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        text = "a number of many digits"
    return text if len(text) <= 200 else f"{text[:199]}…"
