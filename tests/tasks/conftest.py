"""A plain stand-in for the sandbox: one subprocess a call, killed at its time limit."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from elpo_fast.tools.sandbox import Sandbox

_CHILD = """
import importlib, json, sys
module, _, name = sys.argv[1].partition(":")
result = getattr(importlib.import_module(module), name)(json.load(sys.stdin))
sys.stdout.write("\\n" + json.dumps(result))
"""


async def run_in_subprocess(function: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _CHILD, function),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        talk = child.communicate(json.dumps(payload).encode())
        out, err = await asyncio.wait_for(talk, timeout_s)
    except TimeoutError:
        child.kill()
        await child.wait()
        raise RuntimeError(f"timed out after {timeout_s:g} s") from None
    if child.returncode:
        raise RuntimeError(err.decode().strip().rpartition("\n")[2] or f"exit {child.returncode}")
    return json.loads(out.decode().rpartition("\n")[2])


@pytest.fixture(scope="session")
def run_function() -> Callable[..., Any]:
    """See `elpo_fast.tasks.common.RunFunction`."""
    return run_in_subprocess


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """The real one, for what only it can show."""
    box = Sandbox(memory_mb=256)
    try:
        asyncio.run(box.start())
    except RuntimeError as problem:
        pytest.skip(str(problem))
    yield box
    asyncio.run(box.close())
