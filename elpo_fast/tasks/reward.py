"""Verdicts by a function of one's own: `(task, messages, end) -> float | Verdict`, sync or async.

It is trusted. By default it runs in a thread of this process, what it awaits in our event loop;
with a time limit in processes of its own. What it raises ends the trajectory, as for every grader.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import pickle
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Real
from typing import Any, Protocol

from elpo_fast import own
from elpo_fast.config import ConfigError, TaskConfig
from elpo_fast.tasks.common import WRONG_REWARD, FirstJudged, shown
from elpo_fast.types import End, Message, Task, TaskSource, Verdict


class Apart(Protocol):
    """Makes what calls the first of some trusted `module:function`s in processes that have imported
    all of them, and raises `RuntimeError` where it does or takes more than `timeout_s` seconds."""

    def __call__(
        self, *functions: str, key: str, timeout_s: float
    ) -> Callable[[Mapping[str, Any]], Awaitable[Any]]: ...


class Rewarded:
    """A task source whose verdicts are those of `config.reward`."""

    def __init__(self, source: TaskSource, config: TaskConfig, apart: Apart | None) -> None:
        """`apart`: for a reward with a time limit. `ConfigError` for one that cannot be used."""
        assert config.reward is not None
        self._source, self._above = source, config.correct_above
        self._target = own.target("rewards", config.reward)
        self._function = own.find("rewards", config.reward, "task.reward")
        try:
            inspect.signature(self._function).bind("task", "messages", "end")
        except TypeError as error:
            raise ConfigError(
                f"task.reward: {self._target} cannot be called with (task, messages, end) "
                f"({error}); give it these parameters"
            ) from None
        self._call_apart = None
        if config.reward_timeout_s is not None:
            assert apart is not None
            self._call_apart = apart(
                f"{__name__}:{in_own_process.__name__}",
                self._target,
                key="task.reward",
                timeout_s=config.reward_timeout_s,
            )
        self._first = FirstJudged()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    async def grade(self, task: Task, messages: Sequence[Message], end: End) -> Verdict:
        """The function's verdict; after a fault that of a failure, without asking it again."""
        if end is End.FAULT:
            return Verdict(False, WRONG_REWARD, "a fault ended it")
        if self._call_apart is None:
            found = await asyncio.to_thread(_called, self._function, task, messages, end)
            verdict = _verdict(self._target, self._above, await own.awaited(found))
        else:
            given = base64.b64encode(pickle.dumps((task, messages, end))).decode()
            arguments = {"target": self._target, "above": self._above, "given": given}
            verdict = Verdict(**await self._call_apart(arguments))
        self._first.show(messages, verdict)
        return verdict


async def in_own_process(target: str, above: float, given: str) -> dict[str, Any]:
    """The fields of the verdict of the function named `target` on what `given` holds."""
    found = _called(own.load(target), *pickle.loads(base64.b64decode(given)))
    return asdict(_verdict(target, above, await own.awaited(found)))


def _called(function: Callable[..., Any], *given: Any) -> Any:
    try:
        return function(*given)
    except StopIteration as error:  # which no future can carry
        raise RuntimeError("it raised StopIteration") from error


def _verdict(target: str, above: float, found: Any) -> Verdict:
    if isinstance(found, Verdict):
        return replace(found, reason=shown(found.reason, 1000))
    if isinstance(found, Real):
        reward = float(found)
        return Verdict(reward > above, reward, f"{target} gives {reward:g}")
    raise TypeError(f"{target} returned a {type(found).__name__}; return a number or a Verdict")
