"""One SGLang server as it is seen over HTTP: requests, and whether anybody is there to answer.

Invariant: no request waits for a server that is dead or hangs. While one runs, the process (if it
is ours) is watched and the server is asked for its health; when either fails, every request on it
ends with `ServerFault` at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from elpo_fast.config import SGLangConfig
from elpo_fast.rollout.sglang.process import ServerProcess
from elpo_fast.rollout.sglang.stems import Stems
from elpo_fast.types import RunError

_HEALTH_PERIOD_S = 5.0
_CONTROL_TIMEOUT_S = 120.0  # flushes, weight updates and the like


class ServerFault(Exception):
    """The server is dead, hangs or misbehaves; what it was asked may be asked again."""


class SGLangServer:
    """A server at `url`, or the one that `process` starts."""

    def __init__(self, config: SGLangConfig, where: str | ServerProcess) -> None:
        self.process = where if isinstance(where, ServerProcess) else None
        self.url = "" if isinstance(where, ServerProcess) else where.rstrip("/")
        self.up = False
        self.lock = asyncio.Lock()  # held while it is started or given weights
        self.version: int | None = None  # of the weights it holds; None: unknown ones
        self.load = 0  # requests sent there and not yet answered
        self.room = self.tp_size = 0
        self.shares = True  # whether it keeps a prefix cache
        self.stems = Stems()
        self._config = config
        self._http: aiohttp.ClientSession | None = None
        self._fault: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def name(self) -> str:
        return "our SGLang server" if self.process else f"the SGLang server at {self.url}"

    async def open(self, http: aiohttp.ClientSession, version: int) -> None:
        """Start it, if it is ours, on weights called `version`, wait until it is well, and learn
        its limits. Raises `RunError` when that does not happen in time, `ServerFault` when it has
        started before and now ends."""
        self._http = http
        if self.process:
            await asyncio.to_thread(self.process.stop)
            self.url = self.process.start(version)
        deadline = time.monotonic() + self._config.start_timeout_s
        while not await self.well():
            ended = self.process and not self.process.alive
            if ended or time.monotonic() > deadline:
                how = "ended" if ended else f"did not answer in {self._config.start_timeout_s:g} s"
                what = f"{self.name} {how} while starting{self._remedy()}{self._log()}"
                # One that has started before was killed perhaps, and may start again.
                raise ServerFault(what) if ended and self._fault else RunError(what)
            await asyncio.sleep(0.2)
        info = await self._exchange("GET", "/server_info", None, _CONTROL_TIMEOUT_S)
        self.room, self.tp_size = info["max_req_input_len"], info["tp_size"]
        self.shares = not info["disable_radix_cache"]
        self.version = version if self.process else None
        self.stems = Stems()
        self._fault = asyncio.get_running_loop().create_future()
        self.up = True
        self._spawn(self._watch(self._fault))

    async def close(self) -> None:
        """Fail what still runs there and, if it is ours, end it."""
        self.fail("was closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.process:
            await asyncio.to_thread(self.process.stop)

    def fail(self, what: str) -> ServerFault:
        """Nobody is there any more: every request on it ends with this fault."""
        fault = ServerFault(f"{self.name} {what}{self._log()}")
        self.up = False
        if self._fault is not None and not self._fault.done():
            self._fault.set_exception(fault)
            self._fault.exception()  # retrieved: nobody needs to have waited for it
        return fault

    async def well(self) -> bool:
        """Whether it answers its health check, which generates a token unless others do."""
        try:
            await self._exchange("GET", "/health", None, self._config.health_timeout_s)
        except ServerFault:
            return False
        return True

    async def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], **options: Any
    ) -> list[dict[str, Any]]:
        """SGLang's answers, one a prompt. Cancelled, they are aborted on the server too."""
        rids = [uuid.uuid4().hex for _ in prompts]
        body = {"rid": rids, "input_ids": prompts, "sampling_params": sampling, **options}
        try:
            answers = await self.post("/generate", body, timeout=self._config.request_timeout_s)
        except asyncio.CancelledError:
            if self.up:
                self._spawn(self._abort(rids))
            raise
        for answer in answers:
            if answer["meta_info"]["finish_reason"]["type"] == "abort":
                raise ServerFault(f"{self.name} gave up a request: {answer['meta_info']}")
        return answers

    async def control(self, path: str, **body: Any) -> None:
        """A change of the server's state; `RunError` where it refuses."""
        answer = await self.post(path, body, timeout=_CONTROL_TIMEOUT_S)
        if isinstance(answer, dict) and not answer.get("success", True):
            raise RunError(f"{self.name} refused {path}: {answer.get('message')}")

    async def post(self, path: str, body: Mapping[str, Any], *, timeout: float) -> Any:
        """The answer to one request, unless the server is found dead before it comes."""
        assert self._fault is not None
        call = asyncio.create_task(self._exchange("POST", path, body, timeout))
        try:
            await asyncio.wait({call, self._fault}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                self._fault.result()  # raises
            return call.result()
        except ServerFault as fault:
            raise self.fail(str(fault)) if self.up else fault from None
        finally:
            call.cancel()

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float
    ) -> Any:
        assert self._http is not None
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self._http.request(
                method, self.url + path, json=body, timeout=limit
            ) as response:
                if response.content_type == "application/json":
                    answer = await response.json()
                else:
                    answer = await response.text()
        except TimeoutError:
            raise ServerFault(f"did not answer {path} within {timeout:g} s") from None
        except aiohttp.ClientError as error:
            raise ServerFault(f"broke off {path} ({type(error).__name__}: {error})") from None
        if response.status >= 500:
            raise ServerFault(f"answered {path} with status {response.status}: {answer}")
        if response.status >= 400:
            raise RunError(f"{self.name} refused {path}: {answer}")
        return answer

    async def _watch(self, fault: asyncio.Future[None]) -> None:
        """Fail when the process has ended or the server is not well; idle servers are not asked."""
        asked = time.monotonic()
        while not fault.done():
            await asyncio.sleep(0.2)
            if self.process and not self.process.alive:
                self.fail("has ended")
            elif self.load and time.monotonic() - asked > _HEALTH_PERIOD_S:
                if not await self.well():
                    self.fail(f"was not well for {self._config.health_timeout_s:g} s")
                asked = time.monotonic()

    async def _abort(self, rids: Sequence[str]) -> None:
        with contextlib.suppress(ServerFault):
            for rid in rids:
                await self._exchange("POST", "/abort_request", {"rid": rid}, _CONTROL_TIMEOUT_S)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _remedy(self) -> str:
        hint = self.process and self.process.remedy()
        return f": {hint}" if hint else ""

    def _log(self) -> str:
        return f"; its log {self.process.log} ends:\n{self.process.tail()}" if self.process else ""
