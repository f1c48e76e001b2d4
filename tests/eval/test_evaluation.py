"""`elpo eval` and `elpo show`: every trajectory sampled once, whatever stops it; their figures."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from elpo_fast import cli
from elpo_fast.config import Config, parse_config
from elpo_fast.eval import evaluation
from elpo_fast.eval.evaluation import Evaluation, compare, of_model, run_evaluation
from elpo_fast.eval.figures import figures
from elpo_fast.eval.trajectories import Record, Trajectories, answer_in, record_of
from elpo_fast.lock import Lock
from elpo_fast.report.chat_view import show_chats
from elpo_fast.tasks.ledger import Ledger
from elpo_fast.train import loop
from elpo_fast.train.display import Display
from elpo_fast.train.export import run_subject
from elpo_fast.train.parts import assembled, settled


def data(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    small = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 64}
    sections = {
        "run": {"dir": str(folder), "name": "ev", "threads": 1},
        "model": {"name": "scratch", "dtype": "float32", "scratch": small},
        "task": {"options": {"steps": 4, "level": 1}, "system": "Go.", "seed": 0},
        "tools": {"workers": 1},
        "rollout": {"call_format": "code", "max_turn_tokens": 12, "max_tokens": 300},
        "eval": {"tasks": 3, "samples": 2},
    } | {f"{name}+": values for name, values in sections.items()}
    merged: dict[str, Any] = {}
    for name, values in sections.items():
        merged[name.rstrip("+")] = merged.get(name.rstrip("+"), {}) | values
    return merged


def make_config(folder: Path, **sections: dict[str, Any]) -> Config:
    return settled(parse_config(data(folder, **sections)))


def phase(*arguments: Any) -> Any:
    return Display(Console(file=io.StringIO())).phase(*arguments)


def evaluate(config: Config) -> Evaluation:
    return run_evaluation(of_model("scratch", config), phase)


def lines(folder: Path) -> dict[tuple[str, int], Record]:
    found = [json.loads(line) for line in (folder / "trajectories.jsonl").open(encoding="utf-8")]
    by_key = {(record["task"], record["sample"]): record for record in found}
    assert len(by_key) == len(found), "a trajectory was sampled twice"
    return by_key


@pytest.fixture
def lucky(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never succeeds; verdicts by the length of what it says vary."""

    async def grade(self: Any, task: Any, messages: Any, end: Any) -> Any:
        return self.options.verdict(len(messages[-1]["content"]) % 2 == 0, end.value)

    monkeypatch.setattr(Ledger, "grade", grade)


def test_a_stopped_evaluation_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lucky: None
) -> None:
    whole = evaluate(make_config(tmp_path / "whole"))
    expected = lines(whole.folder)
    assert len(expected) == 6 and {r["sample"] for r in expected.values()} == {0, 1}
    assert len({r["correct"] for r in expected.values()}) == 2
    assert whole.figures["success"]["value"] == sum(r["correct"] for r in expected.values()) / 6

    config = make_config(tmp_path / "cut")
    add = Trajectories.add
    with monkeypatch.context() as patched:

        def stops(self: Trajectories, record: Record) -> None:
            if len(self.records) == 3:
                raise ZeroDivisionError
            add(self, record)

        patched.setattr(Trajectories, "add", stops)
        with pytest.raises(ExceptionGroup):
            evaluate(config)
    file = config.run_dir / "trajectories.jsonl"
    with pytest.raises(LookupError, match="is not finished"):
        Evaluation.read(config.run_dir)
    file.write_bytes(file.read_bytes() + b'{"task": "torn')
    assert evaluate(config).figures == whole.figures
    assert lines(config.run_dir) == expected


def test_nothing_is_evaluated_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lucky: None
) -> None:
    first = evaluate(make_config(tmp_path))
    before = lines(first.folder)
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "load_model", lambda *_, **__: 1 / 0)
        assert evaluate(make_config(tmp_path)).figures == first.figures
        fewer = evaluate(make_config(tmp_path, eval={"samples": 1, "tasks": 2}))
        assert (fewer.figures["tasks"], fewer.figures["samples"]) == (2, 1)
    more = evaluate(make_config(tmp_path, eval={"samples": 3, "tasks": 4}))
    after = lines(first.folder)
    assert len(after) == 12 and after.items() >= before.items()
    assert (more.figures["tasks"], more.figures["samples"]) == (4, 3)
    assert not list(first.folder.rglob("checkpoint*")) and not list(first.folder.rglob("model*"))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"eval": {"temperature": 0.5}}, r"eval.temperature was 1.0 and is now 0.5.*--out"),
        ({"rollout": {"max_tokens": 200}}, r"rollout.max_tokens was 300 and is now 200.*--out"),
        ({"task": {"seed": 1}}, "task.seed was 0 and is now 1"),
    ],
    ids=str,
)
def test_another_evaluation_does_not_go_into_the_folder(
    tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    evaluate(make_config(tmp_path, eval={"tasks": 1}))
    with pytest.raises(ValueError, match=said):
        evaluate(make_config(tmp_path, **{"eval": {"tasks": 1}} | sections))
    # What changes no trajectory may change.
    free = {"rollout": {"max_batch": 3}, "train": {"lr": 0.5}, "tools": {"workers": 2}}
    evaluate(make_config(tmp_path, eval={"tasks": 1}, **free))


def test_what_could_not_begin_leaves_its_folder_to_the_mended_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower it"):
        evaluate(make_config(tmp_path, rollout={"max_tokens": 3000}, task={"seed": None}))
    assert evaluate(make_config(tmp_path, task={"seed": None})).figures["tasks"] == 3


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        evaluate(config)
    busy = make_config(tmp_path, run={"name": "busy"})
    busy.run_dir.mkdir()
    lock = Lock(busy.run_dir)
    with pytest.raises(ValueError, match="is in use by process"):
        evaluate(busy)
    lock.release()


def test_greedy_depends_on_no_seed_and_is_sampled_once(tmp_path: Path) -> None:
    greedy = {"temperature": 0, "samples": 1}
    found = [
        evaluate(make_config(tmp_path, run={"name": f"s{seed}", "seed": seed}, eval=greedy))
        for seed in (1, 2)
    ]
    # A scratch model's weights follow from the seed; the same weights under both:
    one, other = (of_model("scratch", make_config(tmp_path, eval=greedy)) for _ in range(2))
    assert found[0].figures["samples"] == 1 and one.weights == other.weights
    texts = []
    for seed in (3, 4):
        config = make_config(tmp_path, run={"name": f"t{seed}", "seed": seed}, eval=greedy)
        subject = of_model("scratch", config)
        same = of_model("scratch", make_config(tmp_path, eval=greedy)).load
        run_evaluation(evaluation.Subject(subject.name, config, "", same), phase)
        texts.append([r["messages"] for _, r in sorted(lines(config.run_dir).items())])
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="samples=2 at temperature=0"):
        make_config(tmp_path, eval={"temperature": 0})


def test_a_file_needs_no_training_data_and_prompts_without_room_are_left_out(
    tmp_path: Path,
) -> None:
    rows = [
        {"question": f"{n} + 1?" + " more" * 500 * (n == 1), "answer": f"#### {n + 1}"}
        for n in range(3)
    ]
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"preset": "gsm8k", "path": str(file), "overlong": "refuse"}
    task = {"source": "file", "options": options, "seed": None, "system": None}
    # A tokenizer for the model: one that needs no training tasks.
    run = {"name": "refused"}
    texts = evaluation.Subject(
        "scratch",
        make_config(tmp_path, task=task, run=run),
        "",
        lambda _: evaluation.load_model(
            make_config(tmp_path).model, seed=0, tokenizer_texts=["user assistant tool 1 + more?"]
        ),
    )
    with pytest.raises(ValueError, match=r"1 of 3 prompts have no room .*rollout.max_tokens=300"):
        run_evaluation(texts, phase)
    dropping = task | {"options": options | {"overlong": "drop"}}
    config = make_config(tmp_path, task=dropping, eval={"tasks": None})
    found = run_evaluation(evaluation.Subject("scratch", config, "", texts.load), phase)
    assert (found.figures["tasks"], len(lines(found.folder))) == (2, 4)
    again = run_evaluation(evaluation.Subject("scratch", config, "", texts.load), phase)
    assert again.figures == found.figures and len(lines(found.folder)) == 4


def test_a_run_is_evaluated_at_its_checkpoint_on_its_own_tasks(tmp_path: Path, lucky: None) -> None:
    config = make_config(
        tmp_path,
        task={"seed": None},
        train={"steps": 2, "tasks_per_step": 2, "lr": 0.05}
        | {"checkpoint_every": 1, "keep_checkpoints": 3},
        algo={"n_total": 4},
    )
    run = loop.train(config, console=Console(file=io.StringIO()))
    files = sorted(run.rglob("*"))
    out = {"dir": str(tmp_path), "name": "of-run"}
    found = run_evaluation(
        run_subject(run, make_config(tmp_path, run=out, task={"seed": None})), phase
    )
    assert sorted(run.rglob("*")) == files
    assert found.name == "ev-step-00000002"
    assert (found.folder / "task_secret").read_text() == (run / "task_secret").read_text()

    # The exported model says the same, and the first checkpoint something else.
    exported = make_config(tmp_path, run={"name": "of-model"}, task={"seed": None})
    (tmp_path / "of-model").mkdir()
    subject = of_model(str(run / "model"), exported)
    secret = (run / "task_secret").read_text()
    same = run_evaluation(
        evaluation.Subject(subject.name, subject.config, subject.weights, subject.load, secret),
        phase,
    )
    assert texts_of(same.folder) == texts_of(found.folder)
    early = make_config(tmp_path, run={"name": "early"}, task={"seed": None})
    first = run_evaluation(run_subject(run, early, step=0), phase)
    assert first.success().keys() == found.success().keys()
    assert texts_of(first.folder) != texts_of(found.folder)
    with pytest.raises(LookupError, match="no checkpoint of step 9"):
        run_subject(run, early, step=9)
    # Other weights under the same name do not continue it.
    (run / "model" / "config.json").touch()
    with pytest.raises(ValueError, match=r"the weights of .* are others than they were"):
        run_evaluation(of_model(str(run / "model"), exported), phase)


def texts_of(folder: Path) -> dict[tuple[str, int], Any]:
    return {key: record["messages"] for key, record in lines(folder).items()}


@pytest.mark.parametrize("call_format", ["code", "hermes"])
def test_a_record_is_the_chat_as_it_was(tmp_path: Path, call_format: str) -> None:
    config = make_config(tmp_path, rollout={"call_format": call_format})

    async def shown() -> tuple[Any, Any, Record]:
        async with assembled(config) as parts:
            task = parts.source.held_out(0)
            chat = parts.collector.chat
            tree = await parts.collector.demonstrate(task)
            assert tree is not None
            return task, parts.source.demonstration(task), record_of(tree, task, 5, chat)

    task, solution, record = asyncio.run(shown())
    assert (record["task"], record["sample"], record["correct"]) == (task.id, 5, True)
    assert record["answer"] == str(task.truth) and record["end"] == "answer"
    assert (record["turns"], record["tool_calls"], record["malformed_calls"]) == (5, 4, 0)
    assert record["messages"][:2] == list(task.messages)
    roles = [message["role"] for message in record["messages"][2:]]
    assert roles == ["assistant", "tool"] * 4 + ["assistant"]
    answers = [message["content"] for message in record["messages"] if message["role"] == "tool"]
    # Each shows the new number and the next line of the task, to the letter.
    assert [text.split("\n", 1)[1] for text in answers] == list(task.reveals)
    assert all(text.split("\n")[0].lstrip("-").isdigit() for text in answers)
    assert record["messages"][-1]["content"] == f"<answer>{task.truth}</answer>"
    asked = record["messages"][2]["content"]
    code = solution[0]["tool_calls"][0]["function"]["arguments"]["code"]
    assert code in asked and asked.endswith("</code>" if call_format == "code" else "</tool_call>")


def test_tool_text_with_control_tokens_comes_back_as_it_was(tmp_path: Path) -> None:
    async def back(responses: list[str]) -> list[str]:
        async with assembled(make_config(tmp_path)) as parts:
            chat = parts.collector.chat
            ends = [chat.encode("<code>x</code>"), [chat.end_of_turn]]
            return [
                chat.response_text(chat.response_glue(end, text))
                for text in responses
                for end in ends
            ]

    responses = ["3", "", "<|im_end|>\nuser", "two\nlines\n", "<|im_end|>"]
    assert asyncio.run(back(responses)) == [text for text in responses for _ in range(2)]


def record(task: str, sample: int, correct: bool, answer: str | None, **more: Any) -> Record:
    counts = {"turns": 2, "tool_calls": 1, "malformed_calls": 0}
    tokens = {"prompt_tokens": 10, "tokens": 20, "tool_tokens": 5}
    verdict = {
        "correct": correct,
        "reward": 1.0 if correct else -1.0,
        "reason": "",
        "end": "answer",
    }
    return {"task": task, "sample": sample, "answer": answer, **verdict, **counts, **tokens, **more}


def test_figures_by_counting() -> None:
    one = [("7", True), ("7.0", True), ("8", False), ("8", False), ("9", False)]
    two = [("1", False), (None, False), ("1", False), ("2", False), ("3", True)]
    by_task = [
        [record(name, i, correct, answer) for i, (answer, correct) in enumerate(samples)]
        for name, samples in (("one", one), ("two", two))
    ]
    by_task[1][1] |= {"end": "length", "tool_calls": 3, "malformed_calls": 2, "tokens": 60}
    found = figures(by_task)
    assert (found["tasks"], found["samples"]) == (2, 5)
    assert found["success"]["value"] == pytest.approx((2 / 5 + 1 / 5) / 2)
    assert found["success"]["low"] < 0.3 < found["success"]["high"]
    for k in (2, 4, 5):
        subsets = [list(itertools.combinations(samples, k)) for samples in (one, two)]
        passed = [sum(any(c for _, c in s) for s in ss) / len(ss) for ss in subsets]
        assert found["pass@k"][str(k)]["value"] == pytest.approx(sum(passed) / 2)
    assert set(found["pass@k"]) == {"2", "4", "5"} and set(found["major@k"]) == {"4", "5"}
    # Of all five, "7" and "7.0" vote together and tie with "8"; "1" beats "3".
    assert found["major@k"]["5"]["value"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["tool_calls"] == pytest.approx(1.2)
    assert found["malformed_calls"] == pytest.approx(2 / 12)
    assert found["tokens"] == pytest.approx(24)
    assert found["ends"] == {"answer": 0.9, "length": 0.1}
    by_task[0][0]["answer"] = None  # a program, say: there is nothing to vote for
    assert not figures(by_task)["major@k"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("<answer> 3\n4 </answer>", "3 4"),
        ("3 of 5\n#### 1,200\n", "1,200"),
        ("# 12", None),
        ("", None),
    ],
)
def test_answers_that_are_marked(text: str, answer: str | None) -> None:
    assert answer_in(text) == answer


def test_comparison_is_paired_by_task(tmp_path: Path) -> None:
    folders = []
    for name, wins in (("a", {"x", "y", "z"}), ("b", {"x"})):
        folder = tmp_path / name
        folder.mkdir()
        about = {"model": name, "weights": "", "figures": {"samples": 2}}
        (folder / "evaluation.json").write_text(json.dumps(about))
        with (folder / "trajectories.jsonl").open("w") as file:
            for task in {"a": "xyzv", "b": "wzyx"}[name]:
                for sample in range(3):  # the third belongs to a longer evaluation
                    correct = task in wins and sample < 2
                    chat = {"messages": [{"role": "user", "content": task}]}
                    file.write(json.dumps(record(task, sample, correct, None) | chat) + "\n")
        folders.append(Evaluation.read(folder))
    found, tasks = compare(*folders)
    assert (tasks, found.better, found.worse) == (3, 2, 0)
    assert found.difference == pytest.approx(2 / 3)
    (tmp_path / "b" / "trajectories.jsonl").write_text("")
    with pytest.raises(LookupError, match="no task in common"):
        compare(*folders)


def test_command_evaluates_compares_and_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lucky: None
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(data(tmp_path)))
    out = str(tmp_path / "second")
    assert cli.main(["eval", "scratch", str(file), "rollout.top_p=0.9"]) == 0
    first = tmp_path / "eval" / "small-scratch"
    said = capsys.readouterr().out
    assert "mean@2" in said and "pass@2" in said and "ended by" in said
    again = ["eval", "scratch", str(file), "run.seed=1", f"--out={out}", f"--against={first}"]
    assert cli.main(again) == 0
    said = capsys.readouterr().out
    assert "scratch against scratch" in said and "of 3 tasks" in said
    assert cli.main(["eval", out, "--against", str(first)]) == 0
    stamped, _, figures_alone = said.partition("\n")
    assert "chat template:" in stamped
    assert capsys.readouterr().out == figures_alone
    (task, _), failed = next(item for item in lines(first).items() if not item[1]["correct"])
    assert cli.main(["show", str(first), "--failed", "--task", task]) == 0
    shown = capsys.readouterr().out
    assert task in shown and "✗" in shown and "✓" not in shown
    assert failed["messages"][1]["content"] in shown
    assert cli.main(["show", str(first / "trajectories.jsonl"), "--task", "none"]) == 2
    assert "has no trajectory of a task 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "scratch", "a.yaml", "b.yaml"], "there is one CONFIG"),
        (["eval", "scratch", "nowhere.yaml"], "cannot read configuration nowhere.yaml"),
        (["eval", "scratch", "eval.temperature=-1"], "eval.temperature"),
        (["eval", "scratch", "eval.tasks=null"], "have no end; give a number"),
        (["eval", "./no/model", "eval.tasks=1"], "there is no folder"),
        (["eval", "scratch", "--out=a b"], "run.name"),
        (["show", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["show", "other.jsonl"], 'line 1 has no "messages"'),
        (["show", "text.jsonl"], "is not a file of JSON lines"),
    ],
    ids=lambda value: " ".join(value)[-50:] if isinstance(value, list) else "",
)
def test_faults_are_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "text.jsonl").write_bytes(b"\xff\xfe")
    assert cli.main(arguments) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: ") and said in captured and captured.count("\n") == 1


def test_shown_text_does_not_steer_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    call = {"function": {"name": "f", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "[bold]hi[/bold] \x1b[2J\nthere"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    file.write_text(json.dumps({"messages": chat}) + "\n")
    console = Console(file=io.StringIO(), width=80)
    show_chats(file, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]hi[/bold] �[2J\nthere" in shown and "\x1b" not in shown and "'name': 'f'" in shown
