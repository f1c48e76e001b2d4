"""Data as people have it: files of every kind, columns by name, benchmarks as published."""

from __future__ import annotations

import asyncio
import base64
import csv
import gzip
import json
import logging
import pickle
import re
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from elpo_fast.config import ConfigError, TaskConfig, parse_config, parse_section
from elpo_fast.tasks import make_source
from elpo_fast.tasks.answers import Choice
from elpo_fast.tasks.file import FileOptions, FileSource
from elpo_fast.tasks.problems import BOXED, LETTER, PRESETS
from elpo_fast.types import End, Task

ROWS = [{"problem": f"What is {n}?", "solution": f"It is #### {n}"} for n in range(6)]
COLUMNS = {"question": "problem", "answer": "solution"}
SAMPLES = Path(__file__).parents[1] / "data"


def source(run_function: Any = None, system: str | None = None, **options: Any) -> FileSource:
    parsed = FileOptions(**{"held_out_fraction": 1, **options})
    return FileSource(parsed, seed=0, run_function=run_function, system=system)


def mine(path: Path, **options: Any) -> FileSource:
    return source(path=str(path), columns=COLUMNS, answer_pattern="#### (.+)", **options)


def held_out(found: FileSource) -> list[Task]:
    return [found.held_out(index) for index in range(found.held_out_size)]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match path.name.partition(".")[2]:
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case "json":
            path.write_text(json.dumps(rows))
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_files_of_every_kind_give_the_same_tasks(tmp_path: Path, name: str) -> None:
    tasks = held_out(mine(write(tmp_path / name)))
    assert [task.truth for task in tasks] == [(str(n),) for n in range(6)]
    asked = BOXED.replace("{question}", "What is 0?")
    assert tasks[0].messages == ({"role": "user", "content": asked},)
    assert tasks[0].info == {"solution": "It is #### 0"}


def test_lines_in_a_json_file_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert mine(path).held_out_size == 6


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:2])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[2:3])
    write(tmp_path / "data" / "test.jsonl", ROWS[3:])
    (tmp_path / "README.md").write_text("nothing")
    assert mine(tmp_path).held_out_size == 6
    assert [task.truth for task in held_out(mine(tmp_path, split="test"))] == [
        ("3",),
        ("4",),
        ("5",),
    ]
    both = mine(tmp_path, split="train", held_out_split="test", held_out_fraction=None)
    assert (both.train_size, both.held_out_size) == (3, 3)
    message = f"{tmp_path} has no files of split dev; it has data/test.jsonl, data/train-00000"
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        mine(tmp_path, split="dev")
    with pytest.raises(ConfigError, match=r"is one file; task\.options\.split=test is for folders"):
        mine(tmp_path / "data" / "test.jsonl", split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no data files; use \.jsonl, \.json"):
        mine(tmp_path / "empty")


def test_a_data_set_of_the_hub_is_read_by_split(tmp_path: Path, monkeypatch: Any) -> None:
    """A local folder stands in for the Hub, of which there is none here."""
    pytest.importorskip("datasets")
    write(tmp_path / "org" / "name" / "train.jsonl", ROWS[:2])
    write(tmp_path / "org" / "name" / "test.jsonl", ROWS[2:])
    monkeypatch.chdir(tmp_path)
    assert mine(Path("hf:org/name"), split="test").held_out_size == 4
    with pytest.raises(ConfigError, match=r"hf:org/name has the splits train, test; name one in t"):
        mine(Path("hf:org/name"))
    with pytest.raises(ConfigError, match=r"hf:org/name cannot be loaded: .*dev"):
        mine(Path("hf:org/name"), split="dev")


def test_columns_name_tests_and_system_messages(tmp_path: Path) -> None:
    rows = [{"q": "Add.", "t": ["assert add(1, 2) == 3"], "s": "Be brief.", "meta": {"a": 1}}]
    columns = {"question": "q", "tests": "t", "system": "s"}
    (task,) = held_out(source(path=str(write(tmp_path / "a.jsonl", rows)), columns=columns))
    assert [message["role"] for message in task.messages] == ["system", "user"]
    assert "```python" in task.messages[1]["content"] and task.truth.names == ("add",)
    with pytest.raises(ConfigError, match=r"column meta: has no b; it has a"):
        source(path=str(tmp_path / "a.jsonl"), columns={"question": "q", "answer": "meta.b"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set path to a file, a folder or hf:org/name, or a preset"),
        ({"preset": "verl"}, "set path to a file"),
        ({"preset": "gsm9k"}, "task.options.preset=gsm9k is not known; known: gsm8k, math500"),
        ({"path": "a", "preset": "gsm8k", "columns": COLUMNS}, "drop one of preset and columns"),
        ({"path": "a", "columns": {"question": "q"}}, "columns needs answer or tests beside"),
        ({"path": "a", "columns": {"questoin": "q"}}, "did you mean task.options.columns.question"),
        ({"path": "a", "template": "x"}, "template must have {question} in it"),
        ({"path": "a", "answer_pattern": "("}, "answer_pattern is not a regular expression"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    config = TaskConfig(source="file", options=options)
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_source(config, 0, run_function=None)  # type: ignore[arg-type]


def test_known_columns_are_recognised(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(ConfigError, match=r"if this is gsm8k, set task\.options\.preset=gsm8k"):
        source(path=str(path))


# --- benchmarks --------------------------------------------------------------------------------

GPQA = {"Question": "How long?", "Correct Answer": "42 cm"}
GPQA |= {f"Incorrect Answer {n}": f"{n} cm" for n in (1, 2, 3)}
MBPP = {
    "task_id": 11,
    "text": "Sum the common divisors.",
    "code": "def sum(a,b):\n  return 6",
    "test_list": ["assert sum(10,15) == 6"],
    "test_setup_code": "",
}
CASES = [{"input": "2\n", "output": "0.5", "testtype": "stdin"}]
PACKED = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(CASES)))).decode()
LIVE = {
    "question_content": "Halve.",
    "starter_code": "",
    "metadata": "{}",
    "public_test_cases": json.dumps(CASES),
    "private_test_cases": PACKED,
}


def only(tmp_path: Path, preset: str, *rows: dict[str, Any], run: Any = None) -> FileSource:
    return source(run, path=str(write(tmp_path / "a.jsonl", list(rows))), preset=preset)


def says(found: FileSource, text: str) -> bool:
    said = [{"role": "assistant", "content": text}]
    return asyncio.run(found.grade(found.held_out(0), said, End.ANSWER)).correct


def test_a_benchmark_is_all_held_out_unless_asked(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "answer": f"Is\n#### {n},000"} for n in range(40)]
    path = str(write(tmp_path / "a.jsonl", rows))
    found = source(path=path, preset="GSM-8K", held_out_fraction=None)
    assert (found.train_size, found.held_out_size) == (0, 40)
    assert found.held_out(3).truth == ("3,000",) and found.vocabulary_texts() == []
    assert source(path=path, preset="gsm8k", held_out_fraction=0.5).train_size > 5
    with pytest.raises(
        ConfigError, match=r"no train task; set task\.options\.held_out_fraction low"
    ):
        found.train(0)
    with pytest.raises(ConfigError, match=r"reads the columns question, answer"):
        only(tmp_path, "gsm8k", {"question": "q", "answer": "1"})


def test_gpqa_has_shuffled_options(tmp_path: Path) -> None:
    rows = [{**GPQA, "Question": f"How long is {n}?"} for n in range(40)]
    tasks = held_out(only(tmp_path, "gpqa", *rows))
    assert {task.truth.letter for task in tasks} == set("ABCD")
    assert tasks == held_out(only(tmp_path, "gpqa", *rows))
    for task in tasks:
        assert isinstance(task.truth, Choice)
        assert f"\n{task.truth.letter}. 42 cm\n" in task.messages[0]["content"]
    found = only(tmp_path, "gpqa", GPQA)
    letter = found.held_out(0).truth.letter
    assert says(found, rf"\boxed{{{letter}. 42 cm}}") and says(found, r"\boxed{42 cm}")
    assert not says(found, r"\boxed{1 cm}")
    assert found.held_out(0).messages[0]["content"].endswith(LETTER.removeprefix("{question}"))


def test_mathematics_is_read_under_several_names(tmp_path: Path) -> None:
    for row in ({"problem": "1+1?", "answer": 2}, {"Problem": "1+1?", "Answer": "2"}):
        for name in ("math500", "aime24", "aime25"):
            (task,) = held_out(only(tmp_path, name, row))
            assert task.truth == ("2",)


def test_mbpp_may_define_a_name_of_pythons_own(tmp_path: Path, sandbox: Any) -> None:
    found = only(tmp_path, "mbpp", MBPP, {**MBPP, "task_id": 700}, run=sandbox.call_function)
    assert found.held_out_size == 1  # the other one is for training
    assert "assert sum(10,15) == 6" in found.held_out(0).messages[0]["content"]
    assert says(found, "```python\ndef sum(a, b): return 6\n```")
    assert not says(found, "```python\nx = 1\n```")


def test_livecodebench_unpacks_its_private_tests(tmp_path: Path, sandbox: Any) -> None:
    found = only(tmp_path, "livecodebench", LIVE, run=sandbox.call_function)
    task = found.held_out(0)
    assert len(task.truth) == 2 and "private_test_cases" not in task.info
    assert says(found, "```python\nprint(f'{1 / int(input()):.2f}')\n```")
    case = {"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}
    row = {**LIVE, "public_test_cases": json.dumps([case]), "private_test_cases": "[]"}
    row |= {"metadata": json.dumps({"func_name": "f"}), "starter_code": "class Solution:"}
    found = only(tmp_path, "livecodebench", row, run=sandbox.call_function)
    right = "class Solution:\n    def f(self, x: List[int], n): return tuple(v + n for v in x)"
    assert says(found, f"```python\n{right}\n```")
    evil = base64.b64encode(zlib.compress(pickle.dumps(print))).decode()
    with pytest.raises(ConfigError, match="has no business in test cases"):
        only(tmp_path, "livecodebench", {**LIVE, "private_test_cases": evil})


def humaneval() -> list[dict[str, Any]]:
    """Three tasks of HumanEval (MIT licence, see the file beside them)."""
    return [json.loads(line) for line in (SAMPLES / "humaneval.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", ["preset", "verl"])
def test_humaneval_is_judged_by_its_tests(tmp_path: Path, sandbox: Any, form: str) -> None:
    for number, row in enumerate(humaneval()):
        record, preset = row, "humaneval"
        if form == "verl":
            prompt = [{"role": "user", "content": f"Go on:\n```python\n{row['prompt']}```"}]
            record = {"prompt": prompt, "reward_model": {"ground_truth": row["test"]}}
            preset = "verl"
        found = only(tmp_path / str(number), preset, record, run=sandbox.call_function)
        assert says(found, f"```python\n{row['prompt']}{row['canonical_solution']}```")
        assert not says(found, f"```python\n{row['prompt']}    return None\n```")
        assert not says(found, f"{row['canonical_solution']}")


def test_every_configuration_of_the_documentation_is_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 3
    for data in map(yaml.safe_load, blocks):
        if "task" in data:  # a whole configuration
            parse_config(data)
        else:
            parse_section(FileOptions, TaskConfig(**data).options)
    table = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))
    assert set(PRESETS) <= set(table)


# --- what is said at the start -----------------------------------------------------------------


def test_prompts_without_room_for_an_answer_are_found(tmp_path: Path, caplog: Any) -> None:
    rows = [
        {"problem": f"{n} " * (3500 if n == 17 else 20), "solution": "#### 1"} for n in range(40)
    ]
    path = write(tmp_path / "a.jsonl", rows)

    def tokens(messages: Any) -> list[str]:
        return "".join(m["content"] for m in messages).split() + 9 * ["<>"]

    message = (
        f"1 of 40 prompts have no room for an answer in rollout.max_tokens=512 (first {path} line "
        "18 with 3515 tokens, at most 3515); raise it or set task.options.overlong=drop"
    )
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        mine(path).fit_prompts(tokens, 512)
    found = mine(path, overlong="drop")
    found.fit_prompts(tokens, 512)
    assert found.held_out_size == 39
    assert "1 of 40 prompts have no room" in caplog.text and "left out" in caplog.text
    with pytest.raises(ConfigError, match="40 of 40 prompts"):
        mine(path, overlong="drop").fit_prompts(tokens, 9)
    mine(path).fit_prompts(tokens, 3516)


def test_prompts_and_truths_that_cannot_be_judged_are_said(tmp_path: Path, caplog: Any) -> None:
    def said(prompt: str, truth: str, system: str | None = None) -> str:
        caplog.clear()
        row = {
            "prompt": [{"role": "user", "content": prompt}],
            "reward_model": {"ground_truth": truth},
        }
        with caplog.at_level(logging.WARNING):
            source(path=str(write(tmp_path / "a.jsonl", [row])), system=system)
        return caplog.text

    assert "1 of 1 prompts do not say in which form to answer" in said("What is 2?", "2")
    assert said("What is 2?", "2", system=r"Use \boxed{}.") == said("Write #### n.", "2") == ""
    prose = "because the heavier isotope moves more slowly through the gel"
    assert "1 of 1 ground truths are prose, first" in said(r"Why? Use \boxed{}.", prose)
    assert said(r"Use \boxed{}.", r"\frac{1}{2} \text{ of the way}") == ""


def test_the_first_trajectory_is_shown_with_its_verdict(tmp_path: Path, caplog: Any) -> None:
    found = mine(write(tmp_path / "a.jsonl"))
    for answer in ("#### 0", "#### 1"):
        said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]
        asyncio.run(found.grade(found.held_out(0), said, End.LENGTH))
    assert "[user] Q\n[assistant] #### 0" in caplog.text and "#### 1" not in caplog.text
    assert "its reward is -1: cut at a token limit" in caplog.text
