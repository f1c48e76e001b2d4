"""Tools of servers of the Model Context Protocol, by its Python SDK: `tools.mcp`.

A server is trusted: its process has this one's rights, and what it answers is shown to the model.
One thread with an event loop of its own holds all sessions of a server, each in a task, because a
session has to end in the task that began it.

Calls of a stateless server go through one session, many at once. Where calls change what later
ones see (`stateful`), a state is the calls that led to it: a branch goes on in the session that
stands there, and where another branch has taken that along, on a new one on which these calls are
repeated.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from elpo_fast.config import ConfigError, McpConfig
from elpo_fast.tools.functions import checked_schema
from elpo_fast.types import RunError, Task, Tool, ToolResult

START_S = 120.0  # until a server has listed its tools
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class History:
    """The calls that led to a state: tool, arguments and answer of each."""

    calls: tuple[tuple[str, Mapping[str, Any], str], ...] = ()


class McpServer:
    """One server and its tools, which share its state."""

    def __init__(self, config: McpConfig, timeout_s: float) -> None:
        """Connects. `ConfigError` for a server that cannot be reached or has no such tools."""
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise ConfigError(
                "tools.mcp needs the package mcp; pip install 'elpo-fast[mcp]'"
            ) from None
        self._config, self._timeout_s = config, timeout_s
        self.name = config.url or " ".join(config.command)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="elpo-mcp", daemon=True)
        self._thread.start()
        self._idle: dict[History | None, _Session] = {}  # by the state at which they stand
        self._turns, self._beginning = asyncio.Semaphore(config.sessions), asyncio.Lock()
        try:
            self.tools = self._there(self._listed()).result(START_S + 10)
        except BaseException:
            self.shut()
            raise

    async def open(self, task: Task) -> History | None:
        return History() if self._config.stateful else None

    async def call(
        self, state: History | None, name: str, arguments: Mapping[str, Any]
    ) -> ToolResult:
        started = time.monotonic()
        result = await asyncio.wrap_future(self._there(self._call(state, name, arguments)))
        return ToolResult(*result, time.monotonic() - started)

    async def release(self, states: Iterable[History | None]) -> None:
        if self._config.stateful:
            await asyncio.wrap_future(self._there(self._release(list(states))))

    async def close(self) -> None:
        await asyncio.to_thread(self.shut)

    def shut(self) -> None:
        """End all sessions, and with them the processes of a command."""
        self._there(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _there(self, work: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # --- in the thread -----------------------------------------------------------------------

    async def _listed(self) -> list[McpTool]:
        try:
            async with asyncio.timeout(START_S):
                session = await _Session.begun(self._config)
                page = await session.client.list_tools()
                found = list(page.tools)
                while page.next_cursor:
                    page = await session.client.list_tools(cursor=page.next_cursor)
                    found += page.tools
        except Exception as problem:
            raise ConfigError(
                f"tools.mcp: {self.name} cannot be used ({_said(problem)}); start it by hand and "
                "see what it says"
            ) from problem
        self._idle[await self.open(Task("", (), ""))] = session
        named = {tool.name: tool for tool in found}
        wanted = list(named) if self._config.tools is None else self._config.tools
        if absent := [name for name in wanted if name not in named]:
            raise ConfigError(
                f"tools.mcp: {self.name} has no tool {absent[0]}; it has {', '.join(named)}"
            )
        return [McpTool(self, named[name]) for name in wanted]

    async def _call(
        self, state: History | None, name: str, arguments: Mapping[str, Any]
    ) -> tuple[str, History | None, bool]:
        async with self._turns:
            for attempt in (1, 2):
                session = await self._at(state)
                try:
                    async with asyncio.timeout(self._timeout_s):
                        text, error = await session.call(name, arguments)
                    break
                except TimeoutError:
                    if state is not None:
                        await session.end()  # nobody knows what it has done
                    return f"timed out after {self._timeout_s:g} s", state, True
                except Exception as problem:  # the connection's: what tools raise is an answer
                    self._idle.pop(None, None)
                    await session.end()
                    if attempt == 2:
                        raise RunError(
                            f"tools.mcp: {self.name} does not answer ({_said(problem)}); see what "
                            "ails it and go on with --resume"
                        ) from problem
            if state is None:
                return text, None, error
            after = History((*state.calls, (name, arguments, text)))
            self._idle[after] = session
            while len(self._idle) > self._config.sessions:
                await self._idle.pop(next(iter(self._idle))).end()
            return text, after, error

    async def _at(self, state: History | None) -> _Session:
        """A session at this state, which is the caller's if there is any."""
        if state is None:
            async with self._beginning:
                if None not in self._idle:
                    self._idle[None] = await _Session.begun(self._config)
                return self._idle[None]
        session = self._idle.pop(state, None)
        if session is None:
            session = await _Session.begun(self._config)
            for name, arguments, answer in state.calls:
                text, _ = await session.call(name, arguments)
                if text != answer:
                    await session.end()
                    raise RuntimeError(
                        f"{self.name} answers a repeated call of {name} otherwise, so that it "
                        "cannot branch; take algo.planner=star, or a server that repeats itself"
                    )
        return session

    async def _release(self, states: list[History | None]) -> None:
        for state in states:
            if state in self._idle:
                await self._idle.pop(state).end()

    async def _close(self) -> None:
        while self._idle:
            await self._idle.popitem()[1].end()


class _Session:
    """A connection, with a process of its own where the server is a command."""

    def __init__(self, config: McpConfig) -> None:
        self._config = config
        self._over = asyncio.Event()
        self._ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live())
        self.client: Any = None

    @classmethod
    async def begun(cls, config: McpConfig) -> _Session:
        session = cls(config)
        try:
            session.client = await session._ready
        except BaseException:
            session._task.cancel()
            raise
        return session

    async def _live(self) -> None:
        from mcp import Client, StdioServerParameters, stdio_client

        config = self._config
        where: Any = config.url
        if where is None:
            command, *arguments = config.command
            where = stdio_client(
                StdioServerParameters(command=command, args=arguments, env=config.env or None)
            )
        try:
            async with Client(where) as client:
                self._ready.set_result(client)
                await self._over.wait()
        except Exception as problem:
            if not self._ready.done():
                self._ready.set_exception(problem)

    async def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """What the tool answers, and whether it is an error; raises where nothing is answered."""
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        try:
            result = await self.client.call_tool(name, dict(arguments))
        except MCPError as refusal:
            if refusal.code == CONNECTION_CLOSED or self._task.done():
                raise ConnectionError(refusal.message) from refusal
            return refusal.message, True
        return _text(result), bool(result.is_error)

    async def end(self) -> None:
        self._over.set()
        await asyncio.wait([self._task])


class McpTool(Tool):
    """One tool of a server; its state is the server's."""

    def __init__(self, server: McpServer, tool: Any) -> None:
        function = {
            "name": tool.name,
            "description": tool.description or "",
            "parameters": tool.input_schema,
        }
        schema = {"type": "function", "function": function}
        self.schema = checked_schema(schema, f"tools.mcp: {server.name}: {tool.name}")
        self.server, self._name = server, tool.name

    async def call(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult:
        return await self.server.call(state, self._name, arguments)


def _text(result: Any) -> str:
    """What the model is shown of an answer: its text, and of other parts that they are there."""
    parts = [
        part.text if part.type == "text" else f"[{part.type}, which is not shown]"
        for part in result.content
    ]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(parts)


def _said(problem: BaseException) -> str:
    """An exception in one line; of a group, its first one."""
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    said = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {said}" if said else type(problem).__name__
