"""Any Python function as a tool, declared by an OpenAI function schema.

The function is the user's own and trusted: it runs in this process, with everything this process
may do, a coroutine function in the event loop, any other in a thread. What the model chooses are
the arguments alone, checked against the schema before. A returned text is shown as it is, anything
else as JSON; an exception becomes its type and message; a call that takes longer than the time
limit is answered and its thread, which cannot be stopped, left to itself.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema

from elpo_fast.config import ConfigError
from elpo_fast.tools._cell import MAX_MESSAGE, MAX_VALUE, shorten
from elpo_fast.types import Task, ToolResult


class FunctionTool:
    """One function. Stateless: its state is `None`."""

    def __init__(self, target: str, schema: Mapping[str, Any] | str, *, timeout_s: float) -> None:
        """`target`: "module:function"; `schema`: `{"type": "function", "function": {...}}` or the
        path of a JSON file with it. `ConfigError` for what cannot be used."""
        place = f"tools.functions: {target}"
        self.schema = _checked(_read(schema, place) if isinstance(schema, str) else schema, place)
        self.name: str = self.schema["function"]["name"]
        self._function, self._timeout_s = _load(target, place), timeout_s

    async def open(self, task: Task) -> None:
        return None

    async def call(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult:
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                if inspect.iscoroutinefunction(self._function):
                    value = await self._function(**arguments)
                else:
                    value = await _in_thread(lambda: self._function(**arguments))
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text, error = shorten(text, MAX_VALUE), False
        except Exception as problem:
            text, error = f"{type(problem).__name__}: {shorten(str(problem), MAX_MESSAGE)}", True
            if isinstance(problem, TimeoutError) and limit.expired():
                text = f"timed out after {self._timeout_s:g} s"
        return ToolResult(text, None, error, time.monotonic() - started)

    async def release(self, states: Iterable[Any]) -> None:
        return None

    async def close(self) -> None:
        return None


async def _in_thread(function: Callable[[], Any]) -> Any:
    """In a thread that nothing waits for when we end: it may never return."""
    future: Future[Any] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(function())
        except BaseException as problem:
            future.set_exception(problem)

    threading.Thread(target=run, name="elpo-tool", daemon=True).start()
    return await asyncio.wrap_future(future)


def _load(target: str, place: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as problem:
        raise ConfigError(
            f"{place}: {problem}; it must be module:function of something importable"
        ) from None
    if not callable(function):
        raise ConfigError(f"{place} is a {type(function).__name__}, not a function")
    return function


def _read(path: str, place: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{place}: cannot read the schema in {path}: {problem}") from None


def _checked(schema: Any, place: str) -> Mapping[str, Any]:
    try:
        jsonschema.validate(schema, _OPENAI_FUNCTION)
        jsonschema.Draft202012Validator.check_schema(schema["function"]["parameters"])
    except jsonschema.ValidationError as problem:
        raise ConfigError(f"{place}: not an OpenAI function schema: {problem.message}") from None
    except jsonschema.SchemaError as problem:
        raise ConfigError(
            f"{place}: its parameters are no JSON schema: {problem.message}"
        ) from None
    return schema


_OPENAI_FUNCTION = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name", "description", "parameters"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                "description": {"type": "string"},
                "parameters": {
                    "type": "object",
                    "required": ["type", "properties"],
                    "properties": {"type": {"const": "object"}},
                },
            },
        },
    },
}
