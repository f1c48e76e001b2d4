"""Runs an answer's program for its tests, in a server that sees what the model's other programs
see. Payloads and results are JSON.

It reports what the program gave and nothing more: what is expected is not in this process, so that
a program, which can do here whatever it likes, has no verdict to forge.
"""

from __future__ import annotations

import atexit
import base64
import builtins
import contextlib
import importlib
import itertools
import json
import operator
import os
import sys
import threading
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

STDOUT_BYTES = 64 << 20  # of what is printed, that much is kept
RESULTS_BYTES = 512 << 10  # of results in one answer, as JSON
_ELEMENTS = 100_000  # taken of what is iterated over
_SMALL = 1 << 63  # larger integers travel as text, which has no limit of digits in base 16

# What LiveCodeBench imports before a program: all names of each of these, then the modules.
_PRELUDE = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins"),
    "typing",
)
_RECURSION = 50_000  # its limit of recursion
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1}  # which no file stands for where there is no /proc


def run(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What `code` prints, given `stdin`, and what the calls `calls` give after it (see `_answer`),
    from number `first` on, as many as an answer has room for. `main`: it is the main program, not
    imported. `prelude`: what LiveCodeBench imports is there. `error`: the exception that ended it.
    """
    name = "__main__" if payload["main"] else "solution"
    program = sys.modules[name] = types.ModuleType(name)
    error = ""
    results: list[dict[str, Any]] = []
    with _descriptors(payload["stdin"].encode()) as printed:
        given = _prelude(program.__dict__) if payload["prelude"] else {}
        try:
            with contextlib.suppress(SystemExit):
                exec(compile(payload["code"], "<answer>", "exec"), program.__dict__)
            if payload["main"]:
                _end()
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        if not error:
            results = _results(payload["calls"], payload["first"], program.__dict__, given)
    stdout = base64.b64encode(zlib.compress(bytes(printed))).decode()
    return {"stdout": stdout, "error": error, "results": results}


def stdout(result: str) -> str:
    """The text of `run`'s `stdout`. Raises `ValueError` or `zlib.error` for any other."""
    return (
        zlib.decompressobj()
        .decompress(base64.b64decode(result), STDOUT_BYTES)
        .decode(errors="backslashreplace")
    )


def _prelude(namespace: dict[str, Any]) -> dict[str, Any]:
    exec("\n".join(f"from {name} import *" for name in _PRELUDE), namespace)
    namespace.update({name: importlib.import_module(name) for name in _PRELUDE})
    sys.setrecursionlimit(_RECURSION)
    return dict(namespace)


def _end() -> None:
    """As the interpreter ends a program: its threads are waited for, and what it has registered to
    be called then is called."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


@contextlib.contextmanager
def _descriptors(stdin: bytes) -> Iterator[bytearray]:
    """Standard input and output are real: descriptors 0 and 1 and what Python makes of them. Gives
    what is printed, whole at the end."""
    printed = bytearray()
    read_end, feed = os.pipe()
    drain, write_end = os.pipe()
    for end, fd in ((read_end, 0), (write_end, 1)):
        os.dup2(end, fd)
        os.close(end)

    def write() -> None:
        with contextlib.suppress(OSError), open(feed, "wb") as pipe:
            pipe.write(stdin)

    def read() -> None:
        while piece := os.read(drain, 1 << 16):
            if len(printed) < STDOUT_BYTES:
                printed.extend(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    threading.Thread(target=write, daemon=True).start()
    with (
        open(0, encoding="utf-8", closefd=False) as source,
        open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as sink,
    ):
        vars(sys).update(stdin=source, __stdin__=source, stdout=sink, __stdout__=sink)
        vars(builtins).update(open=partial(_open, open))
        atexit._clear()  # what the server's own modules have registered
        try:
            yield printed
        finally:
            for stream in (sys.stdout, sink):
                with contextlib.suppress(Exception):  # closed, or replaced by anything at all
                    stream.flush()
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            reader.join(0.5)  # ends at once, unless the program has copied the descriptor


def _open(opened: Callable[..., Any], file: Any, *rest: Any, **named: Any) -> Any:
    return opened(_STANDARD.get(file, file) if isinstance(file, str) else file, *rest, **named)


# --- calls -------------------------------------------------------------------------------------

Call = list[Any]
"""A function of `FUNCTIONS` and its arguments, by position and by name, all `plain`. An argument
may be `{"result": n}`: what call number n of the same list gave."""


def _results(
    calls: Sequence[Call], first: int, namespace: dict[str, Any], given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    def named(name: str) -> Any:
        """What the program calls so; a method of `Solution` where it has one."""
        solution = namespace.get("Solution")
        if isinstance(solution, type) and hasattr(solution, name):
            return getattr(solution(), name)
        if name not in namespace or (name in given and namespace[name] is given[name]):
            raise NameError(f"name {name!r} is not defined")
        return namespace[name]

    functions = {**FUNCTIONS, "named": named}
    values: list[Any] = []
    answers: list[dict[str, Any]] = []
    room = RESULTS_BYTES
    for number, call in enumerate(calls):
        value, answer = _answer(call, functions, values)
        values.append(value)
        if number >= first:
            size = len(json.dumps(answer))
            if size > RESULTS_BYTES:
                text = f"a result of {size} bytes is too large"
                answer = {"error": ["ValueError"], "text": text}
            elif size > room:
                break
            room -= size
            answers.append(answer)
    return answers


def _answer(
    call: Call, functions: Mapping[str, Callable[..., Any]], values: list[Any]
) -> tuple[Any, dict[str, Any]]:
    """The value, and how it is told: `value` if it is plain, else `object`, its type's name;
    `changed`: arguments that are no longer as they were; `error`: the names of an exception's
    classes, with its `text`."""
    name, given, named = call
    value = None
    try:
        arguments = [restore(part, values) for part in given]
        value = functions[name](
            *arguments, **{key: restore(part, values) for key, part in named.items()}
        )
        answer = _told(value)
        changed = {}
        for index, part in enumerate(given):
            ours = isinstance(part, list) or (isinstance(part, dict) and "result" not in part)
            if ours and isinstance(arguments[index], (list, dict, set)):
                now = _told(arguments[index])
                if now.get("value", part) != part:
                    changed[str(index)] = now["value"]
        return value, answer | ({"changed": changed} if changed else {})
    except (Exception, SystemExit) as problem:
        kinds = [kind.__name__ for kind in type(problem).__mro__[:-2]]
        return value, {"error": kinds, "text": str(problem)[:1000]}


def _told(value: Any) -> dict[str, Any]:
    try:
        return {"value": plain(value)}
    except TypeError:
        return {"object": type(value).__name__}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "attribute": getattr,
    "item": operator.getitem,
    "set item": operator.setitem,
    "set attribute": setattr,
    "elements": lambda value: list(itertools.islice(value, _ELEMENTS)),
    "contains": operator.contains,
    "length": len,
    "text": str,
    "repr": repr,
    "truth": bool,
}


# --- plain values ------------------------------------------------------------------------------

_CONTAINERS: dict[Any, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}
_MADE: dict[str, Callable[[Any], Any]] = {
    **{name: kind for kind, name in _CONTAINERS.items()},
    "dict": dict,
    "int": lambda text: int(text, 16),
    "bytes": base64.b64decode,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "decimal": Decimal,
    "fraction": lambda parts: Fraction(*parts),
}


def plain(value: Any) -> Any:
    """`value` as JSON can say it, one way only: JSON's own values, and `{kind: content}` for other
    plain ones. Subclasses are what they derive from. Raises `TypeError` for any other value."""
    match value:
        case None | bool():
            return value
        case int():
            value = int.__index__(value)
            return value if -_SMALL < value < _SMALL else {"int": hex(value)}
        case float():
            return float.__float__(value)
        case str():
            return str.__str__(value)
        case list():
            return [plain(part) for part in list.__iter__(value)]
        case dict():
            return {"dict": [[plain(key), plain(part)] for key, part in dict.items(value)]}
        case bytes() | bytearray():
            return {"bytes": base64.b64encode(value).decode()}
        case complex():
            return {"complex": [value.real, value.imag]}
        case range():
            return {"range": [plain(value.start), plain(value.stop), plain(value.step)]}
        case Decimal():
            return {"decimal": str(value)}
        case Fraction():
            return {"fraction": [plain(value.numerator), plain(value.denominator)]}
    for kind, name in _CONTAINERS.items():
        if isinstance(value, kind):
            parts = [plain(part) for part in value]
            return {name: sorted(parts, key=repr) if "set" in name else parts}
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # NumPy's
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} is not a plain value")


def restore(value: Any, results: Sequence[Any] = ()) -> Any:
    """What `plain` was given, `{"result": n}` from `results`. Raises `ValueError`, `KeyError`,
    `TypeError` or `ArithmeticError` for what it cannot have made."""
    if isinstance(value, list):
        return [restore(part, results) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "result":
        return results[content]
    if isinstance(content, list):
        content = restore(content, results)
    return _MADE[kind](content)
