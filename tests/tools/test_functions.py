"""Python functions as tools: what the model sees of results, faults and time limits."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from elpo_fast.config import ConfigError, ToolConfig, dump_config, parse_config
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import RunError, Task, ToolCall, ToolResult

MODULE = """
import asyncio, os, subprocess, sys, time

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

def regex(text):
    return text

def ends(status):
    os._exit(status)

def leaves(status):
    sys.exit(status)

def process():
    return os.getpid()

def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value

def lone():
    return chr(0xD83D)

class Silent(Exception):
    def __str__(self):
        raise ValueError

def silent():
    raise Silent

def child(seconds):
    return subprocess.run(["sleep", str(seconds)])

def strange(kind):
    return {"set": {1}, "long": "x" * 10**6, "none": None}[kind]

def divisible(x):
    return x

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
    # Twice as long for every further letter before something else.
    "my_tools:regex": schema("regex", text={"type": "string", "pattern": "^(([a-z])+.)+[A-Z]$"}),
    "my_tools:ends": schema("ends", status=NUMBER),
    "my_tools:leaves": schema("leaves", status=NUMBER),
    "my_tools:process": schema("process"),
    "my_tools:nested": schema("nested", depth=NUMBER),
    "my_tools:lone": schema("lone"),
    "my_tools:silent": schema("silent"),
    "my_tools:child": schema("child", seconds=NUMBER),
    "my_tools:divisible": schema("divisible", x={"type": "number", "multipleOf": 0.1}),
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "my_tools.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def toolbox(functions: dict[str, Any] = FUNCTIONS, **options: Any) -> Toolbox:
        config = ToolConfig(functions=functions, **{"names": [], "timeout_s": 30.0, **options})
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
        ("leaves", {"status": 3}, "SystemExit: 3"),
        ("ends", {"status": 3}, "the function's process ended (exit status 3) before it answered"),
        ("silent", {}, "Silent: (its message could not be shown: ValueError)"),
        ("divisible", {"x": 10**400}, "OverflowError: int too large to convert to float"),
    ],
)
def test_exceptions_become_one_line(make, name, arguments, content) -> None:
    result = execute(make(), name, **arguments)
    assert (result.content, result.error) == (content, True)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("slow", {"seconds": 600}),
        ("slow_async", {"seconds": 600}),
        ("child", {"seconds": 600}),
        ("regex", {"text": "a" * 60}),
    ],
)
def test_slow_functions_and_patterns_are_killed(make, descendants, name: str, arguments) -> None:
    before = descendants()
    result = execute(make(timeout_s=0.3), name, **arguments)
    assert (result.content, result.error) == ("timed out after 0.3 s", True)
    assert descendants() == before


def test_the_event_loop_never_waits_for_a_function_or_its_schema(make) -> None:
    toolbox = make(timeout_s=2.0)

    async def main() -> tuple[list[ToolResult], int]:
        state = await toolbox.open(Task("t", (), "test"))
        calls = [ToolCall("regex", {"text": "a" * 60}), ToolCall("slow", {"seconds": 600})]
        work = asyncio.gather(*(toolbox.execute(state, call) for call in calls))
        turns = 0
        while not work.done():
            await asyncio.sleep(0.01)
            turns += 1
        await toolbox.close()
        return await work, turns

    results, turns = asyncio.run(main())
    assert [result.content for result in results] == ["timed out after 2 s"] * 2
    assert turns > 20  # 200 on a machine with nothing else to do


def test_time_limits_leave_no_thread_and_no_process(make, descendants) -> None:
    before = descendants()
    toolbox = make(timeout_s=0.05, function_workers=3)

    async def main() -> tuple[list[ToolResult], int, int]:
        state = await toolbox.open(Task("t", (), "test"))
        slow = ToolCall("slow", {"seconds": 600})
        results = await asyncio.gather(*(toolbox.execute(state, slow) for _ in range(12)))
        named = [thread.name for thread in threading.enumerate()]
        threads = sum(name.startswith("elpo-function") for name in named)
        processes = len(descendants() - before)
        await toolbox.close()
        return results, threads, processes

    results, threads, processes = asyncio.run(main())
    assert {result.content for result in results} == {"timed out after 0.05 s"}
    assert threads <= 3 and processes <= 3
    assert descendants() == before
    assert not any(thread.name.startswith("elpo-function") for thread in threading.enumerate())


def test_processes_stay_and_one_that_was_killed_meanwhile_is_replaced(make) -> None:
    toolbox = make(timeout_s=30.0)

    async def main() -> list[int]:
        state = await toolbox.open(Task("t", (), "test"))

        async def answer() -> int:
            return int((await toolbox.execute(state, ToolCall("process", {}))).content)

        first, second = await answer(), await answer()
        os.kill(second, signal.SIGKILL)
        await asyncio.sleep(0.1)
        third = await answer()
        await toolbox.close()
        return [first, second, third]

    first, second, third = asyncio.run(main())
    assert first == second != third != os.getpid()


def test_strange_results_are_valid_text(make) -> None:
    assert execute(make(), "lone").content == "\\ud83d"
    deep = execute(make(), "nested", depth=100_000)
    assert deep.error and deep.content.startswith("RecursionError: ")


def test_what_cannot_be_imported_there_stops_the_run(make, tmp_path: Path) -> None:
    here = f"import os\nif os.getpid() != {os.getpid()}: raise ImportError\nf = print\n"
    (tmp_path / "only_here.py").write_text(here)
    toolbox = make({"only_here:f": schema("f")})
    with pytest.raises(RunError, match="ended while it imported only_here:f; what it said"):
        execute(toolbox, "f")
    asyncio.run(toolbox.close())


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
        ({"my_tools:nothing": schema("f")}, "my_tools has no 'nothing'"),
        ({"my_tools": schema("f")}, "not of the form module:attribute"),
        ({"my_tools:number": schema("f")}, "my_tools:number is a int; name a function"),
        ({"my_tools:weather": "/nowhere.json"}, "cannot read the schema in /nowhere.json"),
        (
            {"my_tools:weather": {"name": "f"}},
            "not an OpenAI function schema: 'type' is a required",
        ),
        ({"my_tools:weather": BAD_PARAMETERS}, "its parameters are no JSON schema: 'strnig'"),
        ({"my_tools:weather": schema("f"), "my_tools:slow": schema("f")}, "f is there twice"),
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
