r"""`file`: tasks from one's own data or from a known benchmark (see `docs/data.md`).

Invariants
- Every column but the question goes unchanged into `Task.info`: reward metadata is never lost.
- A row that cannot be used is refused, all of them in one message, with the places they stand at.
- A prompt is either trained on or held out. By default its hash decides; with held-out data of its
  own, a prompt in both is refused. A benchmark's test data is all held out.
- Answers are compared by math-verify, in the sandbox; options of a multiple choice by their letter;
  programs are judged by running tests (`unit_tests`).
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from elpo_fast.config import ConfigError, PositiveFloat
from elpo_fast.tasks.answers import Choice, forms_asked, read_answer
from elpo_fast.tasks.common import (
    FirstJudged,
    RewardOptions,
    RunFunction,
    asked,
    final_text,
    is_held_out,
    run_verifier,
    shown,
    unfinished,
    with_system,
)
from elpo_fast.tasks.problems import (
    VERL,
    Columns,
    Preset,
    Problem,
    RowError,
    Truth,
    by_columns,
    preset,
    preset_of,
)
from elpo_fast.tasks.records import HUB, Faults, Record, read
from elpo_fast.tasks.unit_tests import judge, read_program
from elpo_fast.types import End, Message, Task, TaskSource, Verdict

_log = logging.getLogger(__name__)


class FileOptions(RewardOptions):
    # a .jsonl, .json, .csv (or .gz of these) or .parquet file, a folder of them, hf:org/name, or
    # module:function of your own that gives the rows; None: the preset's, on the Hub
    path: str | None = None
    arguments: dict[str, Any] = Field(default={})  # of such a function
    preset: str | None = None  # a benchmark: gsm8k, math500, ... (docs/data.md)
    split: str | None = None  # of a folder or of hf:org/name
    columns: Columns | None = None  # which column holds what; None: verl's, as Open-AgentRL has it
    template: str | None = None  # what is asked, with {question} in it; None: by the kind of answer
    # a regular expression whose last match's first group is the answer, in the answer's column and
    # in what the model says; None: what the prompt asks for, or \boxed{...}
    answer_pattern: str | None = None
    overlong: Literal["refuse", "drop"] = (
        "refuse"  # prompts that rollout.max_tokens has no room for
    )
    held_out_path: str | None = None  # other data, all of it held out
    held_out_split: str | None = None  # of held_out_path, or of path
    # of `path`, by content; default 0.05, of a benchmark's test data 1
    held_out_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    data_sources: tuple[str, ...] | None = None  # rows of these data_source only; None: all
    timeout_s: PositiveFloat = 10.0  # of the verifier, or of one test

    @model_validator(mode="after")
    def _check(self) -> FileOptions:
        if self.path is None and (self.preset is None or preset(self.preset).path is None):
            raise ValueError("set path to a file, a folder or hf:org/name, or a preset")
        if self.preset is not None and self.columns is not None:
            raise ValueError("a preset knows its columns; drop one of preset and columns")
        if self.arguments and ":" not in (self.path or ""):
            raise ValueError("arguments are for a path of the form module:function; drop them")
        if self.template is not None and "{question}" not in self.template:
            raise ValueError("template must have {question} in it")
        other = self.held_out_path is not None or self.held_out_split is not None
        if other and self.held_out_fraction is not None:
            raise ValueError(
                "held_out_path (or held_out_split) and held_out_fraction exclude each other; "
                "drop one"
            )
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise ValueError(f"answer_pattern is not a regular expression: {error}") from None
        return self


@dataclass(frozen=True, slots=True)
class _Row:
    place: str  # "FILE line N" or "FILE row N", for messages
    number: int
    prompt: tuple[Message, ...]
    truth: Truth
    info: Mapping[str, Any]

    @property
    def content(self) -> str:
        return asked(self.prompt)


class FileSource(TaskSource):
    """The task source. Training tasks come in an order shuffled by the run's seed, the same in
    every epoch; held-out tasks in the file's order."""

    name = "file"
    Options = FileOptions

    def __init__(
        self,
        options: FileOptions,
        *,
        seed: int,
        run_function: RunFunction,
        system: str | None = None,
        judged: bool = True,
    ) -> None:
        """`judged`: by `grade`, so that every row needs a truth that it understands."""
        columns = options.columns or (VERL if judged else Columns(question="prompt"))
        if judged and not (columns.answer or columns.tests):
            raise ConfigError(
                "task.options.columns needs answer or tests beside question, or set task.reward"
            )
        self.options = options
        self.system = system
        self._columns = columns
        self._run_function = run_function
        self._first = FirstJudged()
        known = preset(options.preset) if options.preset is not None else None
        self._read_record = (
            known.read if known else by_columns(columns, options.answer_pattern, judged=judged)
        )
        path = options.path or (known and known.path) or ""
        split = options.split
        if known and split is None and (known.ids or path.startswith(HUB)):
            split = known.split
        rows = self._read(path, split, known)
        if options.held_out_path is None and options.held_out_split is None:
            tests = known is not None and bool(known.columns) and options.split is None
            fraction = options.held_out_fraction or (1.0 if tests else 0.05)
            held_out = [is_held_out(row.content, fraction) for row in rows]
            self._held_out = [row for row, held in zip(rows, held_out, strict=True) if held]
            self._train = [row for row, held in zip(rows, held_out, strict=True) if not held]
            if not self._train and fraction < 1:
                raise ConfigError(f"{path} leaves no training task; give it more rows")
        else:
            other = options.held_out_path or path
            self._train = rows
            self._held_out = self._read(other, options.held_out_split, known)
            held_out_rows = {row.content: row for row in self._held_out}
            shared = [row for row in rows if row.content in held_out_rows]
            if shared:
                raise ConfigError(
                    f"{len(shared)} of {len(rows)} training prompts are held out too, first "
                    f"{shared[0].place} = {held_out_rows[shared[0].content].place}; "
                    "remove them from one file"
                )
        self.path = path
        self.train_size, self.held_out_size = len(self._train), len(self._held_out)
        random.Random(seed).shuffle(self._train)
        if judged:
            self._say_what_to_look_at()

    def train(self, index: int) -> Task:
        return self._task("train", self._train, index)

    def held_out(self, index: int) -> Task:
        return self._task("held-out", self._held_out, index)

    def _task(self, split: str, rows: Sequence[_Row], index: int) -> Task:
        if not rows:
            raise ConfigError(
                f"{self.path} leaves no {split} task; set task.options.held_out_fraction "
                f"{'lower' if split == 'train' else 'higher'} or give a held_out_path"
            )
        row = rows[index % len(rows)]
        return Task(
            id=f"file-{split}-{row.number}-{row.content[:8]}",
            messages=with_system(row.prompt, self.system),
            source=self.name,
            truth=row.truth,
            info=row.info,
        )

    def fit_prompts(self, tokens: Callable[[Sequence[Message]], Sized], limit: int) -> None:
        """Leave out the tasks whose prompts have `limit` tokens or more, and say how many; or
        refuse them by a `ConfigError`, as `overlong` says. `tokens`: of a conversation."""
        rows = [*self._train, *self._held_out]
        # No text has more tokens than bytes; around it is no more than there is of a short prompt.
        sizes = [sum(len(m["content"].encode()) for m in self._shown(row)) for row in rows]
        around = len(tokens(self._shown(rows[sizes.index(min(sizes))])))
        long: dict[str, int] = {}
        for row, size in zip(rows, sizes, strict=True):
            if size + around * len(self._shown(row)) >= limit:
                count = len(tokens(self._shown(row)))
                if count >= limit:
                    long[row.place] = count
        if not long:
            return
        first, most = next(iter(long)), max(long.values())
        problem = (
            f"{len(long)} of {len(rows)} prompts have no room for an answer in "
            f"rollout.max_tokens={limit} (first {first} with {long[first]} tokens, at most {most})"
        )
        if self.options.overlong == "refuse" or len(long) == len(rows):
            raise ConfigError(f"{problem}; raise it or set task.options.overlong=drop")
        _log.warning("%s; they are left out", problem)
        self._train = [row for row in self._train if row.place not in long]
        self._held_out = [row for row in self._held_out if row.place not in long]
        self.train_size, self.held_out_size = len(self._train), len(self._held_out)

    async def grade(self, task: Task, messages: Sequence[Message], end: End) -> Verdict:
        """Correct if the final message's answer is the ground truth, or its program passes the
        tests. The first one is shown with its verdict, for people to check what is rewarded."""
        verdict = await self._grade(task, messages, end)
        self._first.show(messages, verdict)
        return verdict

    async def _grade(self, task: Task, messages: Sequence[Message], end: End) -> Verdict:
        if reason := unfinished(end):
            return self.options.verdict(False, reason)
        said, truth = final_text(messages), task.truth
        if not _has_answer(truth):
            code = read_program(said)
            if code is None:
                return self.options.verdict(False, "no block of Python in the final message")
            passed = await judge(self._run_function, truth, code, self.options.timeout_s)
            return self.options.verdict(*passed)
        forms = _forms(task.messages)
        answer = read_answer(said, forms, self.options.answer_pattern)
        if not answer:
            wanted = r"no \boxed{...} answer" if forms <= {"boxed"} else "no answer as asked for"
            return self.options.verdict(False, f"{wanted} in the final message")
        if isinstance(truth, Choice):
            right = truth.chosen(answer)
            expected = "as expected" if right else f"expected {truth.letter}"
            return self.options.verdict(right, f"answered {shown(answer)}, {expected}")
        expected = " or ".join(map(shown, truth))
        if any(_same_words(answer, form) for form in truth):
            return self.options.verdict(True, f"answered {shown(answer)}, as expected")
        result, problem = await run_verifier(
            self._run_function,
            "elpo_fast.tasks.math_verifier:equal",
            {"answer": answer, "truths": list(truth)},
            {"answer": truth[0], "truths": list(truth)},
            self.options.timeout_s,
        )
        if result is None:
            return self.options.verdict(False, problem)
        if result["correct"]:
            return self.options.verdict(True, f"answered {shown(answer)}, equal to {expected}")
        return self.options.verdict(False, f"answered {shown(answer)}, expected {expected}")

    def _shown(self, row: _Row) -> tuple[Message, ...]:
        return with_system(row.prompt, self.system)

    def _read(self, path: str, split: str | None, known: Preset | None) -> list[_Row]:
        by_id = known.ids.get(split or "") if known and not path.startswith(HUB) else None
        faults = Faults(path)
        wanted = self.options.data_sources
        rows: list[_Row] = []
        found: set[str] = set()
        example: Record = {}
        records = read(path, None if by_id else split, faults, self.options.arguments)
        for number, (where, record) in enumerate(records):
            example = example or record
            source = str(record.get("data_source"))
            found.add(source)
            if wanted is not None and source not in wanted:
                continue
            if by_id and record.get("task_id") not in by_id:
                continue
            try:
                problem = self._read_record(record)
                rows.append(self._row(record, problem, f"{path} {where}", number, known))
            except RowError as error:
                for fault in error.faults:
                    faults.add(where, fault)
        missing = sorted(set(wanted or ()) - found)
        if missing:
            raise ConfigError(
                f"{path} has no rows of data_source {', '.join(missing)}; "
                f"it has {', '.join(sorted(found)) or 'no rows'}"
            )
        faults.check(len(rows) + len(faults), self._expected(known, example))
        if not rows:
            raise ConfigError(f"{path} has no rows")
        return rows

    def _row(
        self, record: Record, problem: Problem, place: str, number: int, known: Preset | None
    ) -> _Row:
        question = self._columns.question
        left_out = (*known.hidden, question) if known else (question,)
        info = {key: value for key, value in record.items() if key not in left_out}
        try:
            info = json.loads(json.dumps(info, default=_dated))
        except (TypeError, ValueError) as error:
            raise RowError(f"a column cannot be kept as JSON: {error}") from None
        prompt = problem.question
        if isinstance(prompt, str):
            template = self.options.template or problem.template
            prompt = ({"role": "user", "content": template.replace("{question}", prompt)},)
        return _Row(place, number, with_system(prompt, problem.system), problem.truth, info)

    def _expected(self, known: Preset | None, record: Record) -> str:
        """What a row looks like that could be used."""
        if known and known.columns:
            return f"preset {self.options.preset} reads the columns {known.columns}"
        columns = self._columns
        if columns != VERL:
            example: dict[str, Any] = {columns.question: "What is 6 times 7?"}
            if columns.answer:
                example[columns.answer] = "42"
            if columns.tests:
                example[columns.tests] = ["assert f(6, 7) == 42"]
        else:
            prompt = [{"role": "user", "content": "What is 6 times 7?"}]
            example = {"prompt": prompt, "reward_model": {"ground_truth": "42"}}
        hint = "; other columns are named in task.options.columns, as {question: ..., answer: ...}"
        if like := preset_of(record):
            hint = f"; if this is {like}, set task.options.preset={like}{hint}"
        return f"expected rows such as {json.dumps(example)}{hint}"

    def _say_what_to_look_at(self) -> None:
        """Rows that can be used but may not be meant so."""
        rows = [row for row in (*self._train, *self._held_out) if _has_answer(row.truth)]
        silent = [row for row in rows if not _forms(self._shown(row))]
        if silent and self.options.answer_pattern is None:
            _log.warning(
                "%d of %d prompts do not say in which form to answer, first %s; the verdict reads "
                "\\boxed{...}, so ask for it in task.system",
                *(len(silent), len(rows), silent[0].place),
            )
        prose = [row for row in rows if isinstance(row.truth, tuple) and _is_prose(row.truth)]
        if prose:
            _log.warning(
                "%d of %d ground truths are prose, first %s; answers count only in the same words, "
                "so leave these rows out",
                *(len(prose), len(rows), prose[0].place),
            )


def _has_answer(truth: Truth) -> bool:
    return isinstance(truth, Choice) or (isinstance(truth, tuple) and isinstance(truth[0], str))


def _forms(messages: Sequence[Message]) -> frozenset[str]:
    return forms_asked("\n".join(message["content"] for message in messages))


def _same_words(one: str, other: str) -> bool:
    """Equal, words up to case."""
    return one == other or (len(one) > 1 and one.isalpha() and one.casefold() == other.casefold())


def _is_prose(truth: Truth) -> bool:
    """Whether no form of an answer is anything that could be calculated."""
    assert isinstance(truth, tuple)
    return all(len(re.findall(r"(?<![\\\w])[a-z]{3,}\b", str(form))) > 5 for form in truth)


def _dated(value: Any) -> str:
    if isinstance(value, date):  # and times
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")
