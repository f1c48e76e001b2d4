"""The two Python tools: `code_interpreter` forgets, `python_session` remembers and branches.

A session's state is a link in a chain of code cells, nothing more; the interpreter behind it is a
snapshot in the sandbox. Calling a state forks its snapshot, so states stay usable and branches
need no replay. Snapshots are a cache: the least recently used are dropped when there are too many
or they hold too much memory, and rebuilt by running the chain again. A rebuilt step must show what
it showed the first time, or the call is answered with an error. A call that timed out or was killed
leaves the state as it was; one that raised did what it did up to there, as in a notebook. What a
task hides from the model (`Task.reveals`) is kept here, beside the state, and never in its process.
"""

from __future__ import annotations

import hashlib
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
from elpo_fast.types import Task, ToolResult

_SHOWN = "Returns what it prints and the value of the last expression, or (no output)."
_UNCHANGED = "the session is as it was before this call"


def _schema(name: str, description: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "Python code"}},
        "required": ["code"],
        "additionalProperties": False,
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


class CodeInterpreter:
    """Every call is a fresh interpreter. Stateless: its state is `None`."""

    name = "code_interpreter"
    schema: Mapping[str, Any] = _schema(name, f"Run Python code from scratch. {_SHOWN}")

    def __init__(self, sandbox: Sandbox | RemoteSandbox) -> None:
        self._sandbox = sandbox

    async def open(self, task: Task) -> None:
        return None

    async def call(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult:
        execution = await self._sandbox.run(arguments["code"])
        return _result(execution, None)

    async def release(self, states: Iterable[Any]) -> None:
        return None

    async def close(self) -> None:
        return None


@dataclass(frozen=True, eq=False, slots=True)
class SessionState:
    """After `code` was run on `parent`. The root ran the task's setup on a fresh interpreter, in
    which `modules` had been imported."""

    parent: SessionState | None = field(repr=False)
    code: str
    number: int  # calls so far
    digest: str  # of what it showed
    modules: tuple[str, ...] = ()  # of the root
    hidden: tuple[str, ...] = field(default=(), repr=False)  # of `Task.reveals`, still to be shown


class _RestoreError(Exception):
    """The chain of a dropped snapshot did not run as it did the first time."""


class PythonSession:
    """An interpreter that keeps its variables from call to call, and branches."""

    name = "python_session"
    schema: Mapping[str, Any] = _schema(
        name, f"Run Python code. Variables are kept between calls. {_SHOWN}"
    )

    def __init__(self, sandbox: Sandbox, *, memory_mb: float = 4096) -> None:
        """`memory_mb`: snapshots are dropped when what they say they use adds up to more; pages
        they share count each time. Their number is bounded by `sandbox.max_snapshots`."""
        self._sandbox, self._memory_mb = sandbox, memory_mb
        self._snapshots: OrderedDict[SessionState, Snapshot] = OrderedDict()

    async def open(self, task: Task) -> SessionState:
        """`RuntimeError` naming the task if its setup fails."""
        root = SessionState(None, task.setup, 0, "", preloaded(task.setup), task.reveals)
        if task.setup:
            try:
                await self._snapshot(root)
            except _RestoreError as problem:
                raise RuntimeError(f"the setup of task {task.id!r} failed: {problem}") from None
        return root

    async def call(self, state: SessionState, arguments: Mapping[str, Any]) -> ToolResult:
        code = arguments["code"]
        origin = state
        if state.parent is None and len(modules := preloaded(code)) > len(state.modules):
            origin = replace(state, modules=modules)  # a root of its own: forking beats importing
        try:
            execution, snapshot = await self._step(origin, code, state.number + 1)
        except _RestoreError as problem:
            text = f"the session could not be restored: {problem}"
            return ToolResult(text, state, error=True)
        finally:
            if origin is not state:
                await self.release([origin])
        if snapshot is None:
            return _result(execution, state, _UNCHANGED)
        shown, hidden = "", state.hidden
        if hidden and execution.error is None:
            shown, hidden = hidden[0], hidden[1:] or hidden
        new = SessionState(origin, code, state.number + 1, _digest(execution), hidden=hidden)
        self._keep(new, snapshot)
        return _result(execution, new, shown)

    async def release(self, states: Iterable[SessionState]) -> None:
        found = [self._snapshots.pop(state, None) for state in states]
        self._sandbox.drop(snapshot for snapshot in found if snapshot is not None)

    async def close(self) -> None:
        await self.release(list(self._snapshots))

    async def _step(
        self, state: SessionState, code: str, number: int
    ) -> tuple[Execution, Snapshot | None]:
        """From the snapshot of `state`, which is rebuilt if it turns out to be gone."""
        for _ in range(ATTEMPTS):
            snapshot = await self._snapshot(state)
            try:
                return await self._sandbox.step(snapshot, code, number)
            except SnapshotLostError:
                self._forget(state, snapshot)
        raise _RestoreError("its process was killed")

    async def _snapshot(self, state: SessionState) -> Snapshot:
        """The interpreter of `state`, from the cache or by running its code once more."""
        cached = self._snapshots.get(state)
        if cached is not None:
            self._snapshots.move_to_end(state)
            return cached
        if state.parent is None:
            snapshot = await self._root(state)
        else:
            execution, rebuilt = await self._step(state.parent, state.code, state.number)
            if rebuilt is None:
                raise _RestoreError(f"call {state.number} now fails: {execution.error}")
            if _digest(execution) != state.digest:
                self._sandbox.drop([rebuilt])
                raise _RestoreError(f"call {state.number} now shows something else")
            snapshot = rebuilt
        return self._keep(state, snapshot)

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

    def _keep(self, state: SessionState, snapshot: Snapshot) -> Snapshot:
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
        return kept

    def _forget(self, state: SessionState, snapshot: Snapshot) -> None:
        if self._snapshots.get(state) is snapshot:
            del self._snapshots[state]
        self._sandbox.drop([snapshot])


def _digest(execution: Execution) -> str:
    return hashlib.blake2b(execution.text().encode(), digest_size=12).hexdigest()


def _result(execution: Execution, state: Any, note: str = "") -> ToolResult:
    text = execution.text()
    return ToolResult(
        content=f"{text}\n{note}" if note else text,
        state=state,
        error=execution.error is not None,
        seconds=execution.seconds,
    )
