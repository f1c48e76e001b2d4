"""The tools of one run: what the model may call, and every way in which it can call them wrongly.

Nothing the model writes raises here. An unknown tool, a missing, unknown or wrongly typed argument
and an unreadable call come back as a result that says what was expected, and leave the state alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from elpo_fast.config import ToolConfig
from elpo_fast.tools.interpreter import CodeInterpreter, PythonSession
from elpo_fast.tools.sandbox import Execution, Protection, Sandbox
from elpo_fast.types import MalformedCall, Task, Tool, ToolCall, ToolResult

ToolboxState = tuple[Any, ...]
"""One state for every tool, in the order of `Toolbox.names`."""

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


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
        )
        kinds = {kind.name: kind for kind in (CodeInterpreter, PythonSession)}
        self._tools: dict[str, Tool] = {name: kinds[name](self.sandbox) for name in config.names}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tools)

    @property
    def schemas(self) -> list[Mapping[str, Any]]:
        """OpenAI function schemas, for the chat template."""
        return [tool.schema for tool in self._tools.values()]

    async def describe(self) -> Protection:
        """Which protection is active; `RuntimeError` where none works."""
        return await self.sandbox.describe()

    async def open(self, task: Task) -> ToolboxState:
        """State before the first call; `RuntimeError` naming the task if its setup fails."""
        return tuple([await tool.open(task) for tool in self._tools.values()])

    async def execute(self, state: ToolboxState, call: ToolCall | MalformedCall) -> ToolResult:
        """Answer a call. The result's state is the same object where nothing was executed."""
        if isinstance(call, MalformedCall):
            return ToolResult(call.problem, state, error=True)
        problem = self._problem(call)
        if problem is not None:
            return ToolResult(problem, state, error=True)
        index = self.names.index(call.name)
        result = await self._tools[call.name].call(state[index], call.arguments)
        if result.state is state[index]:
            return replace(result, state=state)
        return replace(result, state=(*state[:index], result.state, *state[index + 1 :]))

    async def release(self, states: Iterable[ToolboxState]) -> None:
        """These states will not be called again, nor will others that share their parts."""
        columns = zip(*states, strict=True)
        for tool, column in zip(self._tools.values(), columns, strict=False):
            await tool.release(dict.fromkeys(column))

    async def close(self) -> None:
        for tool in self._tools.values():
            await tool.close()
        if self._owned:
            await self.sandbox.close()

    async def run_python(
        self, code: str, *, stdin: str | None = None, timeout_s: float | None = None
    ) -> Execution:
        """Execute code for a grader, in a process of its own."""
        return await self.sandbox.run(code, stdin=stdin, timeout_s=timeout_s)

    async def run_function(
        self, function: str, payload: Any, timeout_s: float | None = None
    ) -> Any:
        """Call "module:function" with a JSON value, confined; see `Sandbox.call_function`."""
        return await self.sandbox.call_function(function, payload, timeout_s)

    def _problem(self, call: ToolCall) -> str | None:
        """What is wrong with a call, in one sentence for the model."""
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(_signature(tool.schema) for tool in self._tools.values())
            return f"unknown tool {call.name!r}; known tools: {known}"
        parameters = tool.schema["function"]["parameters"]
        properties: Mapping[str, Any] = parameters["properties"]
        expected = f"expected {_signature(tool.schema)}"
        for name in parameters.get("required", ()):
            if name not in call.arguments:
                return f"missing argument {name!r}; {expected}"
        for name, value in call.arguments.items():
            if name not in properties:
                return f"unknown argument {name!r}; {expected}"
            kind = properties[name].get("type")
            is_bool = isinstance(value, bool) and kind in ("integer", "number")
            if kind in _TYPES and (is_bool or not isinstance(value, _TYPES[kind])):
                return f"argument {name!r} is a {type(value).__name__}; {expected}"
        return None


def _signature(schema: Mapping[str, Any]) -> str:
    """`python_session(code: string)`; optional parameters carry a question mark."""
    function = schema["function"]
    parameters = function["parameters"]
    required = parameters.get("required", ())
    shown = (
        f"{name}{'' if name in required else '?'}: {what.get('type', 'any')}"
        for name, what in parameters["properties"].items()
    )
    return f"{function['name']}({', '.join(shown)})"
