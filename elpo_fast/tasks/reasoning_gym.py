"""`reasoning_gym`: any procedural set of the reasoning-gym library, by name.

Invariants
- Endless: each block of 64 tasks of a split has its own stream of generated questions, and a task
  is the next question of the stream whose hash belongs to the split. So no question is ever in
  both, which different seeds alone do not give, and any task is found without the blocks before.
- An answer is right where the set's verifier gives full marks. Partial marks are not passed on:
  several verifiers give them to junk.
- The verifier runs in the sandbox, with a time limit; what it evaluates must be a calculation (see
  `calculation`), so that an answer cannot forge the verdict.

`isomorphic_strings` and `ransom_note` draw from Python sets of strings: their questions are stable
across processes only with a fixed PYTHONHASHSEED.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from elpo_fast.config import ConfigError, Positive, PositiveFloat
from elpo_fast.tasks.common import (
    RewardOptions,
    RunFunction,
    SplitFraction,
    derived_seed,
    digest,
    final_text,
    is_held_out,
    last_boxed,
    last_tagged,
    run_verifier,
    shown,
    unfinished,
    with_system,
)
from elpo_fast.tasks.gym_verifier import make_dataset, pack_entry
from elpo_fast.types import End, Message, Task, TaskSource, Verdict

SYSTEM = "Think step by step; use the tool where it helps. Then write <answer>...</answer>."
_BLOCK = 64  # tasks a block
_ITEMS, _SETS = 512, 8  # questions a generated set, sets a block may use up


class ReasoningGymOptions(RewardOptions):
    dataset: str  # a set's name, e.g. countdown
    config: dict[str, Any] = Field(default_factory=dict)  # that set's own settings
    size: Positive | None = None  # distinct training tasks; None: endless
    held_out_fraction: SplitFraction = 0.25
    timeout_s: PositiveFloat = 10.0  # of the verifier


class ReasoningGym(TaskSource):
    """The task source. `key` draws the held-out tasks, and together with `seed` the training tasks.
    Raises `ConfigError` for a set or a setting that does not exist."""

    name = "reasoning_gym"
    Options = ReasoningGymOptions

    def __init__(
        self,
        options: ReasoningGymOptions,
        *,
        seed: int,
        key: int | str,
        run_function: RunFunction,
        system: str | None = None,
    ) -> None:
        self.options = options
        self.seed, self.key = seed, key
        self.system = SYSTEM if system is None else system
        self.train_size = options.size
        self._run_function = run_function
        self._stream = functools.lru_cache(maxsize=16)(self._make_stream)
        self._check_dataset()

    def train(self, index: int) -> Task:
        position = index if self.train_size is None else index % self.train_size
        return self._task("train", position)

    def held_out(self, index: int) -> Task:
        return self._task("held-out", index)

    def _task(self, split: str, index: int) -> Task:
        block, item = divmod(index, _BLOCK)
        stream, entries = self._stream(split, block)
        entries.extend(itertools.islice(stream, max(0, item + 1 - len(entries))))
        if len(entries) <= item:
            raise ValueError(
                f"{self.options.dataset} has too few different questions for a {split} split: "
                f"{len(entries)} among {_ITEMS * _SETS}; widen task.options.config or change "
                "held_out_fraction"
            )
        entry = entries[item]
        content = digest(entry["question"])
        return Task(
            id=f"{self.options.dataset}-{split}-{index}-{content[:8]}",
            messages=with_system([{"role": "user", "content": entry["question"]}], self.system),
            source=self.name,
            truth=entry,
            info={"dataset": entry["metadata"].get("source_dataset", self.options.dataset)},
        )

    async def grade(self, task: Task, messages: Sequence[Message], end: End) -> Verdict:
        """Correct if the verifier gives the answer full marks; the answer is the last
        `<answer>...</answer>`, else the last boxed expression, else the last line."""
        if reason := unfinished(end):
            return self.options.verdict(False, reason)
        answer = read_answer(final_text(messages))
        if not answer:
            return self.options.verdict(False, "no answer found in the final message")
        result, problem = await run_verifier(
            self._run_function,
            "elpo_fast.tasks.gym_verifier:score",
            self._payload(task.truth, answer),
            self._payload(task.truth, str(task.truth["answer"])),
            self.options.timeout_s,
        )
        if result is None:
            return self.options.verdict(False, problem)
        if result["score"] >= 1:
            return self.options.verdict(True, f"the verifier accepts {shown(answer)}")
        because = result["error"] or f"it scores {result['score']:g}, not 1"
        return self.options.verdict(
            False, f"the verifier refuses {shown(answer)}: {shown(because)}"
        )

    def _payload(self, entry: Mapping[str, Any], answer: str) -> dict[str, Any]:
        return {
            "dataset": self.options.dataset,
            "config": self.options.config,
            "entry": pack_entry(entry),
            "answer": answer,
        }

    def _make_stream(
        self, split: str, block: int
    ) -> tuple[Iterator[dict[str, Any]], list[dict[str, Any]]]:
        """The entries of a block, still to come and (for the caller to fill) those taken."""
        draws = (self.key, self.seed) if split == "train" else (self.key,)

        def generate() -> Iterator[dict[str, Any]]:
            for number in range(_SETS):
                dataset = self._dataset(derived_seed(split, *draws, block, number))
                for item in range(_ITEMS):
                    entry = dataset[item]
                    held_out = is_held_out(
                        digest(entry["question"]), self.options.held_out_fraction
                    )
                    if held_out is (split == "held-out"):
                        yield entry

        return generate(), []

    def _dataset(self, seed: int) -> Any:
        return make_dataset(self.options.dataset, self.options.config, seed=seed, size=_ITEMS)

    def _check_dataset(self) -> None:
        from reasoning_gym.factory import DATASETS

        name = self.options.dataset
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else "see reasoning-gym's gallery"
            raise ConfigError(f"task.options.dataset: reasoning-gym has no set {name!r}; {hint}")
        known = set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"}
        for key in self.options.config:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
                raise ConfigError(f"unknown key task.options.config.{key} of {name}; {hint}")
        try:
            self._dataset(0)
        except Exception as error:  # the library checks by assert, TypeError, ValueError, ...
            message = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"task.options.config does not suit {name}: {message}") from None


def read_answer(text: str) -> str:
    """The answer that a final message gives; empty where it gives none."""
    for answer in (last_tagged(text), last_boxed(text)):
        if answer is not None:
            return answer
    return text.strip().rpartition("\n")[2].strip()
