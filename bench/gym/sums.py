"""Chats that add up chain sums of reasoning-gym in a Python session, one term a call: what a policy
from scratch learns before `chain_sum.yaml` trains it (`sft.data: sums:chats`). For 43 + 12 - 27:

    s=43;s     43
    s+=12;s    55
    s-=27;s    28
    <answer>28</answer>

The tasks are that file's, drawn by another key than any run's, and never one that is held out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elpo_fast.config import load_config
from elpo_fast.tasks.reasoning_gym import ReasoningGym, ReasoningGymOptions
from elpo_fast.types import Message, Task

FILE = Path(__file__).with_name("chain_sum.yaml")


def chats(count: int = 2048) -> Iterator[dict[str, Any]]:
    """`count` rows for `sft.data`."""
    config = load_config(FILE).task
    source = ReasoningGym(
        ReasoningGymOptions(**config.options),
        seed=0,
        key="chats",
        run_function=None,  # nothing is judged
        system=config.system,
    )
    yield from (chat(source.train(index)) for index in range(count))


def chat(task: Task) -> dict[str, Any]:
    """A task and how it is solved."""
    first, *rest = task.truth["metadata"]["expression"].split()
    total = int(first)
    messages = [*task.messages, *_call(f"s={first};s", total)]
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        total += int(sign + term)
        messages += _call(f"s{sign}={term};s", total)
    return {"messages": [*messages, {"role": "assistant", "content": f"<answer>{total}</answer>"}]}


def _call(code: str, result: int) -> list[Message]:
    call = {"type": "function", "function": {"name": "python_session", "arguments": {"code": code}}}
    return [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": str(result)}]
