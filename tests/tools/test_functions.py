"""Python functions as tools: what the model sees of results, faults and time limits."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from elpo_fast.config import ConfigError, ToolConfig, dump_config, parse_config
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import Task, ToolCall, ToolResult

MODULE = """
import asyncio, time

CITIES = {"Paris": 11, "Rome": 17}

def weather(city, unit="C"):
    return {"city": city, "degrees": CITIES[city], "unit": unit}

async def search(query, limit=1):
    await asyncio.sleep(0)
    return f"{limit} results for {query}"

def slow(seconds):
    time.sleep(seconds)

async def slow_async(seconds):
    await asyncio.sleep(seconds)

def late(text):
    raise TimeoutError(text)

def strange(kind):
    return {"set": {1}, "long": "x" * 10**6, "none": None}[kind]

number = 3
"""


def schema(name: str, required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }
    function = {"name": name, "description": f"About {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


TEXT, NUMBER = {"type": "string"}, {"type": "number", "minimum": 0}
UNIT = {"type": "string", "enum": ["C", "F"]}
FUNCTIONS: dict[str, Any] = {
    "my_tools:weather": schema("weather", ["city"], city=TEXT, unit=UNIT),
    "my_tools:search": schema("search", ["query"], query=TEXT, limit={"type": "integer"}),
    "my_tools:slow": schema("slow", seconds=NUMBER),
    "my_tools:slow_async": schema("slow_async", seconds=NUMBER),
    "my_tools:late": schema("late", text=TEXT),
    "my_tools:strange": schema("strange", kind=TEXT),
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "my_tools.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def toolbox(functions: dict[str, Any] = FUNCTIONS, **options: Any) -> Toolbox:
        config = ToolConfig(functions=functions, **{"names": [], "timeout_s": 0.3, **options})
        return Toolbox(config)

    return toolbox


def execute(toolbox: Toolbox, name: str, **arguments: Any) -> ToolResult:
    async def main() -> ToolResult:
        state = await toolbox.open(Task("t", (), "test"))
        result = await toolbox.execute(state, ToolCall(name, arguments))
        assert result.state == state
        await toolbox.close()
        return result

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "arguments", "content"),
    [
        ("weather", {"city": "Rome"}, '{"city": "Rome", "degrees": 17, "unit": "C"}'),
        (
            "weather",
            {"city": "Paris", "unit": "F"},
            '{"city": "Paris", "degrees": 11, "unit": "F"}',
        ),
        ("search", {"query": "trees", "limit": 2}, "2 results for trees"),
        ("strange", {"kind": "none"}, "null"),
    ],
)
def test_functions_and_coroutines_answer(make, name, arguments, content) -> None:
    result = execute(make(), name, **arguments)
    assert (result.content, result.error) == (content, False)


@pytest.mark.parametrize(
    ("name", "arguments", "content"),
    [
        ("weather", {"city": "Oslo"}, "KeyError: 'Oslo'"),
        ("late", {"text": "the server is slow"}, "TimeoutError: the server is slow"),
        ("strange", {"kind": "set"}, "TypeError: Object of type set is not JSON serializable"),
    ],
)
def test_exceptions_become_one_line(make, name, arguments, content) -> None:
    result = execute(make(), name, **arguments)
    assert (result.content, result.error) == (content, True)


@pytest.mark.parametrize("name", ["slow", "slow_async"])
def test_slow_functions_are_answered_in_time_and_delay_nobody(make, name: str) -> None:
    started = time.monotonic()
    result = execute(make(), name, seconds=3)
    assert (result.content, result.error) == ("timed out after 0.3 s", True)
    assert time.monotonic() - started < 2


def test_long_results_are_cut(make) -> None:
    assert len(execute(make(), "strange", kind="long").content) < 60_000


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "arguments: 'city' is a required property"),
        ({"city": 3}, "arguments['city']: 3 is not of type 'string'"),
        ({"city": "Rome", "unit": "K"}, "arguments['unit']: 'K' is not one of ['C', 'F']"),
        (
            {"city": "Rome", "day": 1},
            "arguments: Additional properties are not allowed ('day' was unexpected)",
        ),
    ],
)
def test_wrong_arguments_are_answered_with_the_schema(make, arguments, problem: str) -> None:
    result = execute(make(), "weather", **arguments)
    said, _, shown = result.content.partition("; expected:\n")
    assert (said, result.error) == (problem, True)
    assert json.loads(shown) == FUNCTIONS["my_tools:weather"]["function"]


def test_schema_may_be_a_file(make, tmp_path) -> None:
    path = tmp_path / "weather.json"
    path.write_text(json.dumps(FUNCTIONS["my_tools:weather"]))
    toolbox = make({"my_tools:weather": str(path)})
    assert toolbox.schemas == [FUNCTIONS["my_tools:weather"]]


def test_python_tools_and_functions_stand_side_by_side(make, safe_box) -> None:
    config = ToolConfig(names=["python_session"], functions=FUNCTIONS)

    async def main() -> list[str]:
        toolbox = Toolbox(config, safe_box.sandbox)
        state = await toolbox.open(Task("t", (), "test", setup="x = 1"))
        contents = []
        for call in (
            ToolCall("python_session", {"code": "x += 1"}),
            ToolCall("search", {"query": "q"}),
            ToolCall("python_session", {"code": "x"}),
        ):
            result = await toolbox.execute(state, call)
            state = result.state
            contents.append(result.content)
        await toolbox.release([state])
        await toolbox.close()
        return contents

    assert asyncio.run(main()) == ["(no output)", "1 results for q", "2"]


BAD_PARAMETERS = schema("f", x={"type": "strnig"})


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"no_such_module:f": schema("f")}, "No module named 'no_such_module'"),
        ({"my_tools:nothing": schema("f")}, "has no attribute 'nothing'"),
        ({"my_tools": schema("f")}, "module:function"),
        ({"my_tools:number": schema("f")}, "my_tools:number is a int, not a function"),
        ({"my_tools:weather": "/nowhere.json"}, "cannot read the schema in /nowhere.json"),
        (
            {"my_tools:weather": {"name": "f"}},
            "not an OpenAI function schema: 'type' is a required",
        ),
        ({"my_tools:weather": BAD_PARAMETERS}, "its parameters are no JSON schema: 'strnig'"),
        ({"my_tools:weather": schema("f"), "my_tools:slow": schema("f")}, "not f, f"),
    ],
)
def test_unusable_functions_are_refused_at_once(make, functions, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(functions)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_functions_survive_the_configuration_file() -> None:
    import yaml

    config = parse_config({"tools": {"functions": FUNCTIONS}})
    assert parse_config(yaml.safe_load(dump_config(config))).tools.functions == FUNCTIONS
