"""A whole BEL collection computes each prefix once, and without sharing as often as it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from elpo_fast.algo.bel import BelPlanner
from elpo_fast.config import RolloutConfig
from elpo_fast.rollout.chat import Chat
from elpo_fast.rollout.collector import Collector
from elpo_fast.types import Completion, Engine, Sampling, Task, ToolCall, ToolResult, Verdict

TASKS, ROLLOUTS = 6, 12
TOOL = {"type": "function", "function": {"name": "python_session", "parameters": {}}}


class Talk(Chat):
    """A random model's idea of tool calls: a message that comes to the end of a word is one."""

    stop = ("the ", "e", "a", "o", "n", "r", "t")

    def parse_call(self, text: str) -> ToolCall:
        return ToolCall("python_session", {"code": text})


class Tools:
    async def open(self, task: Task) -> int:
        return 0

    async def execute(self, state: int, call: Any) -> ToolResult:
        await asyncio.sleep(0.001 * (len(call.arguments["code"]) % 5))
        return ToolResult(f"total {state}", state + 1)

    async def release(self, states: Iterable[int]) -> None:
        pass


class Source:
    """Verdicts that depend on the text, so that searches go either way."""

    async def grade(self, task: Task, messages: Any, end: Any) -> Verdict:
        correct = len(messages[-1]["content"]) % 3 == 0
        return Verdict(correct, float(correct), "by the length of the last message")


class Recorder:
    """Passes everything on and remembers what was asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.asked = engine, []

    async def generate(self, prefix: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        self.asked.append((prefix.tolist(), n))
        return await self.engine.generate(prefix, n, sampling)

    @property
    def unique_tokens(self) -> int:
        """Tokens in the union of all prefixes."""
        return len({tuple(ids[:end]) for ids, _ in self.asked for end in range(1, len(ids) + 1)})


@pytest.fixture
def collect(tokenizer: Any) -> Any:
    """Collect with an engine; its statistics, tokens asked for and unique ones."""

    async def work(engine: Engine) -> tuple[Any, int, int]:
        rollout = RolloutConfig(max_turns=7, max_turn_tokens=16, max_tokens=400)
        recorder = Recorder(engine)
        chat = Talk(tokenizer, "code", [TOOL])
        collector = Collector(
            recorder,  # type: ignore[arg-type]
            Tools(),
            chat,
            Source(),  # type: ignore[arg-type]
            rollout,
            output_tokens=20,
        )
        words = ("carry", "four", "total", "seven", "sum", "take")
        question = "take the sum of the total and carry the four to the " * 2
        tasks = [
            Task(str(i), ({"role": "user", "content": question + words[i]},), "words")
            for i in range(TASKS)
        ]
        trees = await collector.collect(tasks, lambda: BelPlanner(ROLLOUTS, 3, 1, 3, 5.0), seed=0)
        assert [len(tree.leaves) for tree in trees] == [ROLLOUTS] * TASKS
        asked = sum(len(ids) * n for ids, n in recorder.asked)
        return engine.stats(), asked, recorder.unique_tokens

    return work


def test_each_prefix_is_computed_once(with_engine: Any, collect: Any) -> None:
    stats, asked, unique = with_engine(collect)
    assert stats.prompt_tokens == asked == stats.computed_tokens + stats.cached_tokens
    assert asked > 4 * unique  # there is something to share
    assert stats.computed_tokens <= 1.05 * unique


def test_without_sharing_every_prefix_is_computed_as_often_as_asked(
    qwen3: Any, use_sglang: Any, servers: Any, collect: Any
) -> None:
    stats, asked, unique = use_sglang(qwen3, collect, [servers[1][1]])
    assert stats.computed_tokens == stats.prompt_tokens == asked > 4 * unique
