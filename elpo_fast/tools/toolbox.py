"""The tools of one run: what the model may call, and every way in which it can call them wrongly.

Nothing the model writes raises here. An unknown tool, arguments that its schema refuses and an
unreadable call come back as a result that says what was expected, and leave the state alone.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from elpo_fast.config import ConfigError, ToolConfig
from elpo_fast.tools._arguments import expected, refusal, shown, validator
from elpo_fast.tools._cell import shorten
from elpo_fast.tools.functions import Functions, checked_schema, declared
from elpo_fast.tools.interpreter import CodeInterpreter, PythonSession
from elpo_fast.tools.mcp import McpServer
from elpo_fast.tools.own import OwnTool
from elpo_fast.tools.remote import RemoteSandbox
from elpo_fast.tools.sandbox import Sandbox
from elpo_fast.types import MalformedCall, Task, Tool, ToolCall, ToolResult

ToolboxState = tuple[Any, ...]
"""A state of each tool, the tools of a server as one."""


class Toolbox:
    """Builds the tools that the configuration names and dispatches calls to them."""

    def __init__(self, config: ToolConfig, sandbox: Sandbox | None = None) -> None:
        """`sandbox`: shared with others and closed by them; by default one of our own."""
        self._owned = sandbox is None
        self.sandbox = sandbox or Sandbox(
            isolation=config.isolation,
            workers=config.workers,
            timeout_s=config.timeout_s,
            memory_mb=config.memory_mb,
            packages=config.packages,
        )
        # What graders ask of it, and which protection is active.
        self.run_python, self.run_function = self.sandbox.run, self.sandbox.call_function
        self.describe = self.sandbox.describe
        self._remote = config.remote_url and RemoteSandbox(
            config.remote_url, timeout_s=config.timeout_s, workers=config.workers
        )
        tools: list[Tool] = []
        for name in config.names:
            match name:
                case "code_interpreter":
                    tools.append(CodeInterpreter(self._remote or self.sandbox))
                case "python_session":
                    tools.append(PythonSession(self.sandbox))
                case _:
                    tools.append(OwnTool(name, config, self.sandbox))
        self._validators = {_name(tool): validator(tool.schema) for tool in tools}
        self._workers = config.function_workers
        functions = Functions(
            declared(config.functions), workers=self._workers, timeout_s=config.timeout_s
        )
        self._functions = [functions]
        tools += functions.tools
        self._holders: list[Tool | McpServer] = [*tools]
        self._tools: dict[str, tuple[Tool, int]] = {}  # with the place of their state
        try:
            for tool in tools:
                self._add(tool, tool)
            for each in config.mcp:
                server = McpServer(each, config.timeout_s)
                self._holders.append(server)
                for tool in server.tools:
                    self._add(tool, server)
        except BaseException:
            for holder in self._holders:
                if isinstance(holder, McpServer):
                    holder.shut()
            raise

    def offer(self, tools: Iterable[Tool]) -> None:
        """Add a task source's tools, before the first state is opened. `ConfigError` for a name
        that is there already."""
        for tool in tools:
            checked_schema(tool.schema, "task.source")
            self._holders.append(tool)
            self._add(tool, tool)
            self._validators[_name(tool)] = validator(tool.schema)

    def _add(self, tool: Tool, holder: Tool | McpServer) -> None:
        name = _name(tool)
        if name in self._tools:
            raise ConfigError(
                f"tools: every tool needs a name of its own, and {name} is there twice"
            )
        self._tools[name] = tool, self._holders.index(holder)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tools)

    @property
    def schemas(self) -> list[Mapping[str, Any]]:
        """OpenAI function schemas, for the chat template."""
        return [tool.schema for tool, _ in self._tools.values()]

    async def open(self, task: Task) -> ToolboxState:
        """State before the first call; `RuntimeError` naming the task if its setup fails."""
        return tuple([await holder.open(task) for holder in self._holders])

    async def execute(self, state: ToolboxState, call: ToolCall | MalformedCall) -> ToolResult:
        """Answer a call. The result's state is the same object where nothing was executed."""
        if isinstance(call, MalformedCall):
            return ToolResult(call.problem, state, error=True)
        problem = self._problem(call)
        if problem is not None:
            return ToolResult(problem, state, error=True)
        tool, index = self._tools[call.name]
        result = await tool.call(state[index], call.arguments)
        if result.state is state[index]:
            return replace(result, state=state)
        return replace(result, state=(*state[:index], result.state, *state[index + 1 :]))

    async def release(self, states: Iterable[ToolboxState]) -> None:
        """These states will not be called again, nor will others that share their parts."""
        columns = zip(*states, strict=True)
        for holder, column in zip(self._holders, columns, strict=False):
            await holder.release({id(state): state for state in column}.values())

    async def close(self) -> None:
        for holder in self._holders:
            await holder.close()
        for functions in self._functions:
            await functions.close()
        if self._remote:
            await self._remote.close()
        if self._owned:
            await self.sandbox.close()

    def apart(
        self, *functions: str, key: str, timeout_s: float
    ) -> Callable[[Mapping[str, Any]], Awaitable[Any]]:
        """What calls the first of these trusted `module:function`s with JSON values, in processes
        that have imported all of them and end with this toolbox; it raises `RuntimeError` where
        that does, or takes longer than `timeout_s`. `key`: of the configuration, for faults."""
        anything: Mapping[str, Any] = {"function": {"parameters": {}}}
        called = Functions(
            [(function, anything) for function in functions],
            workers=self._workers,
            timeout_s=timeout_s,
            key=key,
        )
        self._functions.append(called)

        async def call(arguments: Mapping[str, Any]) -> Any:
            reply = await called.call(0, arguments)
            if reply["error"]:
                raise RuntimeError(reply["text"])
            return json.loads(str(reply["text"]))

        return call

    def _problem(self, call: ToolCall) -> str | None:
        """What is wrong with a call, and what was expected, for the model; functions look at their
        arguments themselves."""
        if call.name not in self._tools:
            schemas = "\n".join(map(shown, self.schemas))
            return f"unknown tool {shorten(call.name, 100)!r}; known tools:\n{schemas}"
        valid = self._validators.get(call.name)
        problem = valid and refusal(valid, call.arguments)
        return expected(problem, self._tools[call.name][0].schema) if problem else None


def _name(tool: Tool) -> str:
    return str(tool.schema["function"]["name"])
