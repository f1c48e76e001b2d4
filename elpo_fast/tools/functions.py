"""Any Python function as a tool, declared by an OpenAI function schema.

Functions are the user's own and trusted: their processes have the rights, the environment and the
working directory of this one, and are apart so that a call can be ended. There are as many as there
were calls at once, at most `workers`, each with all functions imported and an event loop for
coroutine functions; which of them answers a call is open. A call is checked against its schema
there, because a pattern can take for ever. What the model chooses are the arguments alone. A
returned text is shown as it is, anything else as JSON; an exception becomes its type and message. A
process that takes longer than the time limit is killed with all that it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import jsonschema

from elpo_fast import own
from elpo_fast.config import ConfigError
from elpo_fast.tools import _arguments, _worker
from elpo_fast.tools._link import signal_name
from elpo_fast.types import RunError, Tool, ToolResult

START_S = 120  # until a process has imported the functions' modules
_REPLY_CAP = 1 << 20  # bytes

_BOOT = """
import json, sys
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv.pop()))
sys.path[:], functions = json.loads(pipe.recv_bytes())
from elpo_fast.tools._worker import serve
serve(pipe, functions)
"""


class Functions:
    """The tools made of functions, and the processes that they run in."""

    def __init__(
        self,
        functions: Sequence[tuple[str, Mapping[str, Any]]],
        *,
        workers: int,
        timeout_s: float,
        key: str = "tools.functions",
    ) -> None:
        """`functions`: "module:function" and schema of each. `key`: of the configuration, where
        they stand."""
        self._workers, self._timeout_s, self._key = workers, timeout_s, key
        self._functions = list(functions)
        # Threads wait for the replies. They live as long as we do: a process ends with the one that
        # started it.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="elpo-function")
        self._lock = threading.Lock()
        self._processes: set[_Process] = set()
        self._idle: list[_Process] = []
        self._closed = False

    @property
    def tools(self) -> list[FunctionTool]:
        return [FunctionTool(self, n, schema) for n, (_, schema) in enumerate(self._functions)]

    async def call(self, number: int, arguments: Mapping[str, Any]) -> _worker.Reply:
        """The reply of function `number`. `RunError` where the functions cannot be imported."""
        request = json.dumps([number, arguments]).encode()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._call, request)

    async def close(self) -> None:
        """End every process; none is left when this returns."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.bury()

    def _call(self, request: bytes) -> _worker.Reply:
        for _ in range(self._workers + 1):  # all that are idle may have been killed
            process = self._process()
            try:
                process.pipe.send_bytes(request)
                break
            except OSError:  # it ended since the last call
                self._end(process)
        else:
            raise RunError(
                f"the processes of {self._key} end while they have nothing to do; look for what "
                "kills them (too little memory?), then go on with --resume"
            )
        try:
            reply = process.receive(self._timeout_s)
        except OSError:
            how = self._end(process)
            text = f"the function's process ended ({how}) before it answered"
        except ValueError:
            self._end(process)
            text = "the function's answer could not be read"
        else:
            if reply is not None:
                with self._lock:
                    self._idle.append(process)
                return reply
            self._end(process)
            text = f"timed out after {self._timeout_s:g} s"
        return {"text": text, "error": True, "refused": False}

    def _process(self) -> _Process:
        """An idle one, or a new one that has imported the functions."""
        with self._lock:
            if self._closed:
                raise RuntimeError("these functions are closed; make a new toolbox")
            if self._idle:
                return self._idle.pop()
            process = _Process()
            self._processes.add(process)
        names = ", ".join(target for target, _ in self._functions)
        try:
            process.pipe.send_bytes(json.dumps([sys.path, self._functions]).encode())
            ready = process.pipe.poll(START_S) and process.pipe.recv_bytes(_REPLY_CAP)
            problem = "" if ready else f"took longer than {START_S} s to import"
        except (EOFError, OSError):
            problem = "ended while it imported"
        if problem:
            self._end(process)
            raise RunError(f"{self._key}: a process {problem} {names}; what it said is above")
        return process

    def _end(self, process: _Process) -> str:
        """Kill it; how it ended."""
        with self._lock:
            process.kill()
            self._processes.discard(process)
        return process.bury()


class FunctionTool(Tool):
    """One function. Stateless: its state is `None`."""

    def __init__(self, functions: Functions, number: int, schema: Mapping[str, Any]) -> None:
        self.schema = schema
        self._functions, self._number = functions, number

    async def call(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult:
        started = time.monotonic()
        reply = await self._functions.call(self._number, arguments)
        text = str(reply["text"])
        if reply["refused"]:
            text = _arguments.expected(text, self.schema)
        return ToolResult(text, None, bool(reply["error"]), time.monotonic() - started)


class _Process:
    """A process and our end of its pipe. Not killed any more once it is buried: its number may be
    another's then."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def receive(self, seconds: float) -> _worker.Reply | None:
        """The next reply, `None` if it does not come in time. `OSError` (`EOFError`) when the
        process has ended, `ValueError` for what is no reply."""
        if not self.pipe.poll(seconds):
            return None
        try:
            reply = json.loads(self.pipe.recv_bytes(_REPLY_CAP))
        except EOFError:
            raise ConnectionError("the process ended") from None
        except RecursionError:
            reply = None
        match reply:
            case {"text": str(), "error": bool(), "refused": bool()}:
                return dict(reply)
        raise ValueError("not a reply")

    def kill(self) -> None:
        """With all that it started in its session's first process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def bury(self) -> str:
        """Wait for its end; how it was."""
        code = self._process.wait()
        self.pipe.close()
        return f"exit status {code}" if code >= 0 else signal_name(-code)


def declared(
    functions: Mapping[str, Mapping[str, Any] | str],
) -> list[tuple[str, Mapping[str, Any]]]:
    """Functions with their schemas: by "module:function" `{"type": "function", "function": {...}}`
    or the path of a JSON file with it. `ConfigError` for what cannot be used."""
    found = []
    for target, schema in functions.items():
        place = f"tools.functions: {target}"
        schema = checked_schema(_read(schema, place) if isinstance(schema, str) else schema, place)
        own.find("functions", target, "tools.functions")
        found.append((target, schema))
    return found


def _read(path: str, place: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{place}: cannot read the schema in {path}: {problem}") from None


def checked_schema(schema: Any, place: str) -> Mapping[str, Any]:
    """`ConfigError` for what is no OpenAI function schema."""
    try:
        jsonschema.validate(schema, _OPENAI_FUNCTION)
        jsonschema.Draft202012Validator.check_schema(schema["function"]["parameters"])
    except jsonschema.ValidationError as problem:
        raise ConfigError(f"{place}: not an OpenAI function schema: {problem.message}") from None
    except jsonschema.SchemaError as problem:
        raise ConfigError(
            f"{place}: its parameters are no JSON schema: {problem.message}"
        ) from None
    return schema


_OPENAI_FUNCTION = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name", "description", "parameters"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                "description": {"type": "string"},
                "parameters": {
                    "type": "object",
                    "required": ["type", "properties"],
                    "properties": {"type": {"const": "object"}},
                },
            },
        },
    },
}
