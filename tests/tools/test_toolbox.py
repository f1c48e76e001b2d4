"""Calls to the toolbox, right and wrong: nothing a model writes raises."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from elpo_fast.config import ToolConfig
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import MalformedCall, Task, Tool, ToolCall, ToolResult


@pytest.fixture(scope="module")
def toolbox() -> Iterator[Toolbox]:
    box = Toolbox(ToolConfig(names=["python_session", "code_interpreter"]))
    try:
        asyncio.run(box.describe())
    except RuntimeError as problem:
        pytest.skip(str(problem))
    yield box
    asyncio.run(box.close())


def execute(toolbox: Toolbox, *calls: ToolCall | MalformedCall) -> list[ToolResult]:
    async def main() -> list[ToolResult]:
        state = await toolbox.open(Task("t", (), "test", setup="x = 1"))
        results = []
        for call in calls:
            results.append(await toolbox.execute(state, call))
            state = results[-1].state
        await toolbox.release([result.state for result in results])
        return results

    return asyncio.run(main())


def python(code: object, name: str = "python_session") -> ToolCall:
    return ToolCall(name, {"code": code})


def test_schemas_are_openai_functions(toolbox) -> None:
    assert [schema["function"]["name"] for schema in toolbox.schemas] == list(toolbox.names)
    for schema in toolbox.schemas:
        assert schema["type"] == "function"
        assert schema["function"]["parameters"]["required"] == ["code"]
        assert "(no output)" in schema["function"]["description"]


def test_only_the_configured_tools_exist() -> None:
    assert Toolbox(ToolConfig(names=["code_interpreter"])).names == ("code_interpreter",)


def test_each_tool_keeps_its_own_state(toolbox) -> None:
    results = execute(
        toolbox,
        python("x += 1; x"),
        python("'x' in dir()", "code_interpreter"),
        python("x"),
    )
    assert [result.content for result in results] == ["2", "False", "2"]
    assert results[0].state != results[2].state


def deep(levels: int) -> list[object]:
    value: list[object] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("call", "problem", "expected"),
    [
        (python("1", "pyhton"), "unknown tool 'pyhton'; known tools:", [0, 1]),
        (
            ToolCall("python_session", {}),
            "arguments: 'code' is a required property; expected:",
            [0],
        ),
        (
            ToolCall("python_session", {"code": "1", "timeout": 3}),
            "arguments: Additional properties are not allowed ('timeout' was unexpected); "
            "expected:",
            [0],
        ),
        (python(3), "arguments['code']: 3 is not of type 'string'; expected:", [0]),
        (python(None), "arguments['code']: None is not of type 'string'; expected:", [0]),
        (python(["x"]), "arguments['code']: ['x'] is not of type 'string'; expected:", [0]),
        (python(deep(10**5)), "arguments: nested too deeply; expected:", [0]),
        (MalformedCall("the call is not valid JSON"), "the call is not valid JSON", []),
    ],
)
def test_wrong_calls_are_answered_with_the_schema_and_change_nothing(
    toolbox, call, problem: str, expected: list[int]
) -> None:
    first, wrong, after = execute(toolbox, python("x += 1; x"), call, python("x"))
    said, *shown = wrong.content.split("\n")
    assert (said, wrong.error) == (problem, True)
    assert list(map(json.loads, shown)) == [toolbox.schemas[i]["function"] for i in expected]
    assert wrong.state is first.state
    assert after.content == "2"


@pytest.mark.parametrize(
    "code", ["\ud800", "x = '\0'", "\0", "# -*- coding: latin-1 -*-\n'é'", "(" * 5000, "\n" * 10**6]
)
def test_strange_code_is_answered(toolbox, code: str) -> None:
    strange, after = execute(toolbox, python(code), python("x"))
    assert strange.content
    assert after.content == "1"


def test_exceptions_are_errors_but_change_the_state(toolbox) -> None:
    failed, after = execute(toolbox, python("x = 5\n1/0"), python("x"))
    assert failed.error and failed.content == "line 2: 1/0\nZeroDivisionError: division by zero"
    assert after.content == "5" and not after.error


def test_graders_can_execute(toolbox) -> None:
    assert asyncio.run(toolbox.run_python("print(input())", stdin="a")).stdout == "a\n"
    assert asyncio.run(toolbox.run_function("math:factorial", 5, 5.0)) == 120


def test_shared_sandbox_is_left_open(safe_box) -> None:
    async def main() -> str:
        shared = Toolbox(ToolConfig(), safe_box.sandbox)
        await shared.close()
        return (await safe_box.sandbox.run("1")).text()

    assert asyncio.run(main()) == "1"


def test_tools_satisfy_the_protocol(toolbox) -> None:
    def check(tool: Tool) -> str:
        return tool.schema["function"]["name"]

    assert [check(tool) for tool, _ in toolbox._tools.values()] == list(toolbox.names)
