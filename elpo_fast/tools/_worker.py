"""A process of `functions.Functions`: all functions imported, one call after the other.

Requests are JSON `[function's number, arguments]`; a reply is an object with the `text` for the
model, whether it tells of an `error`, and whether the arguments were `refused`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from jsonschema import Draft202012Validator

from elpo_fast import own
from elpo_fast.tools import _arguments, _confine
from elpo_fast.tools._cell import MAX_VALUE, message_of, shorten

Reply = dict[str, str | bool]


def serve(pipe: Connection, functions: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Until the other end of the pipe is closed; the first message says that all is imported."""
    _confine.die_with_parent()
    known = [(own.load(target), _arguments.validator(schema)) for target, schema in functions]
    pipe.send_bytes(b"ready")
    with asyncio.Runner() as runner:
        while True:
            try:
                number, arguments = json.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                return
            function, valid = known[number]
            reply = _answer(function, valid, arguments, runner)
            pipe.send_bytes(json.dumps(reply).encode())


def _answer(
    function: Callable[..., Any],
    valid: Draft202012Validator,
    arguments: Mapping[str, Any],
    runner: asyncio.Runner,
) -> Reply:
    try:
        problem = _arguments.refusal(valid, arguments)
        if problem is not None:
            return {"text": problem, "error": True, "refused": True}
        value = function(**arguments)
        if inspect.iscoroutine(value):
            value = runner.run(value)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return {"text": shorten(text, MAX_VALUE), "error": False, "refused": False}
    except BaseException as problem:
        text = f"{type(problem).__name__}: {message_of(problem)}"
        return {"text": text, "error": True, "refused": False}
