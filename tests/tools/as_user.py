"""A sandbox in a process of its own, which another user can run: one line of JSON in, one out.

    python as_user.py ISOLATION

`plain` runs code as this user without any protection, `run` in the sandbox; `session` makes the
calls of `steps`, pairs of a parent's index (-1: the root) and code, one after the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

from elpo_fast.tools.interpreter import PythonSession
from elpo_fast.tools.sandbox import Sandbox
from elpo_fast.types import Task


async def answer(sandbox: Sandbox, request: dict[str, Any]) -> Any:
    match request["op"]:
        case "plain":
            command = [sys.executable, "-c", request["code"]]
            done = subprocess.run(command, capture_output=True, timeout=60, cwd=request["folder"])
            return done.stdout.decode("utf-8", "replace").strip()
        case "run":
            execution = await sandbox.run(request["code"], timeout_s=request["timeout_s"])
            return {name: getattr(execution, name) for name in execution.__slots__}
        case "session":
            session = PythonSession(sandbox)
            states = [await session.open(Task("t", (), "test"))]
            said = []
            for parent, code in request["steps"]:
                result = await session.call(states[parent + 1], {"code": code})
                states.append(result.state)
                said.append(result.content)
            await session.release(states)
            return said
        case "uid":
            return os.getuid()
    raise ValueError(request["op"])


async def main() -> None:
    sandbox = Sandbox(isolation=sys.argv[1], timeout_s=10.0, memory_mb=256)  # type: ignore[arg-type]
    try:
        print(json.dumps((await sandbox.start()).isolation), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await answer(sandbox, json.loads(line))), flush=True)
    except RuntimeError as problem:
        print(json.dumps(str(problem)), flush=True)
    await sandbox.close()


if __name__ == "__main__":
    asyncio.run(main())
