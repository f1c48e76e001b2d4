"""`ledger`: a procedural multi-step family in which early mistakes are irrecoverable.

A Python session holds a secret whole number `x`; K lines tell operations in varied English. The
task shows the first line alone; calling `do(new value)` sets `x` and prints it, and the next line
comes with the result. After the last operation the model answers with `x`. It is never told the
start, so nothing can be worked out ahead or computed again.

Invariants
- The lines to come are not in the session, whose code can read all that it holds: the trainer's
  side shows one for each call that ends without an error (`Task.reveals`).
- The session keeps state, and a trajectory has at most K + 1 assistant messages: one call an
  operation and the answer. A wrong step uses up its line and cannot be done over. Where it lost
  information (remainder, halving, digit sum, ...) nothing can repair it; elsewhere only a repair
  packed into a later call, by a model that knows what it did wrong.
- No mistake is forgiven: leaving one operation out, missing its constant by one, or putting another
  kind in its place changes the answer (`operations.mistakes`). So a policy that errs with
  probability p a step succeeds with (1 - p)^K.
- Every operation changes `x`, and `x` stays within 1..`max_value`: few tokens.
- Training and held-out tasks have no sequence of operations in common, whatever the wording; they
  share wordings and numbers, being draws from one distribution.

Showing one line at a time makes every call depend on the tool's last answer and keeps what a step
needs close by: after 150 updates of 16 demonstrations a model of 1.7 M parameters is at a loss of
0.07, with all lines in the prompt at 0.24.

Difficulty: `steps`, `level` (which kinds of operation), `wordings` (paraphrases of each kind).
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from elpo_fast.config import ConfigError, Positive
from elpo_fast.tasks.common import (
    RewardOptions,
    SplitFraction,
    derived_seed,
    digest,
    final_text,
    is_held_out,
    last_tagged,
    unfinished,
    with_system,
)
from elpo_fast.tasks.operations import BY_NAME, KINDS, PARAPHRASES, Kind, draw
from elpo_fast.types import End, Message, Task, TaskSource, Verdict

SYSTEM = (
    "Python holds a secret number x. Do each line by calling do(new x): it prints x and the next "
    "line. Divisions round down. Last write <answer>x</answer>."
)
LAST_LINE = "answer"
_SETUP = """
x = {start}
def do(value):
    global x
    x = value
    print(x)
"""
_ATTEMPTS = 2_000  # draws before a set of options is called too narrow
_VOCABULARY_TASKS = 300


class LedgerOptions(RewardOptions):
    steps: tuple[Positive, Positive] = (4, 4)  # operations: one number, or [fewest, most]
    level: Annotated[int, Field(ge=1, le=3)] = 2  # kinds of operation up to this level
    kinds: tuple[str, ...] | None = None  # exactly these kinds, instead of a level
    wordings: Annotated[int, Field(ge=1, le=PARAPHRASES)] = PARAPHRASES  # of each kind
    start: tuple[Positive, Positive] = (10, 99)  # the secret number, [lowest, highest]
    max_value: Positive = 999
    held_out_fraction: SplitFraction = 0.2

    @field_validator("steps", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _check(self) -> LedgerOptions:
        for name, (low, high) in (("steps", self.steps), ("start", self.start)):
            if low > high:
                raise ValueError(f"{name}: the lower bound {low} exceeds the upper bound {high}")
        if self.start[1] > self.max_value:
            raise ValueError(f"start up to {self.start[1]} exceeds max_value={self.max_value}")
        for kind in self.kinds or ():
            if kind not in BY_NAME:
                raise ValueError(f"unknown kind {kind!r}; known: {', '.join(BY_NAME)}")
        if self.kinds is not None and len(set(self.kinds)) < 2:
            raise ValueError("kinds must name two or more kinds, else there is nothing to mistake")
        return self

    @property
    def active_kinds(self) -> tuple[Kind, ...]:
        chosen = self.kinds
        return tuple(
            kind
            for kind in KINDS
            if (kind.level <= self.level if chosen is None else kind.name in chosen)
        )


class Ledger(TaskSource):
    """The task source; both splits are endless. `key` draws the held-out tasks, and together with
    `seed` the training tasks."""

    name = "ledger"
    Options = LedgerOptions

    def __init__(
        self, options: LedgerOptions, *, seed: int, key: int | str, system: str | None = None
    ) -> None:
        self.options = options
        self.seed, self.key = seed, key
        self.system = SYSTEM if system is None else system
        self._kinds = options.active_kinds

    def train(self, index: int) -> Task:
        return self._task("train", index, derived_seed("train", self.key, self.seed, index))

    def held_out(self, index: int) -> Task:
        return self._task("held-out", index, derived_seed("held-out", self.key, index))

    def _task(self, split: str, index: int, seed: int) -> Task:
        """Task `index` of a split: the first acceptable draw of its own random stream."""
        rng = random.Random(seed)
        for _ in range(_ATTEMPTS):
            start = rng.randint(*self.options.start)
            steps = rng.randint(*self.options.steps)
            drawn = draw(rng, start, steps, self._kinds, self.options.max_value)
            if drawn is None:
                continue
            truth, operations = drawn
            code = [kind.code.format(c=c) for kind, c in operations]
            content = digest("\n".join(code))
            if is_held_out(content, self.options.held_out_fraction) is (split == "held-out"):
                break
        else:
            raise ConfigError(
                f"found no {split} ledger task within task.options in {_ATTEMPTS} draws; allow "
                "more kinds, fewer steps, a wider start or a larger max_value"
            )
        lines = [
            rng.choice(kind.wordings[: self.options.wordings]).format(c=c) for kind, c in operations
        ]
        return Task(
            id=f"ledger-{split}-{index}-{content[:8]}",
            messages=with_system([{"role": "user", "content": lines[0]}], self.system),
            source=self.name,
            truth=truth,
            setup=_SETUP.format(start=start),
            reveals=(*lines[1:], LAST_LINE),
            max_turns=len(operations) + 1,
            info={"steps": len(operations), "lines": lines, "code": code},
        )

    def demonstration(self, task: Task) -> list[Message]:
        """One call an operation, then the answer. Needs no tool result."""
        calls: list[Message] = [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": _call(code)}],
            }
            for code in task.info["code"]
        ]
        return [*calls, {"role": "assistant", "content": f"<answer>{task.truth}</answer>"}]

    async def grade(self, task: Task, messages: Sequence[Message], end: End) -> Verdict:
        """Correct if the last whole number of the answer is the true final `x`."""
        if reason := unfinished(end):
            return self.options.verdict(False, reason)
        text = final_text(messages)
        tagged = last_tagged(text)
        numbers = re.findall(r"-?[0-9]+", text if tagged is None else tagged)
        if not numbers:
            return self.options.verdict(False, "no answer found in the final message")
        # Compared as text: thousands of digits are a wrong answer, not an error of int().
        answer = numbers[-1].lstrip("0") or "0"
        if answer == str(task.truth):
            return self.options.verdict(True, f"answered {answer}, as expected")
        return self.options.verdict(False, f"answered {answer[:20]}, expected {task.truth}")

    def vocabulary_texts(self) -> Iterator[str]:
        """Texts for making a small tokenizer. First conversations as the model will see them, so
        that what is frequent gets few tokens; then every wording, code and number of the family,
        calls in both formats, and the printable ASCII that tool errors may contain."""
        for index in range(_VOCABULARY_TASKS):
            task = self.train(index)
            yield from (f"{message['role']}\n{message['content']}" for message in task.messages)
            for code, line in zip(task.info["code"], task.info["lines"], strict=True):
                yield f"{line}\nassistant\n<code>do({code})</code>\ntool\n"
            yield f"{LAST_LINE}\nassistant\n<answer>{task.truth}</answer>"
        for kind in KINDS:
            for constant in {kind.low, kind.high}:
                call = _call(kind.code.format(c=constant))
                yield f"<code>{call['arguments']['code']}</code>"
                yield f"<tool_call>{json.dumps(call)}</tool_call>"
                yield "\n".join(wording.format(c=constant) for wording in kind.wordings)
        yield from map(str, range(max(self.options.max_value, *(k.high for k in KINDS)) + 1))
        yield string.printable


def _call(code: str) -> dict[str, Any]:
    return {"name": "python_session", "arguments": {"code": f"do({code})"}}
