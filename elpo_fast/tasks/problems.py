"""Problems out of records: which columns hold what, for one's own data and for known benchmarks.

A benchmark is read as it is published, from its files or from the Hub. What a model is shown of it
is a template of ours; what counts as right is what the benchmark's own grader says.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import pickle
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from elpo_fast.config import ConfigError, Section
from elpo_fast.tasks.answers import HASHES, Choice, choice_letter, forms_asked, last_match
from elpo_fast.tasks.common import digest, last_boxed, shown
from elpo_fast.tasks.records import Record, kind
from elpo_fast.tasks.unit_tests import Tests, read_program, read_tests
from elpo_fast.types import Message

Truth = tuple[str, ...] | Choice | Tests
"""Accepted forms of the answer, as LaTeX without `\\boxed`; or the right option; or tests."""

BOXED = "{question}\n\nPut your final answer in \\boxed{}."
LETTER = "{question}\n\nPut the letter of the correct option in \\boxed{}."
CODE = "{question}\n\nWrite it in Python, in one ```python block."
STDIN = (
    "{question}\n\nWrite a Python program that reads standard input and writes standard output, in "
    "one ```python block."
)
COMPLETE = (
    "Complete this code. Give all of it in one ```python block.\n\n```python\n{question}\n```"
)


class Columns(Section):
    """Which column holds what; `a.b` is field `b` of column `a`."""

    question: str  # text, or a list of messages
    answer: str | None = None  # the answer, or tests in a form of `unit_tests`
    tests: str | None = None  # tests alone
    system: str | None = None


VERL = Columns(question="prompt", answer="reward_model.ground_truth")


@dataclass(frozen=True, slots=True)
class Problem:
    question: str | tuple[Message, ...]
    truth: Truth | Any  # anything where the verdict is one's own
    template: str = BOXED  # for a question that is text
    system: str | None = None


class RowError(ValueError):
    """What is wrong with a record, one text a fault."""

    def __init__(self, *faults: str) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


Reader = Callable[[Record], Problem]


@dataclass(frozen=True, slots=True)
class Preset:
    """How a benchmark is read."""

    read: Reader
    path: str | None = None  # on the Hub
    split: str | None = None
    columns: str = ""  # those it needs, for people
    hidden: tuple[str, ...] = ()  # columns too large to be kept with every tree
    ids: Mapping[str, range] = field(default_factory=dict)  # splits of one file, by `task_id`


def by_columns(columns: Columns, pattern: str | None, *, judged: bool = True) -> Reader:
    """Reads records of one's own; `pattern`: see `FileOptions.answer_pattern`. Where they are not
    `judged` here, the truth is the answer as it stands, if there is a column for it."""

    def read(record: Record) -> Problem:
        faults: list[str] = []

        def attempt(function: Callable[..., Any], *args: Any) -> Any:
            try:
                return function(*args)
            except RowError as error:
                faults.extend(error.faults)
                return None

        question = attempt(_question, record, columns.question)
        system = columns.system and attempt(_text, record, columns.system)
        name = columns.tests or columns.answer
        if not judged:
            answer = name and attempt(_value, record, name, None)
            if faults:
                raise RowError(*faults)
            return Problem(question, answer, "{question}", system)
        assert name is not None
        truth = attempt(_truth, record, name, pattern, question or "", columns.tests is not None)
        if faults:
            raise RowError(*faults)
        return Problem(question, truth, _template(question, truth), system)

    return read


def _question(record: Record, name: str) -> str | tuple[Message, ...]:
    value = _value(record, name, (str, list))
    if isinstance(value, str):
        return value
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise RowError(f"column {name}: every message needs text role and content")
    if not any(message["role"] == "user" for message in value):
        raise RowError(f"column {name}: there is no user message")
    return tuple({k: v for k, v in message.items() if v is not None} for message in value)


def _truth(
    record: Record, name: str, pattern: str | None, question: Any, only_tests: bool
) -> Truth:
    value = _value(record, name, None)
    try:
        tests = read_tests(value, **_tested(record, question))
    except ValueError as error:
        raise RowError(f"column {name}: {error}") from None
    if tests is not None:
        return tests
    if only_tests or "code" in str(record.get("ability") or "").lower():
        raise RowError(
            f"column {name}: a program is judged by running tests, and this holds none; "
            "task.options.data_sources names the rows to use"
        )
    forms = value if isinstance(value, list) else [value]
    if any(isinstance(form, bool) or not isinstance(form, (str, int, float)) for form in forms):
        raise RowError(f"column {name}: must be text, a number or tests, not {kind(value)}")
    texts = [str(form).strip() for form in forms]
    if pattern is not None:
        found = [last_match(pattern, text) for text in texts]
        texts = [part or text for part, text in zip(found, texts, strict=True)]
    elif any("####" in text for text in texts):
        raise RowError(
            f"column {name}: the answer stands after ####; set "
            f"task.options.answer_pattern={json.dumps(HASHES)}"
        )
    if not texts or not all(texts) or "nan" in texts:
        raise RowError(f"column {name}: is empty")
    return answers(texts)


def answers(texts: Sequence[str]) -> tuple[str, ...] | Choice:
    """Ground truths as they are compared: one letter is an option."""
    plain = tuple(last_boxed(text) or text.strip("$") for text in texts)
    letter = choice_letter(plain[0]) if len(plain) == 1 else None
    if letter in tuple("ABCDEFGHIJ") and not re.search(r"\s[-–—]\s", plain[0]):
        return Choice(str(letter))
    return plain


def _tested(record: Record, question: Any) -> dict[str, str]:
    """Name of the function to test and the code it is to complete, if they are said."""
    extra = record.get("extra_info")
    entry = record.get("entry_point") or (isinstance(extra, dict) and extra.get("entry_point"))
    asked = question if isinstance(question, str) else question[-1]["content"] if question else ""
    for code in (asked, read_program(asked) or ""):
        try:
            defined = [n.name for n in ast.parse(code).body if isinstance(n, ast.FunctionDef)]
        except (SyntaxError, ValueError):
            continue
        if defined:
            return {"entry": str(entry or defined[-1]), "setup": code}
    return {"entry": str(entry or "")}


def _template(question: Any, truth: Truth) -> str:
    """What to add to a question that does not say how to answer."""
    if not isinstance(question, str):
        return "{question}"
    if isinstance(truth, Choice):
        return "{question}" if forms_asked(question) else LETTER
    if isinstance(truth, tuple) and isinstance(truth[0], str):
        return "{question}" if forms_asked(question) else BOXED
    return "{question}" if "```" in question else CODE


def _text(record: Record, name: str) -> str:
    return _value(record, name, (str,))


def _value(record: Record, name: str, kinds: tuple[type, ...] | None) -> Any:
    """The value at a dotted name, not empty; `RowError` names what is there instead."""
    value: Any = record
    done: list[str] = []
    for part in name.split(".") if name not in record else [name]:
        if not isinstance(value, Mapping):
            raise RowError(f"column {'.'.join(done)}: must be an object, not {kind(value)}")
        if part not in value:
            if done:
                raise RowError(f"column {'.'.join(done)}: has no {part}; it has {_names(value)}")
            raise RowError(f"column {part}: there is no such column; columns: {_names(value)}")
        done.append(part)
        value = value[part]
    empty = value is None or (isinstance(value, (str, list, dict)) and not value)
    if empty or (kinds and not isinstance(value, kinds)):
        names: dict[type, str] = {str: "text", list: "messages"}
        wanted = " or ".join(names[k] for k in kinds) if kinds else "a value"
        raise RowError(f"column {name}: must be {wanted}, not {kind(value)}")
    return value


def _names(value: Mapping[str, Any]) -> str:
    return shown(", ".join(value) or "none", 200)


# --- benchmarks --------------------------------------------------------------------------------


def _one_of(record: Record, *names: str) -> Any:
    """The column that goes by one of these names."""
    for name in names:
        if name in record:
            return _value(record, name, None)
    raise RowError(f"column {names[0]}: there is no such column; columns: {_names(record)}")


def _gsm8k(record: Record) -> Problem:
    question, solution = _text(record, "question"), _text(record, "answer")
    answer = last_match(HASHES, solution)
    if answer is None:
        raise RowError(f"column answer: must end in #### and a number, not {shown(solution)}")
    return Problem(question, (answer,))


def _mathematics(record: Record) -> Problem:
    """MATH-500 and AIME, whose copies spell their columns in several ways."""
    question = str(_one_of(record, "problem", "Problem", "question"))
    return Problem(question, (str(_one_of(record, "answer", "Answer")).strip(),))


def _gpqa(record: Record) -> Problem:
    """The options in an order that depends on the question alone."""
    question, right = _text(record, "Question").strip(), _text(record, "Correct Answer").strip()
    options = [right, *(_text(record, f"Incorrect Answer {n}").strip() for n in (1, 2, 3))]
    random.Random(digest(question)).shuffle(options)
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=True))
    return Problem(f"{question}\n\n{listed}", Choice("ABCD"[options.index(right)], right), LETTER)


def _humaneval(record: Record) -> Problem:
    prompt, test = _text(record, "prompt"), _text(record, "test")
    entry = _text(record, "entry_point")
    return Problem(prompt.strip("\n"), _tests(test, entry=entry, setup=prompt), COMPLETE)


def _mbpp(record: Record) -> Problem:
    text, tests = str(_one_of(record, "text", "prompt")), _value(record, "test_list", None)
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or ())
    defined = re.findall(r"^def (\w+)", record.get("code") or "", re.MULTILINE)
    entry = next((name for name in defined if re.search(rf"\b{name}\b", tests[0])), "")
    question = f"{text}\n\nIt has to pass these tests:\n\n" + "\n".join(tests)
    return Problem(question, _tests(tests, entry=entry, setup=setup), CODE)


def _livecodebench(record: Record) -> Problem:
    question = _text(record, "question_content")
    metadata = record.get("metadata") or "{}"
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    cases = [
        case
        for column in ("public_test_cases", "private_test_cases")
        for case in _unpacked(record.get(column) or "[]")
    ]
    starter = record.get("starter_code") or ""
    if starter:
        question += f"\n\nIt starts so:\n\n```python\n{starter}\n```"
    truth = {
        "inputs": [case["input"] for case in cases],
        "outputs": [case["output"] for case in cases],
        "fn_name": name if cases and cases[0]["testtype"] == "functional" else None,
    }
    return Problem(question, _tests(truth), CODE if truth["fn_name"] else STDIN)


def _tests(truth: Any, **known: str) -> Tests:
    try:
        tests = read_tests(truth, **known)
    except ValueError as error:
        raise RowError(f"the tests cannot be used: {error}") from None
    if tests is None:
        raise RowError(f"the tests cannot be used: {shown(str(truth))} asserts nothing")
    return tests


class _TextOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} has no business in test cases")


def _unpacked(cases: str) -> list[Any]:
    """Test cases: JSON, or JSON pickled, compressed and in base 64."""
    try:
        return json.loads(cases)
    except ValueError:
        try:
            packed = zlib.decompress(base64.b64decode(cases))
            return json.loads(_TextOnly(io.BytesIO(packed)).load())
        except (ValueError, TypeError, zlib.error, pickle.UnpicklingError, EOFError) as error:
            raise RowError(f"column private_test_cases: cannot be unpacked: {error}") from None


_MATHEMATICS = "problem, answer"
_MBPP_IDS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}
PRESETS: dict[str, Preset] = {
    "gsm8k": Preset(_gsm8k, "hf:openai/gsm8k:main", "test", "question, answer"),
    "math500": Preset(_mathematics, "hf:HuggingFaceH4/MATH-500", "test", _MATHEMATICS),
    "aime24": Preset(_mathematics, "hf:HuggingFaceH4/aime_2024", "train", _MATHEMATICS),
    "aime25": Preset(_mathematics, "hf:math-ai/aime25", "test", _MATHEMATICS),
    "gpqa": Preset(
        *(_gpqa, "hf:Idavidrein/gpqa:gpqa_diamond", "train"),
        "Question, Correct Answer, Incorrect Answer 1, Incorrect Answer 2, Incorrect Answer 3",
    ),
    "humaneval": Preset(
        *(_humaneval, "hf:openai/openai_humaneval", "test", "prompt, test, entry_point")
    ),
    "mbpp": Preset(
        *(_mbpp, "hf:google-research-datasets/mbpp:full", "test", "text, code, test_list"),
        ids=_MBPP_IDS,
    ),
    "livecodebench": Preset(
        *(_livecodebench, "hf:livecodebench/code_generation_lite:test.jsonl", None),
        "question_content, starter_code, public_test_cases, private_test_cases, metadata",
        hidden=("public_test_cases", "private_test_cases"),
    ),
    "verl": Preset(by_columns(VERL, None)),
    "openagentrl": Preset(by_columns(VERL, None), "hf:Gen-Verse/Open-AgentRL-30K", "train"),
}


def preset(name: str) -> Preset:
    """By its name, in any spelling. `ConfigError` for an unknown one."""
    found = PRESETS.get(re.sub(r"[-_ ]", "", name.lower()))
    if found is None:
        raise ConfigError(
            f"task.options.preset={name} is not known; known: {', '.join(PRESETS)}; "
            "other data is described by task.options.columns"
        )
    return found


def preset_of(record: Record) -> str | None:
    """The benchmark whose columns a record has."""
    names = (
        name
        for name, known in PRESETS.items()
        if known.columns and set(known.columns.split(", ")) <= set(record)
    )
    return next(names, None)
