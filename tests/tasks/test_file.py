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
    with pytest.raises(
        ConfigError, match=r"line 1 column .*: a program is judged by running tests"
    ):
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
    ("record", "fault"),
    [
        ({k: v for k, v in row().items() if k != "prompt"},
         "column prompt: there is no such column; columns: data_source, ability, reward_model"),
        (row(prompt=3), "column prompt: must be text or messages, not int"),
        (row(prompt=[]), "column prompt: must be text or messages, not an empty list"),
        (row(prompt=[{"role": "user"}]),
         "column prompt: every message needs text role and content"),
        (row(prompt=[{"role": "system", "content": "x"}]),
         "column prompt: there is no user message"),
        (row(reward_model=None), "column reward_model: must be an object, not null"),
        (row(reward_model={"style": "rule"}),
         "column reward_model: has no ground_truth; it has style"),
        (row(truth=""), "column reward_model.ground_truth: must be a value, not an empty text"),
        (row(truth=float("nan")), "column reward_model.ground_truth: is empty"),
        (row(truth=[]), "column reward_model.ground_truth: must be a value, not an empty list"),
        (row(truth=True),
         "column reward_model.ground_truth: must be text, a number or tests, not bool"),
        (row(truth=[{"input": "1"}]),
         "column reward_model.ground_truth: test cases need inputs and outputs, or assert_case"),
        (row(truth='[{"input": "1"}, {"input": "2"}]'),
         "column reward_model.ground_truth: test cases need inputs and outputs, or assert_case"),
        (row(truth={"inputs": ["1", "2"], "outputs": ["1"]}),
         "column reward_model.ground_truth: there are 2 inputs for 1 outputs"),
        (row(truth={"assert_case": ["assert f(1) >"]}),
         "column reward_model.ground_truth: assert f(1) > is not Python"),
        (row(truth="He has 3.\n#### 3"),
         "column reward_model.ground_truth: the answer stands after ####; set "
         'task.options.answer_pattern="####[ \\\\t]*(.+)"'),
        (row(ability="code"),
         "column reward_model.ground_truth: a program is judged by running tests, and this holds "
         "none"),
        ([1], ": must be an object, not list"),
    ],
    ids=lambda value: "" if isinstance(value, (dict, list)) else value[8:58],
)  # fmt: skip
def test_bad_row_is_refused_with_file_line_and_column(tmp_path, record, fault):
    path = write(tmp_path, [row(), record])
    place = "  line 2" if fault.startswith(":") else "  line 2 "
    message = f"{path}: 1 of 2 rows cannot be used:\n{place}{fault}"
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as caught:
        file(path)
    expected = (
        'expected rows such as {"prompt": [{"role": "user", "content": "What is 6 times 7?"}]'
    )
    assert str(caught.value).splitlines()[-1].startswith(expected)


def test_all_faults_of_a_file_come_together(tmp_path):
    wrong = [row(prompt=n, truth="") for n in (1, 2)] + [
        row(truth=["x", n]) for n in ([], {}, None)
    ]
    truths = [row(n, {"inputs": ["1"] * n, "outputs": []}) for n in range(1, 15)]
    path = write(tmp_path, [row(), *wrong, *truths])
    Path(path).write_text(Path(path).read_text() + "{\n")
    with pytest.raises(ConfigError) as caught:
        file(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 20 of 21 rows cannot be used:"
    assert lines[1] == "  line 2 and 1 more column prompt: must be text or messages, not int"
    assert lines[2].startswith("  line 2 and 1 more column reward_model.ground_truth: must be a v")
    assert len(lines) == 1 + 10 + 2 and lines[-2] == "  ... and 8 other faults"


def test_bad_parquet_row_is_named_by_row(tmp_path):
    path = write(tmp_path, [row(), row(truth=None)], "tasks.parquet")
    with pytest.raises(ConfigError, match=r"row 1 column reward_model.ground_truth: must be a val"):
        file(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "data file {path} does not exist"),
        ("tasks.txt", b"a,b", "data file {path} ends in '.txt'; use .jsonl, .json, .csv, "),
        ("tasks.jsonl", b"", "{path} has no rows"),
        ("tasks.csv", b"a,b", "{path} has no rows"),
        ("tasks.jsonl.gz", b"{", "{path} cannot be read: Not a gzipped file"),
        ("tasks.jsonl", b"\xff", "{path} is not UTF-8 text"),
        ("tasks.parquet", b"PAR1", "{path} is not readable Parquet: "),
    ],
    ids=["absent", "suffix", "empty", "no rows", "gzip", "encoding", "parquet"],
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
    with pytest.raises(ConfigError, match="and held_out_fraction exclude each other"):
        make_source(TaskConfig(source="file", options=options), 0, run_function=None)


def test_without_held_out_rows_asking_for_one_says_what_to_do(tmp_path):
    source = file(write(tmp_path, [row()]), held_out_fraction=1e-9)
    assert source.held_out_size == 0
    with pytest.raises(ConfigError, match="leaves no held-out task; set"):
        source.held_out(0)
