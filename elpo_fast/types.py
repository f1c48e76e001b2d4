"""Small frozen records shared by all rooms. Imports numpy and the standard library only.

Token arrays are `int32 [N]`, log-probs and entropies `float32 [N]` in nats.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

Message = Mapping[str, Any]
"""One chat message: `role` and `content`, for assistants optionally `tool_calls` (OpenAI form)."""


class RunError(RuntimeError):
    """A run cannot go on; the message is one line that says why and what helps."""


def valid_text(text: str) -> str:
    """`text` as UTF-8 can carry it: lone surrogates are written out, as `\\ud83d`."""
    return text.encode("utf-8", "backslashreplace").decode()


class End(StrEnum):
    """Why a trajectory ended; every trajectory has exactly one of these."""

    ANSWER = "answer"  # an assistant message without a tool call
    TURN_LIMIT = "turn_limit"  # the last allowed assistant message still called a tool
    LENGTH = "length"  # a message hit its token limit, or the context is full
    FAULT = "fault"  # what reads, runs or judges its messages failed on one of them


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. `id` is unique within its source and stable across runs."""

    id: str
    messages: tuple[Message, ...]  # what the model is shown first (system, user)
    source: str  # name of the task source, as in the configuration
    truth: Any = None  # whatever the source's verdict needs
    # Python run in a fresh stateful session before the first tool call; the model can read it there
    setup: str = ""
    # What the session hides: lines that the trainer's side appends to the results of its calls, one
    # each time a call ends without an error, and the last one from then on
    reveals: tuple[str, ...] = ()
    max_turns: int | None = None  # assistant messages allowed; None: the configuration's
    info: Mapping[str, Any] = field(default_factory=dict)  # difficulty, data-set columns, ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """Judgement of one finished trajectory. Localization reads `correct`, advantages `reward`.

    Raises `ValueError`, `TypeError` or `OverflowError` for a reward that is not a finite number.
    """

    correct: bool
    reward: float
    reason: str  # one clear sentence, also when correct

    def __post_init__(self) -> None:
        if not math.isfinite(self.reward):
            raise ValueError(f"a reward must be finite, not {self.reward}")
        object.__setattr__(self, "reward", float(self.reward))
        object.__setattr__(self, "correct", bool(self.correct))
        object.__setattr__(self, "reason", valid_text(self.reason))


class TaskSource(Protocol):
    """Where tasks come from. Training and held-out tasks never overlap, by construction.

    A subclass has to have `name` and the abstract methods; without the others tasks never run out
    and there is no solver.
    """

    name: str
    train_size: int | None = None  # number of distinct training tasks; None: endless
    held_out_size: int | None = None
    tools: Sequence[Tool] = ()  # that go with the tasks, beside those of the configuration

    @abstractmethod
    def train(self, index: int) -> Task:
        """Training task number `index >= 0`; deterministic; endless sources never run out,
        finite ones take `index` modulo their length (one epoch = `train_size`)."""
        ...

    @abstractmethod
    def held_out(self, index: int) -> Task:
        """Held-out task number `index >= 0`; deterministic, disjoint from every training task."""
        ...

    def demonstration(self, task: Task) -> Sequence[Message] | None:
        """The solver's messages after `task.messages`, without tool results (the caller runs the
        tools), or `None` where the source has no solver."""
        return None

    def vocabulary_texts(self) -> Iterable[str]:
        """Texts to make a small tokenizer from; by default those of the first training tasks, and
        the roles of a chat, which each of its messages begins with."""
        size = 500 if self.train_size is None else min(500, self.train_size)
        said = [m["content"] for index in range(size) for m in self.train(index).messages]
        return [*said, *["system\nuser\nassistant\ntool\n"] * size]

    @abstractmethod
    def grade(self, task: Task, messages: Sequence[Message], end: End) -> Awaitable[Verdict]:
        """Judge the whole conversation. Anything that executes model output runs out of process.

        What it raises, `RunError` apart, ends the trajectory: it is called once more with
        `End.FAULT`, for the reward of one that failed.
        """
        ...


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A well-formed call: the tool exists or not, but name and arguments could be read."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """The message asked for a tool but could not be read; `problem` tells the model why."""

    problem: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool answered. `state` is new; the state called on stays usable (branching)."""

    content: str
    state: Any = None
    error: bool = False  # the call failed: bad arguments, exception, timeout, kill
    seconds: float = 0.0  # wall clock spent inside the tool

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", valid_text(self.content))


class Tool(Protocol):
    """A tool the model may call. State is immutable from the outside: `call` returns a new one,
    so several branches may continue from the same state, in any order and concurrently.

    A subclass has to have `schema` and `call`; without the others it is stateless.
    """

    schema: Mapping[str, Any]  # OpenAI function schema: {"type": "function", "function": {...}}

    async def open(self, task: Task) -> Any:
        """State before the first call (after `task.setup`); `None` for stateless tools."""
        return None

    @abstractmethod
    async def call(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult:
        """The answer, with the state after it."""
        ...

    async def release(self, states: Iterable[Any]) -> None:
        """These states will not be called again."""
        return None

    async def close(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. `stop` strings end a completion as soon as its text contains one; the token
    that completed it is kept. `stop_token_ids` end it too and are kept; where there are any, an
    engine may also end it with what the model's own folder calls an end of text."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None  # same seed, prefix, n, weights: same completions
    entropies: bool = True  # False: nothing is decided by them, and the cheapest estimate will do


@dataclass(frozen=True, slots=True)
class Completion:
    """`n` of these answer one `Engine.generate` call, in no meaningful order."""

    token_ids: np.ndarray  # int32 [N], stop token included
    logprobs: np.ndarray  # float32 [N], under the sampling distribution
    entropies: np.ndarray  # float32 [N], see `entropy_kind`
    finish: str  # "stop_token", "stop_string" or "length"
    cached_tokens: int = 0  # prefix tokens whose keys and values were already there
    weight_version: int = 0
    entropy_kind: str = "exact"  # or "top_k", "sampled"
    # of softmax(logits / temperature) before top-k, top-p and min-p cut it; None: not known
    full_logprobs: np.ndarray | None = None
    full_entropies: np.ndarray | None = None


@dataclass(slots=True)
class EngineStats:
    """Token counts since the engine started."""

    prompt_tokens: int = 0  # asked for, once per completion: n * len(prefix)
    cached_tokens: int = 0  # of these, served from the cache
    computed_tokens: int = 0  # of these, computed
    generated_tokens: int = 0
    recomputed_tokens: int = 0  # lost to a full cache while running; in none of the above


def whole(weight: Any) -> Any:
    """A named weight as a tensor, put together now if it has to be: see `Engine`."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


class Engine(Protocol):
    """Token ids in, token ids out. After `update_weights` no stale cache entry is reused.

    Named weights are tensors, or what gives one by `full_tensor()` when its turn comes: sharded
    over processes, which all have to ask for it in the same order, or put together on demand.
    """

    @property
    def weight_version(self) -> int: ...

    async def generate(
        self, prefix_ids: np.ndarray, n: int, sampling: Sampling
    ) -> list[Completion]: ...

    async def update_weights(
        self, named_tensors: Iterable[tuple[str, Any]], version: int
    ) -> None: ...

    async def score(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probs `float32 [S, N - 1]` of `token_ids[1:]`, each given all tokens before it, at
        temperature 1 and with nothing cut off; one row for each copy of the weights."""
        ...

    async def release(self) -> None:
        """Nothing is asked before the next `update_weights`: memory may go to the trainer."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...
