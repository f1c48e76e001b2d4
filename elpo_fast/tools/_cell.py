"""Run one piece of code as a notebook runs a cell: last expression shown, short tracebacks.

Runs inside the confined process, standard library only. The outcome is a small JSON object:
`value` (repr of the last expression unless it is None), `error` (short traceback, user's frames
only, the exception's own line last) and `timeout`. What was printed goes to descriptors 1 and 2.
"""

from __future__ import annotations

import _multiprocessing
import _signal as signal  # touches fewer pages: see `_child`
import ast
import contextlib
import errno
import importlib
import json
import linecache
import math
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

MAX_FRAMES = 4  # of a traceback: the outermost one and the innermost ones
MAX_LINE = 100  # characters of a source line
MAX_MESSAGE = 400  # characters of an exception's message
MAX_VALUE = 48 * 1024  # characters of a repr
MAX_RESULT = 1 << 20  # bytes of a function's JSON result


WHY: dict[int, str] = {}
"""What is added to the message of an `OSError` with this number."""


def explain_refusals() -> None:
    """Where the kernel refuses, say why; and where a library would not say that it did."""
    only_here = f"programs here write in their own folder only, {os.getcwd()}"
    WHY[errno.EPERM] = _NO_PROCESSES
    WHY.update(dict.fromkeys((errno.EACCES, errno.EROFS), only_here))
    os.system = _refuse  # type: ignore[assignment]
    _multiprocessing.SemLock = _NoSemaphore


_NO_PROCESSES = "programs here have no network and start no other processes"


def _refuse(*_: object) -> NoReturn:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


class _NoSemaphore:
    """Of `multiprocessing`, the first thing that its queues and pools make."""

    SEM_VALUE_MAX = 1
    __init__ = _refuse


class _TimeUp(BaseException):
    """Not an `Exception`, so that a program's own handlers let it pass."""


def run_code(code: str, number: int, namespace: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Execute `code` in `namespace`; `number` is its place in the session, for tracebacks."""
    name = f"<call {number}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)

    def execute() -> str | None:
        tree = ast.parse(code, name)
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
        exec(compile(tree, name, "exec", dont_inherit=True), namespace)
        if not isinstance(last, ast.Expr):
            return None
        expression = ast.Expression(last.value)
        value = eval(compile(expression, name, "eval", dont_inherit=True), namespace)
        return None if value is None else shorten(repr(value), MAX_VALUE)

    return _guarded(execute, name, timeout_s)


def run_function(target: str, payload: str, timeout_s: float) -> dict[str, Any]:
    """Call `module:function` with one JSON value; its JSON result is under `value`."""

    def execute() -> str:
        module, _, function = target.partition(":")
        result = json.dumps(getattr(importlib.import_module(module), function)(json.loads(payload)))
        if len(result) > MAX_RESULT:
            raise ValueError(
                f"{target} returned {len(result)} bytes, at most {MAX_RESULT} are read"
            )
        return result

    return _guarded(execute, None, timeout_s)


def _guarded(execute: Callable[[], str | None], name: str | None, timeout_s: float) -> dict:
    """Run under a timer whose exception carries the line that was being executed. Code that does
    not return to the interpreter is left to the supervisor, which kills a little later."""

    def alarm(signum: int, frame: FrameType | None) -> None:
        raise _TimeUp

    value = error = None
    timeout = False
    signal.signal(signal.SIGALRM, alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            value = execute()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeUp as up:
        timeout, error = True, where(up, name)
    except BaseException as problem:
        # `exit()` ends a program well; a function's end has to be its return.
        if name is None or not isinstance(problem, SystemExit) or problem.code not in (None, 0):
            error = describe(problem, name)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by the program
            stream.flush()
    return {"value": value, "error": error, "timeout": timeout}


def describe(problem: BaseException, name: str | None) -> str:
    """Short traceback; the last line has the exception's type and message."""
    kind = type(problem).__name__
    if isinstance(problem, SyntaxError) and problem.filename == name:
        place = f"line {problem.lineno}: {shorten((problem.text or '').strip(), MAX_LINE)}\n"
        return f"{place}{kind}: {problem.msg}"
    message = message_of(problem)
    if isinstance(problem, MemoryError) and not message:
        message = "memory limit reached"
    for refusal in (problem, problem.__context__):  # some libraries say it in words of their own
        if isinstance(refusal, OSError) and refusal.errno in WHY:
            message = f"{message} ({WHY[refusal.errno]})"
            break
    last = f"{kind}: {message}" if message else kind
    return "\n".join(filter(None, (where(problem, name), last)))


def message_of(problem: BaseException) -> str:
    try:
        return shorten(str(problem), MAX_MESSAGE)
    except Exception as fault:
        return f"(its message could not be shown: {type(fault).__name__})"


def where(problem: BaseException, name: str | None) -> str:
    """The user's frames, one a line, outermost first, the middle of a long stack left out.
    `name` None: all frames but ours."""
    # A deep recursion has a million frames: count them, keep the few that are shown.
    count = 0
    first: list[tuple[str, int, str]] = []
    others: deque[tuple[str, int, str]] = deque(maxlen=MAX_FRAMES - 1)
    for frame, number in traceback.walk_tb(problem.__traceback__):
        code = frame.f_code
        if code.co_filename.startswith("<call ") if name else code.co_filename != __file__:
            count += 1
            (others if first else first).append((code.co_filename, number, code.co_name))
    lines = []
    for index, (file, number, function) in enumerate((*first, *others)):
        if index == 1 and count > MAX_FRAMES:
            lines.append(f"... {count - MAX_FRAMES} more ...")
        place = f"line {number}" if file == name else f"{file.strip('<>')}, line {number}"
        inside = "" if function == "<module>" else f", in {function}"
        source = shorten(linecache.getline(file, number).strip(), MAX_LINE)
        lines.append(f"{place}{inside}: {source}")
    return "\n".join(lines)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters and a mark: head and tail kept."""
    if len(text) <= limit:
        return text
    head = math.ceil(limit / 2)
    tail = limit - head
    return f"{text[:head]}...[{len(text) - limit} characters cut]...{text[-tail:]}"
