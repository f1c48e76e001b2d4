"""Calls to the toolbox, right and wrong: nothing a model writes raises."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from elpo_fast.config import ToolConfig
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import MalformedCall, Task, Tool, ToolCall, ToolResult

SIGNATURE = "python_session(code: string)"


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


@pytest.mark.parametrize(
    ("call", "content"),
    [
        (
            python("1", "pyhton"),
            f"unknown tool 'pyhton'; known tools: {SIGNATURE}, code_interpreter(code: string)",
        ),
        (ToolCall("python_session", {}), f"missing argument 'code'; expected {SIGNATURE}"),
        (
            ToolCall("python_session", {"code": "1", "timeout": 3}),
            f"unknown argument 'timeout'; expected {SIGNATURE}",
        ),
        (python(3), f"argument 'code' is a int; expected {SIGNATURE}"),
        (python(None), f"argument 'code' is a NoneType; expected {SIGNATURE}"),
        (python(["x"]), f"argument 'code' is a list; expected {SIGNATURE}"),
        (MalformedCall("the call is not valid JSON"), "the call is not valid JSON"),
    ],
)
def test_wrong_calls_are_explained_and_change_nothing(toolbox, call, content: str) -> None:
    first, wrong, after = execute(toolbox, python("x += 1; x"), call, python("x"))
    assert (wrong.content, wrong.error) == (content, True)
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
        return tool.name

    assert [check(tool) for tool in toolbox._tools.values()] == list(toolbox.names)
