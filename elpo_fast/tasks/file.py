r"""`file`: mathematics and code tasks from JSONL or Parquet in the Open-AgentRL (verl) schema.

    data_source   text                        prompt        [{"role": ..., "content": ...}, ...]
    ability       text (optional)             reward_model  {"ground_truth": text or number, ...}
    extra_info    {"index": ..., ...} (optional)

Invariants
- Every column but the prompt goes unchanged into `Task.info`: reward metadata is never lost.
- A row without a usable prompt or ground truth is refused, naming file, line (JSONL, from 1) or row
  (Parquet, from 0) and column.
- A prompt is either trained on or held out. By default its hash decides; with a held-out file, a
  prompt in both files is refused.
- The verdict compares the last `\boxed{...}` with the ground truth by math-verify, in the sandbox.
  Where the ground truth is test cases (see `unit_tests`), the last fenced block of Python must pass
  them all. Other forms are refused, not misjudged; `data_sources` picks the rows to use.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator

from elpo_fast.config import ConfigError, PositiveFloat
from elpo_fast.tasks.common import (
    RewardOptions,
    RunFunction,
    SplitFraction,
    digest,
    final_text,
    is_held_out,
    last_boxed,
    prompt_texts,
    run_verifier,
    shown,
    unfinished,
    with_system,
)
from elpo_fast.tasks.unit_tests import Tests, judge, read_program, read_tests
from elpo_fast.types import End, Message, Task, Verdict


class FileOptions(RewardOptions):
    path: str  # .jsonl or .parquet
    held_out_path: str | None = None  # a second file, all of it held out
    held_out_fraction: SplitFraction | None = None  # of `path`, by content; default 0.05
    data_sources: tuple[str, ...] | None = None  # rows of these data_source only; None: all
    timeout_s: PositiveFloat = 10.0  # of the verifier, or of one test

    @model_validator(mode="after")
    def _check(self) -> FileOptions:
        if self.held_out_path is not None and self.held_out_fraction is not None:
            raise ValueError("held_out_path and held_out_fraction exclude each other; drop one")
        return self


@dataclass(frozen=True, slots=True)
class _Row:
    place: str  # "FILE line N" or "FILE row N", for messages
    number: int
    prompt: tuple[Message, ...]
    truth: tuple[str, ...] | Tests
    info: Mapping[str, Any]

    @property
    def content(self) -> str:
        """Hash of what is asked, system messages and differences in white space left out."""
        said = [" ".join(m["content"].split()) for m in self.prompt if m["role"] != "system"]
        return digest("\x1f".join(said))


class FileSource:
    """The task source. Training tasks come in an order shuffled by the run's seed, the same in
    every epoch; held-out tasks in the file's order."""

    name = "file"

    def __init__(
        self,
        options: FileOptions,
        *,
        seed: int,
        run_function: RunFunction,
        system: str | None = None,
    ) -> None:
        self.options = options
        self.system = system
        self._run_function = run_function
        rows = self._read(options.path)
        if options.held_out_path is None:
            fraction = options.held_out_fraction or 0.05
            held_out = [is_held_out(row.content, fraction) for row in rows]
            self._held_out = [row for row, held in zip(rows, held_out, strict=True) if held]
            self._train = [row for row, held in zip(rows, held_out, strict=True) if not held]
        else:
            self._train, self._held_out = rows, self._read(options.held_out_path)
            held_out_rows = {row.content: row for row in self._held_out}
            shared = [row for row in rows if row.content in held_out_rows]
            if shared:
                raise ConfigError(
                    f"{len(shared)} of {len(rows)} training prompts are held out too, first "
                    f"{shared[0].place} = {held_out_rows[shared[0].content].place}; "
                    "remove them from one file"
                )
        if not self._train:
            raise ConfigError(f"{options.path} leaves no training task; give it more rows")
        random.Random(seed).shuffle(self._train)

    @property
    def train_size(self) -> int:
        return len(self._train)

    @property
    def held_out_size(self) -> int:
        return len(self._held_out)

    def train(self, index: int) -> Task:
        return self._task("train", self._train[index % len(self._train)])

    def held_out(self, index: int) -> Task:
        if not self._held_out:
            raise ConfigError(
                f"{self.options.path} leaves no held-out task; set task.options.held_out_fraction "
                "higher or give a held_out_path"
            )
        return self._task("held-out", self._held_out[index % len(self._held_out)])

    def _task(self, split: str, row: _Row) -> Task:
        return Task(
            id=f"file-{split}-{row.number}-{row.content[:8]}",
            messages=with_system(row.prompt, self.system),
            source=self.name,
            truth=row.truth,
            info=row.info,
        )

    def demonstration(self, task: Task) -> None:
        return None

    def vocabulary_texts(self) -> list[str]:
        """Texts to make a small tokenizer from: the first training tasks."""
        return prompt_texts(self)

    async def grade(self, task: Task, messages: Sequence[Message], end: End) -> Verdict:
        r"""Correct if the last `\boxed{...}` of the final message equals the ground truth, or its
        program passes the tests."""
        if reason := unfinished(end):
            return self.options.verdict(False, reason)
        if not isinstance(task.truth, tuple) or not isinstance(task.truth[0], str):
            code = read_program(final_text(messages))
            if code is None:
                return self.options.verdict(False, "no block of Python in the final message")
            passed = await judge(self._run_function, task.truth, code, self.options.timeout_s)
            return self.options.verdict(*passed)
        answer = last_boxed(final_text(messages))
        if not answer:
            return self.options.verdict(False, r"no \boxed{...} answer in the final message")
        expected = " or ".join(map(shown, task.truth))
        if answer in task.truth:
            return self.options.verdict(True, f"answered {shown(answer)}, as expected")
        result, problem = await run_verifier(
            self._run_function,
            "elpo_fast.tasks.math_verifier:equal",
            {"answer": answer, "truths": list(task.truth)},
            {"answer": task.truth[0], "truths": list(task.truth)},
            self.options.timeout_s,
        )
        if result is None:
            return self.options.verdict(False, problem)
        if result["correct"]:
            return self.options.verdict(True, f"answered {shown(answer)}, equal to {expected}")
        return self.options.verdict(False, f"answered {shown(answer)}, expected {expected}")

    def _read(self, path: str) -> list[_Row]:
        wanted = self.options.data_sources
        rows = []
        found: set[str] = set()
        for number, (where, record) in enumerate(_records(Path(path))):
            place = f"{path} {where}"
            source = _column(record, "data_source", str, place)
            found.add(source)
            if wanted is None or source in wanted:
                rows.append(_row(record, source, place, number))
        missing = sorted(set(wanted or ()) - found)
        if missing:
            raise ConfigError(
                f"{path} has no rows of data_source {', '.join(missing)}; "
                f"it has {', '.join(sorted(found)) or 'no rows'}"
            )
        if not rows:
            raise ConfigError(f"{path} has no rows")
        return rows


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The file's rows as mappings, each with the words to name it by."""
    if not path.is_file():
        raise ConfigError(f"task file {path} does not exist")
    match path.suffix:
        case ".jsonl":
            yield from _json_lines(path)
        case ".parquet":
            import pyarrow.parquet

            try:
                records = pyarrow.parquet.read_table(path).to_pylist()
            except (pyarrow.ArrowException, OSError) as error:
                raise ConfigError(f"{path} is not readable Parquet: {shown(str(error))}") from None
            for number, record in enumerate(records):
                yield f"row {number}", record
        case suffix:
            raise ConfigError(f"task file {path} ends in {suffix!r}; use .jsonl or .parquet")


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{path} line {number} must be an object, not {_kind(record)}")
        yield f"line {number}", record


def _row(record: Mapping[str, Any], source: str, place: str, number: int) -> _Row:
    prompt = _column(record, "prompt", list, place)
    for message in prompt:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ConfigError(f"{place}, column prompt: every message needs text role and content")
    if not any(message["role"] == "user" for message in prompt):
        raise ConfigError(f"{place}, column prompt: there is no user message")
    reward_model = _column(record, "reward_model", dict, place)
    info = {key: value for key, value in record.items() if key != "prompt"}
    try:
        json.dumps(info)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: a column cannot be kept as JSON: {error}") from None
    return _Row(
        place=place,
        number=number,
        prompt=tuple({k: v for k, v in m.items() if v is not None} for m in prompt),
        truth=_truth(reward_model, source, str(record.get("ability") or ""), place),
        info=info,
    )


def _truth(
    reward_model: Mapping[str, Any], source: str, ability: str, place: str
) -> tuple[str, ...] | Tests:
    """The ground truth's accepted forms, as LaTeX without `\\boxed`, or the tests of a program."""
    truth = reward_model.get("ground_truth")
    try:
        tests = read_tests(truth)
    except ValueError as error:
        raise ConfigError(f"{place}, column reward_model: {error}") from None
    if tests is not None:
        return tests
    if "code" in ability.lower():
        raise ConfigError(
            f"{place}: data_source {source!r} is judged by running tests, and this ground_truth "
            "has none; name the sources to use in task.options.data_sources"
        )
    forms = truth if isinstance(truth, list) else [truth]
    if any(isinstance(form, bool) or not isinstance(form, (str, int, float)) for form in forms):
        raise ConfigError(
            f"{place}, column reward_model: ground_truth must be text or a number, "
            f"not {_kind(truth)}"
        )
    texts = tuple(str(form).strip() for form in forms)
    if not texts or not all(texts) or "nan" in texts:
        raise ConfigError(f"{place}, column reward_model: ground_truth is empty")
    return tuple(last_boxed(text) or text.strip("$") for text in texts)


def _column(record: Mapping[str, Any], name: str, kind: type, place: str) -> Any:
    value = record.get(name)
    if not isinstance(value, kind) or not value:
        known = ", ".join(record) or "none"
        problem = (
            f"there is no such column; columns: {known}"
            if name not in record
            else f"must be a non-empty {_NAMES[kind]}, not {_kind(value)}"
        )
        raise ConfigError(f"{place}, column {name}: {problem}")
    return value


_NAMES: dict[Any, str] = {str: "text", list: "list", dict: "object"}


def _kind(value: Any) -> str:
    """A value's kind in the words of the file format."""
    if value is None:
        return "null"
    if isinstance(value, (str, list, dict)) and not value:
        return f"an empty {_NAMES[type(value)]}"
    return _NAMES.get(type(value), type(value).__name__)
