"""Tools of servers of the Model Context Protocol: answers, branches, and servers that misbehave."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from elpo_fast.config import ConfigError, ToolConfig
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import RunError, Task, ToolCall, ToolResult

TASK = Task("t", (), "test")
# By hand: what the SDK's server imports takes longer than all that is tested here.
SERVER = """
import json, os, random, sys, time

seen = []

def add(first, second):
    "Adds two numbers."
    return first + second

def note(text):
    "Keeps a note; all of them so far."
    seen.append(text)
    return " ".join(seen)

def count():
    "How many notes there are."
    return len(seen)

def dice():
    "A number that nobody knows."
    return random.random()

def fail():
    "Raises."
    raise ValueError("nothing works, fail")

def wait():
    "Takes long."
    time.sleep(60)

def die():
    "Ends the server, once where there is no file."
    if not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os._exit(1)
    return "alive"

def always_die():
    "Ends the server."
    os._exit(1)

KINDS = {add: "integer", note: "string"}
TOOLS = {tool.__name__: tool for tool in (add, note, count, dice, fail, wait, die, always_die)}

def described(tool):
    names = tool.__code__.co_varnames[: tool.__code__.co_argcount]
    properties = {name: {"type": KINDS[tool]} for name in names}
    schema = {"type": "object", "properties": properties, "required": list(names)}
    return {"name": tool.__name__, "description": tool.__doc__, "inputSchema": schema}

def answer(method, params):
    if method == "initialize":
        about = {"name": "test", "version": "1"}
        version = params["protocolVersion"]
        return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}
    if method == "tools/list":
        return {"tools": [described(tool) for tool in TOOLS.values()]}
    assert method == "tools/call"
    try:
        text, error = str(TOOLS[params["name"]](**params["arguments"])), False
    except Exception as problem:
        text, error = str(problem), True
    return {"content": [{"type": "text", "text": text}], "isError": error}

for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    reply = {"jsonrpc": "2.0", "id": asked["id"]}
    if asked["method"] in ("initialize", "tools/list", "tools/call"):
        reply["result"] = answer(asked["method"], asked.get("params") or {})
    else:
        reply["error"] = {"code": -32601, "message": "there is no " + asked["method"]}
    print(json.dumps(reply), flush=True)
"""
OVER_HTTP = '''
import sys
from mcp.server.mcpserver import MCPServer

server = MCPServer("test")

@server.tool()
def add(first: int, second: int) -> int:
    """Adds two numbers."""
    return first + second

server.run("streamable-http", port=int(sys.argv[1]))
'''


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "server.py").write_text(SERVER)
    return [sys.executable, "-I", str(tmp_path / "server.py"), str(tmp_path / "died")]


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if "server.py" in " ".join(process.cmdline())]


def box_of(server: dict[str, Any], **tools: Any) -> Toolbox:
    return Toolbox(ToolConfig(names=[], mcp=[server], **tools))  # type: ignore[arg-type]


def calls(box: Toolbox, *wanted: tuple[str, dict[str, Any]]) -> list[ToolResult]:
    """One after another, from the state that the one before left."""

    async def main() -> list[ToolResult]:
        states, results = [await box.open(TASK)], []
        try:
            for name, arguments in wanted:
                results.append(await box.execute(states[-1], ToolCall(name, arguments)))
                states.append(results[-1].state)
            await box.release(states)
        finally:
            await box.close()
        return results

    return asyncio.run(main())


def test_tools_are_described_and_answer(command: list[str]) -> None:
    box = box_of({"command": command, "tools": ["add", "fail"]})
    assert box.names == ("add", "fail")
    function = box.schemas[0]["function"]
    assert function["description"] == "Adds two numbers."
    assert set(function["parameters"]["properties"]) == {"first", "second"}
    added, refused, failed, unknown = calls(
        box,
        ("add", {"first": 2, "second": 3}),
        ("add", {"first": "many"}),
        ("fail", {}),
        ("count", {}),
    )
    assert (added.content, added.error) == ("5", False) and added.seconds > 0
    assert refused.error and "second" in refused.content
    assert failed.error and "fail" in failed.content
    assert unknown.error and "unknown tool 'count'" in unknown.content


def test_a_stateless_server_has_one_session_for_all(command: list[str]) -> None:
    one, two = calls(box_of({"command": command}), ("note", {"text": "a"}), ("count", {}))
    assert (one.content, two.content) == ("a", "1")


def test_branches_of_a_stateful_server_do_not_see_each_other(command: list[str]) -> None:
    async def main() -> list[str]:
        box = box_of({"command": command, "stateful": True, "sessions": 2})
        root = await box.open(TASK)
        first = await box.execute(root, ToolCall("note", {"text": "a"}))

        async def branch(text: str) -> str:
            noted = await box.execute(first.state, ToolCall("note", {"text": text}))
            counted = await box.execute(noted.state, ToolCall("count", {}))
            await box.release([noted.state, counted.state])
            return f"{noted.content}: {counted.content}"

        found = await asyncio.gather(*map(branch, "bcde"))
        other = await box.execute(root, ToolCall("count", {}))
        await box.release([root, first.state, other.state])
        await box.close()
        return [*found, other.content]

    assert asyncio.run(main()) == ["a b: 2", "a c: 2", "a d: 2", "a e: 2", "0"]


def test_a_server_that_does_not_repeat_itself_cannot_branch(command: list[str]) -> None:
    async def main() -> None:
        box = box_of({"command": command, "stateful": True})
        rolled = await box.execute(await box.open(TASK), ToolCall("dice", {}))
        await box.execute(rolled.state, ToolCall("count", {}))
        try:
            await box.execute(rolled.state, ToolCall("count", {}))
        finally:
            await box.close()

    with pytest.raises(RuntimeError, match=r"a repeated call of dice otherwise.*planner=star"):
        asyncio.run(main())


@pytest.mark.parametrize("stateful", [False, True])
def test_a_call_that_takes_too_long_leaves_the_state(command: list[str], stateful: bool) -> None:
    box = box_of({"command": command, "stateful": stateful}, timeout_s=2.0)
    noted, waited, counted = calls(box, ("note", {"text": "a"}), ("wait", {}), ("count", {}))
    assert noted.content == "a"
    assert (waited.content, waited.error) == ("timed out after 2 s", True)
    if stateful:  # the other one still sleeps
        assert waited.state == noted.state and counted.content == "1"


@pytest.mark.parametrize("stateful", [False, True])
def test_a_server_that_dies_is_started_again_once(command: list[str], stateful: bool) -> None:
    server = {"command": command, "stateful": stateful}
    noted, alive = calls(box_of(server), ("note", {"text": "a"}), ("die", {}))
    assert (noted.content, alive.content) == ("a", "alive")
    with pytest.raises(RunError, match="does not answer"):
        calls(box_of(server), ("always_die", {}))


def test_a_server_over_http(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(OVER_HTTP)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, str(tmp_path / "server.py"), str(port)]) as process:
        try:
            patience = time.monotonic() + 60
            while time.monotonic() < patience:
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.1)
            box = box_of({"url": f"http://127.0.0.1:{port}/mcp"})
            (added,) = calls(box, ("add", {"first": 2, "second": 3}))
            assert added.content == "5"
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"command": [sys.executable, "-c", "pass"]}, "cannot be used"),
        ({"command": ["no-such-program"]}, "cannot be used"),
        ({"url": "http://127.0.0.1:9/mcp"}, "http://127.0.0.1:9/mcp cannot be used"),
        ({}, "either a command or a url"),
        ({"command": ["x"], "url": "http://y"}, "either a command or a url"),
    ],
)
def test_servers_that_cannot_be_had(server: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=said):
        box_of(server)


def test_tools_that_are_not_there(command: list[str]) -> None:
    with pytest.raises(ConfigError, match="has no tool fly; it has add, note"):
        box_of({"command": command, "tools": ["fly"]})
    twice = {"command": command, "tools": ["add"]}
    with pytest.raises(ConfigError, match="and add is there twice"):
        Toolbox(ToolConfig(names=[], mcp=[twice, twice]))  # type: ignore[list-item]
