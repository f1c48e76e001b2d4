"""A pool of confined Python processes for code that nobody has read.

`Sandbox.run` executes code in a process of its own; `open_session`, `step` and `drop` keep
interpreters that branch; `call_function` runs one of our own functions (a grader that evaluates an
answer) out of process. All are coroutines, from any event loop, any number at once; `workers` of
them execute at the same time, the others wait in line.

What it promises stands in `docs/sandbox.md`, which system calls are refused in `_confine`. With
isolation `bubblewrap`, a fork server lives in a container made by bubblewrap, without network or
environment, under an unprivileged uid. Every call is one fork with namespaces, limits and a sized
/tmp of its own, so that nothing it patches reaches the next one, and its end takes along whatever
it started. With `landlock`, where namespaces are refused, Landlock gives read access to the same
paths and write access to a private folder, and the supervisor looks ten times a second at threads
and files. It leaves a gap (`LANDLOCK_GAP`) and so must be asked for by name, as must `none`, which
has the limits, the clock and the caps alone. `auto` is bubblewrap. A self-test inside must fail to
read, connect, fork, execute and write before a server is used. What may be imported and read is one
thing for graders, another for the model's programs (`_view`).

A limit to know. A function that executes what it judges shares its process with it: isolation keeps
that from everything else, not from forging the result. So the graders here execute nothing but
calculations (`tasks.calculation`), or report data that is judged outside (`tasks.unit_tests`); a
grader of your own should do one or the other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from elpo_fast.tools._link import (
    LANDLOCK_GAP,
    Link,
    NotStartedError,
    Reply,
    ServerGoneError,
    signal_name,
)
from elpo_fast.tools._records import Options
from elpo_fast.tools._view import graders, programs
from elpo_fast.types import RunError, valid_text

_log = logging.getLogger(__name__)

Isolation = Literal["auto", "bubblewrap", "landlock", "none"]
AUTO: tuple[str, ...] = ("bubblewrap",)
ATTEMPTS = 5  # processes can be killed from outside, for want of memory for example
CALLS_PER_SERVER = 8  # a server forks for so many workers; more workers, more servers

# What a server imports before its first fork. Every fork pays for all of it: scipy and networkx
# take a third off the calls a second, and so are in servers of their own, for code that names them.
_LIGHT = ("numpy.random", "elpo_fast.tools._warm")
_HEAVY = (*_LIGHT, "networkx", "scipy.stats", "scipy.signal")  # these two import most of scipy
_NEEDED = {  # packages; without them a server does without the import
    "numpy.random": "numpy",
    "elpo_fast.tools._warm": "sympy",
    "networkx": "networkx",
    "scipy.stats": "scipy",
    "scipy.signal": "scipy",
}
# Servers of model-written code; all others are graders'.
_PROGRAMS = (_LIGHT, _HEAVY, ("elpo_fast.tasks.code_verifier",))
_NAMES_HEAVY = re.compile(r"\b(scipy|networkx)\b")


class SandboxError(RuntimeError):
    """A function called in the sandbox failed, timed out or was killed."""


class SnapshotLostError(RuntimeError):
    """The snapshot's process is gone; nothing was executed."""


@dataclass(frozen=True, slots=True)
class Execution:
    """What became of one piece of code."""

    stdout: str
    stderr: str
    value: str | None  # repr of the last expression, None for statements and for None
    error: str | None  # short traceback, or a sentence for timeouts and kills
    finished: bool  # False: timed out, crashed or killed, whatever was done is lost
    seconds: float

    def text(self) -> str:
        """As the model reads it: what a notebook shows, in its order, `(no output)` for nothing."""
        out, err = self.stdout.rstrip("\n"), self.stderr.rstrip("\n")
        value = self.value if self.value is None or not (out or err) else f"Out: {self.value}"
        parts = (out, f"[stderr]\n{err}" if err else "", value or "", self.error or "")
        return "\n".join(part for part in parts if part) or "(no output)"


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """A waiting interpreter. Any number of steps may start from it."""

    link: Link
    number: int
    grown_mb: float = 0.0  # memory it takes beyond a fresh process, as its supervisor sees it


@dataclass(frozen=True, slots=True)
class Protection:
    """What holds here, for people."""

    isolation: str
    active: tuple[str, ...]
    why_not_better: tuple[str, ...]
    gaps: tuple[str, ...] = ()  # what was accepted

    def __str__(self) -> str:
        text = f"{self.isolation}: {', '.join((*self.active, *self.gaps))}"
        return text + "".join(f"; not {reason}" for reason in self.why_not_better)


_ACTIVE = {
    "bubblewrap": (
        "own user, pid, mount, network and IPC namespaces for every call",
        "read-only root with system libraries, Python and scientific packages only",
        "private /tmp of bounded size",
        "seccomp",
        "limits on memory, processes, files, CPU and wall clock",
    ),
    "landlock": (
        "Landlock: reads system libraries, Python and scientific packages only",
        "private folder of bounded size, the only place to write in",
        "seccomp: no sockets, no programs, no signals, nothing that changes other files",
        "limits on memory, processes, files, CPU and wall clock",
    ),
    "none": ("limits on memory, files, CPU and wall clock only: code can read, write and connect",),
}

_GAPS = {"landlock": (LANDLOCK_GAP,)}


class Sandbox:
    """See the module. `packages`: distributions that programs may import (`_view.PACKAGES`);
    `paths`: further folders in which functions find their modules, which programs do not see."""

    def __init__(
        self,
        *,
        isolation: Isolation = "auto",
        workers: int = 2,
        timeout_s: float = 5.0,
        memory_mb: int = 512,
        max_snapshots: int = 256,
        packages: Sequence[str] | None = None,
        paths: Sequence[str] = (),
    ) -> None:
        self.timeout_s, self.memory_mb, self.max_snapshots = timeout_s, memory_mb, max_snapshots
        self._isolations: tuple[str, ...] = AUTO if isolation == "auto" else (isolation,)
        self._servers = -(-workers // CALLS_PER_SERVER)
        self._workers = -(-workers // self._servers)
        self._programs = programs(None if packages is None else tuple(packages))
        self._graders = graders(paths)
        self._links: dict[tuple[tuple[str, ...], int], Link] = {}  # by imported modules and number
        self._protection: Protection | None = None  # of the first server that started
        self._lock = threading.Lock()
        self._closed = False
        if isolation == "none":
            _log.warning(
                "tools.isolation=none: code written by the model runs with your rights, "
                "only memory and time are limited"
            )

    async def describe(self, modules: tuple[str, ...] = _LIGHT) -> Protection:
        """Which protection is active, and why not the better one. Starts now instead of at the
        first call, a server with `modules` imported; `RuntimeError` where no isolation works."""
        return await self._ready(self._link(modules))

    start = describe

    async def run(
        self, code: str, *, timeout_s: float | None = None, stdin: str | None = None
    ) -> Execution:
        """Execute `code` in a fresh process that is forgotten afterwards."""
        timeout_s = timeout_s or self.timeout_s
        body = {"code": code, "number": 1, "timeout_s": timeout_s, "stdin": stdin}
        reply, seconds = await self._call(preloaded(code), body, timeout_s)
        return _execution(reply, timeout_s, seconds)

    async def call_function(
        self, function: str, payload: Any, timeout_s: float | None = None
    ) -> Any:
        """`function` is "module:function" of an importable module, taking and returning one JSON
        value. Its module is imported once, in a server of its own. `SandboxError` when it raises,
        times out or dies; the message says which."""
        timeout_s = timeout_s or self.timeout_s
        body = {"target": function, "payload": json.dumps(payload), "timeout_s": timeout_s}
        reply, seconds = await self._call((function.partition(":")[0],), body, timeout_s)
        execution = _execution(reply, timeout_s, seconds)
        if execution.error is not None or execution.value is None:
            raise SandboxError(f"{function}: {execution.error}")
        try:
            return json.loads(execution.value)
        except (ValueError, RecursionError):
            raise SandboxError(f"{function}: its result could not be read") from None

    async def open_session(self, modules: tuple[str, ...] = _LIGHT) -> Snapshot:
        """A fresh interpreter, not yet having run anything; `modules` as `preloaded` gives them.
        `RunError` where its server dies again and again."""
        try:
            link, reply = await self._served(modules, "open")
        except ServerGoneError:
            raise RunError(
                f"the sandbox's server was killed {ATTEMPTS} times in a row; "
                "look for what kills it (too little memory?), then go on with --resume"
            ) from None
        return Snapshot(link, reply.header["snapshot"])

    async def step(
        self, snapshot: Snapshot, code: str, number: int, *, timeout_s: float | None = None
    ) -> tuple[Execution, Snapshot | None]:
        """Execute `code` on a copy of `snapshot` and make that a snapshot; None if it was killed.

        `number` names the step in tracebacks. `SnapshotLostError`: nothing was executed.
        """
        timeout_s = timeout_s or self.timeout_s
        body = {"code": code, "number": number, "timeout_s": timeout_s, "stdin": None}
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            reply = await self._ask(
                snapshot.link, "step", body, snapshot=snapshot.number, timeout_s=timeout_s
            )
        except ServerGoneError as problem:
            raise SnapshotLostError(str(problem)) from None
        if reply.header["how"] == "lost":
            raise SnapshotLostError("the snapshot's process is gone")
        execution = _execution(reply, timeout_s, loop.time() - started)
        if "snapshot" not in reply.header:
            return execution, None
        grown_mb = reply.header["grown_kb"] / 1024
        return execution, Snapshot(snapshot.link, reply.header["snapshot"], grown_mb)

    def drop(self, snapshots: Iterable[Snapshot]) -> None:
        """End these interpreters; a session ends with its last one."""
        by_link: dict[Link, list[int]] = {}
        for snapshot in snapshots:
            by_link.setdefault(snapshot.link, []).append(snapshot.number)
        for link, numbers in by_link.items():
            for start in range(0, len(numbers), 1000):  # a packet has a size
                link.tell("drop", snapshots=numbers[start : start + 1000])

    async def close(self) -> None:
        """End every server; no process is left when this returns."""
        with self._lock:
            self._closed = True
            links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(asyncio.to_thread(link.close) for link in links))

    # --- servers ---------------------------------------------------------------------------------

    def _link(self, modules: tuple[str, ...]) -> Link:
        """The least loaded server with these, started if it is not there or has died."""
        with self._lock:
            if self._closed:
                raise RuntimeError("this sandbox is closed; make a new one")
            for index in range(self._servers):
                link = self._links.get((modules, index))
                if link is None or not link.alive:
                    self._links[modules, index] = self._launch(modules)
            mine = [self._links[modules, index] for index in range(self._servers)]
            return min(mine, key=lambda link: link.load)

    def _launch(self, modules: tuple[str, ...]) -> Link:
        view = self._graders
        if modules in _PROGRAMS:
            view = self._programs
            modules = tuple(m for m in modules if _NEEDED.get(m, "elpo_fast") in view.modules)
        options = Options(
            isolation="",
            workers=self._workers,
            memory_mb=self.memory_mb,
            processes=2 * self.max_snapshots,
            modules=modules,
            readable=view.allowed(),
            listed=view.listed(),
        )
        # What worked once must work again: a server that is replaced is not less confined.
        isolations = (self._protection.isolation,) if self._protection else self._isolations
        return Link(options, isolations, view)

    async def _ready(self, link: Link) -> Protection:
        try:
            isolation, reasons = await asyncio.shield(asyncio.wrap_future(link.ready))
        except RuntimeError as problem:
            if self._protection is None:
                raise RunError(str(problem)) from None
            # It has worked here before: whoever asks may try again.
            raise NotStartedError(f"a new server did not start: {problem}") from None
        self._protection = self._protection or Protection(
            isolation, _ACTIVE[isolation], reasons, _GAPS.get(isolation, ())
        )
        return self._protection

    async def _call(
        self, modules: tuple[str, ...], body: Any, timeout_s: float
    ) -> tuple[Reply, float]:
        """The reply and its seconds; one that says so where servers died again and again, but
        `RunError` where they did not even start."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            _, reply = await self._served(modules, "call", body, timeout_s=timeout_s)
        except NotStartedError as problem:
            raise RunError(str(problem)) from None
        except ServerGoneError:
            reply = Reply({"how": "gone", "signal": 0}, (b"", b"", b""))
        return reply, loop.time() - started

    async def _served(
        self, modules: tuple[str, ...], op: str, body: Any = None, **fields: Any
    ) -> tuple[Link, Reply]:
        """A server and its reply; a new server is asked where one dies, `ATTEMPTS` in all."""
        for attempt in range(ATTEMPTS):
            link = self._link(modules)
            try:
                return link, await self._ask(link, op, body, **fields)
            except ServerGoneError:
                if attempt == ATTEMPTS - 1 or self._closed:
                    raise
        raise AssertionError

    async def _ask(self, link: Link, op: str, body: Any = None, **fields: Any) -> Reply:
        await self._ready(link)
        future: Future[Reply]
        number, future = link.send(op, body, **fields)
        link.load += 1
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            link.cancel(number)
            raise
        finally:
            link.load -= 1


def preloaded(code: str) -> tuple[str, ...]:
    """What should have been imported before `code` runs."""
    return _HEAVY if _NAMES_HEAVY.search(code) else _LIGHT


def _execution(reply: Reply, timeout_s: float, seconds: float) -> Execution:
    """The reply in words. The outcome was written by a process that ran unknown code."""
    out, err, payload = (*reply.parts, b"", b"", b"")[:3]
    value = error = None
    finished = False
    match reply.header["how"]:
        case "done":
            value, error, finished = read_outcome(payload, timeout_s)
        case "timeout":
            error = f"timed out after {timeout_s:g} s"
        case "flood":
            error = "stopped: too much output"
        case "stopped":
            error = f"stopped: {reply.header['reason']}"
        case "died":
            error = death_in_words(reply.header.get("signal", 0))
        case "gone":
            error = "the sandbox was restarted and this call could not be run; try again"
    return Execution(
        stdout=out.decode("utf-8", "replace"),
        stderr=err.decode("utf-8", "replace"),
        value=value,
        error=error,
        finished=finished,
        seconds=seconds,
    )


def read_outcome(payload: bytes | str, timeout_s: float) -> tuple[str | None, str | None, bool]:
    """Value, error and whether it finished, as `_cell.run_code` says, if it was let to."""
    try:
        outcome = json.loads(payload)
        value, error, timeout = outcome["value"], outcome["error"], bool(outcome["timeout"])
        if not all(part is None or isinstance(part, str) for part in (value, error)):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, "the result could not be read: the program broke its interpreter", False
    if timeout:
        error = f"{error}\ntimed out after {timeout_s:g} s"
    return value and valid_text(value), error and valid_text(error), not timeout


def death_in_words(number: int) -> str:
    """Why a process that was ended by this signal (0: by itself) gave no outcome."""
    match signal_name(number):
        case "SIGSEGV" | "SIGBUS" | "SIGILL" | "SIGFPE" | "SIGABRT" as name:
            return f"the interpreter crashed ({name})"
        case "SIGKILL":
            return "killed: over the limit of CPU time or memory"
        case _:
            return "the process ended before the code was finished"
