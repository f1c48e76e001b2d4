"""Runs an answer's program for one test, in a server that sees what the model's other programs see.
Payloads and results are JSON.

It reports what the program gave and nothing more: the expected result is not in this process, so
that a program, which can do here whatever it likes, has no verdict to forge.
"""

from __future__ import annotations

import contextlib
import io
import sys
import types
from collections.abc import Mapping
from typing import Any


def run(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What `code` prints, given `stdin`, and the value of `expression` after it, if there is one.
    `error` says which exception ended it."""
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    sys.stdin = io.TextIOWrapper(io.BytesIO(payload["stdin"].encode()), encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    value, error = None, ""
    with contextlib.redirect_stdout(out):
        try:
            with contextlib.suppress(SystemExit):
                exec(compile(payload["code"], "<answer>", "exec"), program.__dict__)
            if payload["expression"]:
                value = plain(eval(payload["expression"], program.__dict__))
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
    out.flush()
    printed = out.buffer.getvalue()
    return {"stdout": printed.decode("utf-8"), "value": value, "error": error}


def plain(value: Any) -> Any:
    """`value` as JSON keeps it: tuples are lists, sets and dicts become lists with their kind."""
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((plain(part) for part in value), key=repr)}
    if isinstance(value, dict):
        pairs = ([plain(key), plain(part)] for key, part in value.items())
        return {"dict": sorted(pairs, key=lambda pair: repr(pair[0]))}
    return value
