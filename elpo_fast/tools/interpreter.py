"""The two Python tools: `code_interpreter` forgets, `python_session` remembers and branches.

A session's state is a link in a chain of code cells, nothing more; the interpreter behind it is a
snapshot in the sandbox. Calling a state forks its snapshot, so states stay usable and branches
need no replay. Snapshots are a cache: the least recently used are dropped when there are too many
or they hold too much memory, and rebuilt by running the chain again, as is every second branch from
a state that holds more than memory (files, open descriptors, shared mappings, threads: see
`_server`). Where a call then shows something else than the first time, the answer says so. The work
for one call is bounded: `ATTEMPTS` runs of its chain, `REBUILD_S` and thrice the time the chain
took. A call that timed out or was killed leaves the state as it was; one that raised did what it
did up to there, as in a notebook. What a
task hides from the model (`Task.reveals`) is kept here, beside the state, and never in its process.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from elpo_fast.tools.remote import RemoteSandbox
from elpo_fast.tools.sandbox import (
    ATTEMPTS,
    Execution,
    Sandbox,
    Snapshot,
    SnapshotLostError,
    preloaded,
)
from elpo_fast.types import Task, Tool, ToolResult

_SHOWN = "Returns what it prints and the value of the last expression, or (no output)."
_UNCHANGED = "the session is as it was before this call"
REBUILD_S = 60.0


_FENCED = re.compile(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)


def _unfenced(code: str) -> str:
    """Code without the marks of a Markdown block around it, as models often write them."""
    found = _FENCED.fullmatch(code)
    return found[1] if found else code


def _schema(name: str, description: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "Python code"}},
        "required": ["code"],
        "additionalProperties": False,
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


class CodeInterpreter(Tool):
    """Every call is a fresh interpreter. Stateless: its state is `None`."""

    schema = _schema("code_interpreter", f"Run Python code from scratch. {_SHOWN}")

    def __init__(self, sandbox: Sandbox | RemoteSandbox) -> None:
        self._sandbox = sandbox

    async def call(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult:
        execution = await self._sandbox.run(_unfenced(arguments["code"]))
        return _result(execution, None)


@dataclass(frozen=True, eq=False, slots=True)
class SessionState:
    """After `code` was run on `parent`. The root ran the task's setup on a fresh interpreter, in
    which `modules` had been imported."""

    parent: SessionState | None = field(repr=False)
    code: str
    number: int  # calls so far
    digest: str  # of what it showed
    modules: tuple[str, ...] = ()  # of the root
    seconds: float = 0.0  # that the calls so far took
    hidden: tuple[str, ...] = field(default=(), repr=False)  # of `Task.reveals`, still to be shown


class _RestoreError(Exception):
    """The chain of a dropped snapshot could not be run again."""


class PythonSession:
    """An interpreter that keeps its variables from call to call, and branches."""

    schema: Mapping[str, Any] = _schema(
        "python_session", f"Run Python code. Variables are kept between calls. {_SHOWN}"
    )

    def __init__(self, sandbox: Sandbox, *, memory_mb: float = 4096) -> None:
        """`memory_mb`: snapshots are dropped when what they use adds up to more; pages that they
        share count each time. Their number is bounded by `sandbox.max_snapshots`."""
        self._sandbox, self._memory_mb = sandbox, memory_mb
        self._snapshots: OrderedDict[SessionState, Snapshot] = OrderedDict()

    async def open(self, task: Task) -> SessionState:
        """`RuntimeError` naming the task if its setup fails."""
        modules = preloaded(task.setup)
        root = SessionState(None, task.setup, 0, "", modules, hidden=task.reveals)
        if task.setup:
            try:
                self._keep(root, await self._root(root))
            except _RestoreError as problem:
                raise RuntimeError(f"the setup of task {task.id!r} failed: {problem}") from None
        return root

    async def call(self, state: SessionState, arguments: Mapping[str, Any]) -> ToolResult:
        code = _unfenced(arguments["code"])
        origin = state
        if state.parent is None and len(modules := preloaded(code)) > len(state.modules):
            origin = replace(state, modules=modules)  # a root of its own: forking beats importing
        try:
            execution, snapshot, changed = await self._step(origin, code)
        except _RestoreError as problem:
            text = f"the session could not be restored: {problem}"
            return ToolResult(text, state, error=True)
        finally:
            if origin is not state:
                await self.release([origin])
        if snapshot is None:
            return _result(execution, state, changed, _UNCHANGED)
        shown, hidden = "", state.hidden
        if hidden and execution.error is None:
            shown, hidden = hidden[0], hidden[1:] or hidden
        new = SessionState(
            parent=origin,
            code=code,
            number=state.number + 1,
            digest=_digest(execution),
            seconds=state.seconds + execution.seconds,
            hidden=hidden,
        )
        self._keep(new, snapshot)
        return _result(execution, new, changed, shown)

    async def release(self, states: Iterable[SessionState]) -> None:
        found = [self._snapshots.pop(state, None) for state in states]
        self._sandbox.drop(snapshot for snapshot in found if snapshot is not None)

    async def close(self) -> None:
        await self.release(list(self._snapshots))

    async def _step(self, state: SessionState, code: str) -> tuple[Execution, Snapshot | None, str]:
        """From the snapshot of `state`, which is rebuilt if it turns out to be gone; last, what was
        not as before when calls were run again."""
        until = time.monotonic() + REBUILD_S + 3 * state.seconds
        for attempt in range(ATTEMPTS):
            try:
                # After a loss in a session of its own, in which no other call is in the way.
                snapshot, changed = await self._snapshot(state, until, alone=attempt > 0)
                execution, new = await self._take(state, snapshot, code, state.number + 1)
            except SnapshotLostError:
                continue
            self._keep(state, snapshot)
            return execution, new, changed
        raise _RestoreError("its process was killed")

    async def _take(
        self, state: SessionState, snapshot: Snapshot, code: str, number: int
    ) -> tuple[Execution, Snapshot | None]:
        """One step. A snapshot that is lost is forgotten."""
        try:
            return await self._sandbox.step(snapshot, code, number)
        except SnapshotLostError:
            if self._snapshots.get(state) is snapshot:
                del self._snapshots[state]
            self._sandbox.drop([snapshot])
            raise

    async def _snapshot(
        self, state: SessionState, until: float, *, alone: bool
    ) -> tuple[Snapshot, str]:
        """The interpreter of `state`, from the cache or by running again the calls since the last
        one that is there, or all of them; and what then was not as before."""
        missing = []
        at, changed = state, ""
        while alone or at not in self._snapshots:
            if at.parent is None:
                break
            missing.append(at)
            at = at.parent
        snapshot = None if alone else self._snapshots.get(at)
        if snapshot is None:
            snapshot = await self._root(at)
        else:
            self._snapshots.move_to_end(at)
        for past in reversed(missing):
            if time.monotonic() > until:
                self._drop_unless_kept(at, snapshot)
                raise _RestoreError("running its calls again took too long")
            execution, rebuilt = await self._take(at, snapshot, past.code, past.number)
            self._drop_unless_kept(at, snapshot)
            if rebuilt is None:
                raise _RestoreError(f"call {past.number} now fails: {execution.error}")
            if _digest(execution) != past.digest:
                changed = f"(the session was rebuilt; call {past.number} now shows something else)"
            at, snapshot = past, rebuilt
        return snapshot, changed

    def _drop_unless_kept(self, state: SessionState, snapshot: Snapshot) -> None:
        if self._snapshots.get(state) is not snapshot:
            self._sandbox.drop([snapshot])

    async def _root(self, state: SessionState) -> Snapshot:
        """A fresh interpreter after the task's setup, which nobody but us wrote: where it did not
        finish, it is run again."""
        problem = "its process was killed"
        for _ in range(ATTEMPTS):
            fresh = await self._sandbox.open_session(state.modules)
            if not state.code:
                return fresh
            try:
                execution, snapshot = await self._sandbox.step(fresh, state.code, 0)
            except SnapshotLostError:
                continue
            finally:
                self._sandbox.drop([fresh])
            problem = execution.text()
            if snapshot is not None:
                if execution.error is None:
                    return snapshot
                self._sandbox.drop([snapshot])
                break
        raise _RestoreError(problem)

    def _keep(self, state: SessionState, snapshot: Snapshot) -> None:
        """Remember it, unless another call has rebuilt the same state meanwhile."""
        kept = self._snapshots.setdefault(state, snapshot)
        if kept is not snapshot:
            self._sandbox.drop([snapshot])
        self._snapshots.move_to_end(state)
        used = sum(other.grown_mb for other in self._snapshots.values())
        while len(self._snapshots) > 1 and (
            len(self._snapshots) > self._sandbox.max_snapshots or used > self._memory_mb
        ):
            _, oldest = self._snapshots.popitem(last=False)
            used -= oldest.grown_mb
            self._sandbox.drop([oldest])


def _digest(execution: Execution) -> str:
    """Addresses differ from process to process and mean nothing."""
    text = re.sub(r"\b0x[0-9a-f]+", "0x", execution.text())
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _result(execution: Execution, state: Any, *notes: str) -> ToolResult:
    return ToolResult(
        content="\n".join(filter(None, (execution.text(), *notes))),
        state=state,
        error=execution.error is not None,
        seconds=execution.seconds,
    )
