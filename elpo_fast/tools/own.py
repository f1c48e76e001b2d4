"""A tool class of one's own, named in `tools.names`: see `docs/own.md`.

It is trusted and runs in this process; its methods may be coroutines or not. A call that awaits for
longer than `tools.timeout_s` is cancelled and leaves the state as it was; what it raises ends the
trajectory.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from elpo_fast import own
from elpo_fast.config import ConfigError, ToolConfig
from elpo_fast.tools.functions import checked_schema
from elpo_fast.tools.sandbox import Sandbox
from elpo_fast.types import Task, Tool, ToolResult

WATCHED = 10  # calls whose state is looked at before and after

_log = logging.getLogger(__name__)


class OwnTool(Tool):
    """What `name` stands for, held to the protocol of a tool."""

    def __init__(self, name: str, config: ToolConfig, sandbox: Sandbox) -> None:
        """`ConfigError` for what cannot be used."""
        kind = own.find("tools", name, "tools.names")
        options = config.options.get(name, {})
        make = own.bound(kind, ("sandbox",), options, f"tools.options.{name}")
        if missing := sorted(getattr(kind, "__abstractmethods__", ())):
            raise ConfigError(f"tools.names: {name} has no {', '.join(missing)}; a Tool needs them")
        self._tool: Tool = make(sandbox=sandbox)
        own.complete(self._tool, Tool, f"tools.names: {name}")
        self.schema = checked_schema(self._tool.schema, f"tools.names: {name}")
        self._timeout_s = config.timeout_s
        self._watched = WATCHED

    async def open(self, task: Task) -> Any:
        return await own.awaited(self._tool.open(task))

    async def call(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult:
        started = time.monotonic()
        before = _bytes_of(state) if self._watched else None
        self._watched -= before is not None
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                result = await own.awaited(self._tool.call(state, arguments))
        except TimeoutError:
            if not limit.expired():  # it is the tool's own
                raise
            result = ToolResult(f"timed out after {self._timeout_s:g} s", state, error=True)
        if not isinstance(result, ToolResult):
            raise TypeError(
                f"{type(self._tool).__name__}.call returned a {type(result).__name__}; "
                "return a ToolResult"
            )
        if state is not None and result.state is None:
            raise TypeError(
                f"{type(self._tool).__name__}.call returned no state where it was given one; "
                "return ToolResult(text, state)"
            )
        if before is not None and _bytes_of(state) != before:
            self._watched = 0
            _log.warning(
                "%s.call changed the state that it was given, which other branches of the tree go "
                "on from; return a new one instead",
                type(self._tool).__name__,
            )
        return replace(result, seconds=time.monotonic() - started)

    async def release(self, states: Iterable[Any]) -> None:
        await own.awaited(self._tool.release(states))

    async def close(self) -> None:
        await own.awaited(self._tool.close())


def _bytes_of(state: Any) -> bytes | None:
    """To see a change by; None for what cannot be written."""
    try:
        return None if state is None else pickle.dumps(state)
    except Exception:  # whatever a class of one's own does
        return None
