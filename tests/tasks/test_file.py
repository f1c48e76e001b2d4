"""Task files in the Open-AgentRL schema: nothing lost, nothing misjudged, splits apart."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from elpo_fast.config import ConfigError, TaskConfig
from elpo_fast.tasks import make_source
from elpo_fast.tasks.file import FileOptions, FileSource
from elpo_fast.types import End, Verdict


def row(number: int = 0, truth: object = "12", **changes: object) -> dict:
    record = {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"What is {number}?"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{number}", "split": "train"},
    }
    return {**record, **changes}


def write(folder: Path, rows: list, name: str = "tasks.jsonl") -> str:
    path = folder / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return str(path)


def file(path: str, run_function=None, seed: int = 0, system=None, **options) -> FileSource:
    parsed = FileOptions(path=path, **options)
    return FileSource(parsed, seed=seed, run_function=run_function, system=system)


def grade(source: FileSource, text: str, end: End = End.ANSWER) -> Verdict:
    message = {"role": "assistant", "content": text}
    return asyncio.run(source.grade(source.train(0), [message], end))


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.parquet"])
def test_every_column_but_the_prompt_is_kept(tmp_path, name):
    records = [row(number, level=3) for number in range(40)]
    source = file(write(tmp_path, records, name))
    task = source.train(0)
    (record,) = [r for r in records if r["prompt"] == list(task.messages)]
    assert task.info == {key: value for key, value in record.items() if key != "prompt"}
    assert task.truth == ("12",)
    json.dumps(task.info)


def test_jsonl_and_parquet_give_the_same_tasks(tmp_path):
    records = [row(number) for number in range(60)]
    one = file(write(tmp_path, records, "tasks.jsonl"))
    two = file(write(tmp_path, records, "tasks.parquet"))
    assert one.train_size == two.train_size and one.held_out_size == two.held_out_size > 0
    assert [one.train(i) for i in range(9)] == [two.train(i) for i in range(9)]


def test_unicode_line_separators_inside_a_prompt_do_not_split_rows(tmp_path):
    prompt = [{"role": "user", "content": "a\u2028b\x85c"}]
    source = file(write(tmp_path, [row(prompt=prompt), row(1)]), held_out_fraction=1e-9)
    assert source.train_size == 2


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_split_by_content_keeps_repeated_prompts_on_one_side(tmp_path, fraction):
    # Each prompt three times, once with other white space.
    records = [row(number % 100) for number in range(200)]
    records += [row(prompt=[{"role": "user", "content": f" What  is {n}?\n"}]) for n in range(100)]
    source = file(write(tmp_path, records), held_out_fraction=fraction)
    sides = [
        {" ".join(get(i).messages[0]["content"].split()) for i in range(size)}
        for get, size in (
            (source.train, source.train_size),
            (source.held_out, source.held_out_size),
        )
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0]) + len(sides[1]) == 100
    assert source.train_size + source.held_out_size == 300
    assert abs(len(sides[1]) - 100 * fraction) < 15


def test_held_out_file_is_all_held_out(tmp_path):
    path = write(tmp_path, [row(n) for n in range(5)])
    held_out_path = write(tmp_path, [row(n) for n in range(5, 8)], "held.jsonl")
    source = file(path, held_out_path=held_out_path)
    assert (source.train_size, source.held_out_size) == (5, 3)
    assert [source.held_out(i).messages[0]["content"] for i in range(3)] == [
        f"What is {n}?" for n in range(5, 8)
    ]


def test_prompt_in_both_files_is_refused(tmp_path):
    path = write(tmp_path, [row(n) for n in range(5)])
    system = {"role": "system", "content": "Other words."}
    twin = {**row(3), "prompt": [system, *row(3)["prompt"]]}
    held_out_path = write(tmp_path, [row(7), twin], "held.jsonl")
    message = (
        f"1 of 5 training prompts are held out too, first {path} line 4 = {held_out_path} line 2"
    )
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        file(path, held_out_path=held_out_path)


def test_epochs_repeat_and_the_seed_shuffles(tmp_path):
    path = write(tmp_path, [row(n) for n in range(50)])
    one, two = file(path, seed=1), file(path, seed=2)
    size = one.train_size
    order = [one.train(i).id for i in range(size)]
    assert [one.train(i + size).id for i in range(size)] == order
    assert len(set(order)) == size
    other = [two.train(i).id for i in range(size)]
    assert other != order and sorted(other) == sorted(order)
    assert [one.held_out(i) for i in range(2)] == [two.held_out(i) for i in range(2)]


def test_data_sources_select_rows(tmp_path):
    code = row(ability="code")
    path = write(tmp_path, [{**code, "data_source": "code"}, *[row(n) for n in range(9)]])
    with pytest.raises(ConfigError, match="line 1: data_source 'code' is judged by running tests"):
        file(path)
    source = file(path, data_sources=["math_dapo"], held_out_fraction=1e-9)
    assert source.train_size == 9
    with pytest.raises(
        ConfigError, match="has no rows of data_source maths; it has code, math_dapo"
    ):
        file(path, data_sources=["maths"])


def test_system_message_is_the_files_unless_configured(tmp_path):
    system = {"role": "system", "content": "file"}
    path = write(tmp_path, [{**row(), "prompt": [system, *row()["prompt"]]}])
    roles = [message["role"] for message in file(path).train(0).messages]
    assert roles == ["system", "user"]
    messages = file(path, system="mine").train(0).messages
    assert [message["content"] for message in messages] == ["mine", "What is 0?"]


@pytest.mark.parametrize(
    ("truth", "text", "correct"),
    [
        ("12", r"\boxed{12}", True),
        (12, r"first \boxed{3}, then \boxed{12.0}", True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"$\frac12$", r"\boxed{\dfrac{1}{2}}", True),
        (r"\boxed{x+1}", r"\boxed{1+x}", True),
        (["7", "seven"], r"\boxed{seven}", True),
        ("12", r"\boxed{21}", False),
    ],
    ids=["equal", "number, last box", "decimal", "dollars", "boxed truth", "any of", "wrong"],
)
def test_verdict_is_mathematical_equality(tmp_path, run_function, truth, text, correct):
    source = file(write(tmp_path, [row(truth=truth)]), run_function)
    verdict = grade(source, text)
    assert (verdict.correct, verdict.reward) == (correct, 1.0 if correct else -1.0)
    assert verdict.reason.startswith("answered ")


@pytest.mark.parametrize(
    ("text", "end", "reason"),
    [
        ("12", End.ANSWER, r"no \boxed{...} answer in the final message"),
        (r"\boxed{12", End.ANSWER, r"no \boxed{...} answer in the final message"),
        (r"\boxed{12}", End.TURN_LIMIT, "turn limit reached before an answer"),
    ],
    ids=["no box", "open box", "turn limit"],
)
def test_no_answer_needs_no_verifier(tmp_path, text, end, reason):
    assert grade(file(write(tmp_path, [row()])), text, end) == Verdict(False, -1.0, reason)


def test_answer_that_hangs_the_verifier_is_wrong(tmp_path, sandbox):
    source = file(write(tmp_path, [row()]), sandbox.call_function, timeout_s=3.0)
    verdict = grade(source, r"\boxed{9^{9^{9^{9}}}}")
    assert not verdict.correct
    assert verdict.reason == "the verifier failed on this answer: timed out after 3 s"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {k: v for k, v in row().items() if k != "prompt"},
            "line 2, column prompt: there is no such column; columns: data_source, ab",
        ),
        (row(prompt="What?"), "line 2, column prompt: must be a non-empty list, not text"),
        (row(prompt=[]), "line 2, column prompt: must be a non-empty list, not an empty list"),
        (
            row(prompt=[{"role": "user"}]),
            "line 2, column prompt: every message needs text role and",
        ),
        (
            row(prompt=[{"role": "system", "content": "x"}]),
            "line 2, column prompt: there is no user message",
        ),
        (row(data_source=None), "line 2, column data_source: must be a non-empty text, not null"),
        (
            row(reward_model=None),
            "line 2, column reward_model: must be a non-empty object, not null",
        ),
        (
            row(reward_model={"style": "rule"}),
            "line 2, column reward_model: ground_truth must be text or a number, not null",
        ),
        (row(truth=""), "line 2, column reward_model: ground_truth is empty"),
        (row(truth=float("nan")), "line 2, column reward_model: ground_truth is empty"),
        (row(truth=[]), "line 2, column reward_model: ground_truth is empty"),
        (
            row(truth=True),
            "line 2, column reward_model: ground_truth must be text or a number, not b",
        ),
        (
            row(truth=[{"input": "1"}]),
            "line 2, column reward_model: test cases need inputs and outputs",
        ),
        (
            row(truth='[{"input": "1"}, {"input": "2"}]'),
            "line 2, column reward_model: test cases need inputs and outputs",
        ),
        (
            row(truth={"inputs": ["1", "2"], "outputs": ["1"]}),
            "line 2, column reward_model: there are 2 inputs for 1 outputs",
        ),
        (
            row(truth={"assert_case": ["assert f(1) >"]}),
            "line 2, column reward_model: assert f(1) > is not Python",
        ),
        (row(ability="code"), "line 2: data_source 'math_dapo' is judged by running tests"),
        ([1], "line 2 must be an object, not list"),
    ],
    ids=lambda value: "" if isinstance(value, (dict, list)) else value[8:48],
)
def test_bad_row_is_refused_with_file_line_and_column(tmp_path, record, message):
    path = write(tmp_path, [row(), record])
    with pytest.raises(ConfigError, match="^" + re.escape(f"{path} {message}")) as caught:
        file(path)
    assert "\n" not in str(caught.value)


def test_bad_parquet_row_is_named_by_row(tmp_path):
    path = write(tmp_path, [row(), row(truth=None)], "tasks.parquet")
    with pytest.raises(ConfigError, match="row 1, column reward_model: ground_truth must be text"):
        file(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "task file {path} does not exist"),
        ("tasks.csv", b"a,b", "task file {path} ends in '.csv'; use .jsonl or .parquet"),
        ("tasks.jsonl", b"", "{path} has no rows"),
        ("tasks.jsonl", b"{", "{path} line 1 is not JSON"),
        ("tasks.jsonl", b"\xff", "{path} is not UTF-8 text"),
        ("tasks.parquet", b"PAR1", "{path} is not readable Parquet: "),
    ],
    ids=["absent", "suffix", "empty", "json", "encoding", "parquet"],
)
def test_unreadable_file_gives_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    config = TaskConfig(source="file", options={"path": str(path)})
    with pytest.raises(ConfigError, match="^" + re.escape(message.format(path=path))) as caught:
        make_source(config, 0, run_function=None)
    assert "\n" not in str(caught.value)


def test_two_ways_to_hold_out_exclude_each_other(tmp_path):
    options = {"path": "a.jsonl", "held_out_path": "b.jsonl", "held_out_fraction": 0.1}
    with pytest.raises(ConfigError, match="held_out_path and held_out_fraction exclude each other"):
        make_source(TaskConfig(source="file", options=options), 0, run_function=None)


def test_without_held_out_rows_asking_for_one_says_what_to_do(tmp_path):
    source = file(write(tmp_path, [row()]), held_out_fraction=1e-9)
    assert source.held_out_size == 0
    with pytest.raises(ConfigError, match="leaves no held-out task; set"):
        source.held_out(0)
