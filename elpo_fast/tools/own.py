"""A tool class of one's own, named in `tools.names`: see `docs/own.md`.

It is trusted and runs in this process; its methods may be coroutines or not. A call that awaits for
longer than `tools.timeout_s` is cancelled and leaves the state as it was; what it raises ends the
trajectory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from elpo_fast import own
from elpo_fast.config import ToolConfig
from elpo_fast.tools.functions import checked_schema
from elpo_fast.tools.sandbox import Sandbox
from elpo_fast.types import Task, Tool, ToolResult


class OwnTool(Tool):
    """What `name` stands for, held to the protocol of a tool."""

    def __init__(self, name: str, config: ToolConfig, sandbox: Sandbox) -> None:
        """`ConfigError` for what cannot be used."""
        kind = own.find("tools", name, "tools.names")
        options = config.options.get(name, {})
        make = own.bound(kind, ("sandbox",), options, f"tools.options.{name}")
        self._tool: Tool = make(sandbox=sandbox)
        own.complete(self._tool, Tool, f"tools.names: {name}")
        self.schema = checked_schema(self._tool.schema, f"tools.names: {name}")
        self._timeout_s = config.timeout_s

    async def open(self, task: Task) -> Any:
        return await own.awaited(self._tool.open(task))

    async def call(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult:
        started = time.monotonic()
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
        return replace(result, seconds=time.monotonic() - started)

    async def release(self, states: Iterable[Any]) -> None:
        await own.awaited(self._tool.release(states))

    async def close(self) -> None:
        await own.awaited(self._tool.close())
