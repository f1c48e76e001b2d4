"""`code_interpreter` on a sandbox elsewhere, over HTTP in SandboxFusion's API (`POST /run_code`).

What is sent is a program of ours: the source of `_cell.py`, which runs the model's code as the
local sandbox does, and prints the outcome as its last line. So results look the same here and
there; what protects whom from what, and how much memory there is, is the service's affair.

A service that cannot be reached, or answers that it failed, is asked again after a pause. If a
harmless program then fails as well the service is down and the run stops with `RunError`: to tell
the model that its code was at fault would train it on noise. If not, the code was.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

import httpx

from elpo_fast.tools import _cell
from elpo_fast.tools._records import cut
from elpo_fast.tools.sandbox import Execution, death_in_words, read_outcome
from elpo_fast.types import RunError

PAUSES_S = (0.5, 2.0, 8.0)  # between attempts
_GRACE_S = 1.0  # from the program's own timer to the service's
_QUEUE_S = 60.0  # that a busy service may let us wait beyond the time limit
_FLOOD_CAP = 64 << 20  # bytes of an answer that are read

_SOURCE = inspect.getsource(_cell)
_DRIVER = """
import os, types
main = types.ModuleType("__main__")
sys.modules["__main__"] = main
outcome = run_code({code!r}, 1, main.__dict__, {timeout_s!r})
os.write(1, ({mark!r} + json.dumps(outcome)).encode())
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class _Result:
    """How the service says that a program ended; or our own word for it."""

    status: str
    stdout: str = ""
    stderr: str = ""
    return_code: int = 0


class RemoteSandbox:
    """Runs code at `url`, at most `workers` programs at once. For one event loop."""

    def __init__(self, url: str, *, timeout_s: float, workers: int) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s + _GRACE_S + _QUEUE_S, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=workers),
        )

    async def run(self, code: str) -> Execution:
        """Execute `code` in a fresh process there. `RunError` where the service does not work."""
        started = time.monotonic()
        mark = f"\n--- {secrets.token_hex(16)} "
        driver = _DRIVER.format(code=code, timeout_s=self.timeout_s, mark=mark)
        try:
            result = await self._ask(_SOURCE + driver, PAUSES_S)
        except _FailedError as failure:
            try:
                await self._ask("pass", ())
            except _FailedError:
                raise RunError(
                    f"the sandbox at {self.url} does not work: {failure}; start it, or remove "
                    "tools.remote_url to run code here"
                ) from None
            result = _Result("Refused")
        return self._execution(result, mark, time.monotonic() - started)

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask(self, program: str, pauses: tuple[float, ...]) -> _Result:
        """The service's result. `_FailedError` where there is none after all attempts."""
        request = {
            "code": program,
            "language": "python",
            "run_timeout": self.timeout_s + _GRACE_S,
        }
        for pause in (*pauses, None):
            try:
                body = await self._post(request)
                return _Result("Flood") if body is None else _read(body)
            except _FailedError as failure:
                problem = str(failure)
            except httpx.HTTPStatusError as error:
                problem = f"it answers with HTTP status {error.response.status_code}"
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__} {error}".strip()
            if pause is None:
                raise _FailedError(problem)
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _post(self, request: dict[str, Any]) -> bytes | None:
        """The answer's body, `None` if it is endless."""
        body = bytearray()
        async with self._client.stream("POST", f"{self.url}/run_code", json=request) as response:
            response.raise_for_status()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > _FLOOD_CAP:
                    return None
        return bytes(body)

    def _execution(self, result: _Result, mark: str, seconds: float) -> Execution:
        value = error = None
        finished = False
        stdout, found, payload = result.stdout.rpartition(mark)
        if found:
            value, error, finished = read_outcome(payload, self.timeout_s)
        else:
            stdout = payload
            match result.status:
                case "TimeLimitExceeded":
                    error = f"timed out after {self.timeout_s:g} s"
                case "Flood":
                    error = "stopped: too much output"
                case "Refused":
                    error = "the sandbox could not run this code"
                case _:
                    code = result.return_code
                    error = death_in_words(code - 128 if code > 128 else -code)  # a shell adds 128
        return Execution(_capped(stdout), _capped(result.stderr), value, error, finished, seconds)


def _read(body: bytes) -> _Result:
    """The result in an answer. `_FailedError` where it has none, or one of another form."""
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        reply = None
    match reply:
        case {"status": "SandboxError"}:
            raise _FailedError(f"it says {_cell.shorten(str(reply.get('message')), 200)!r}")
        case {"status": str(), "run_result": {"status": str() as status, **rest}}:
            out, err, code = (rest.get(name) for name in ("stdout", "stderr", "return_code"))
            match out or "", err or "", code or 0:
                case str() as stdout, str() as stderr, int() as number:
                    return _Result(status, stdout, stderr, number)
    raise _FailedError("its answer is not one of SandboxFusion's")


def _capped(text: str) -> str:
    return cut(text.encode("utf-8", "replace")).decode("utf-8", "replace")


class _FailedError(Exception):
    """The service gave no result; the message says how."""
