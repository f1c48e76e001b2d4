"""The ledger family: exact semantics, real irrecoverability, disjoint splits, verdicts."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import random
import re
from typing import Any

import pytest

from elpo_fast.config import ConfigError, TaskConfig
from elpo_fast.tasks import make_source, tokenizer_texts
from elpo_fast.tasks.ledger import SYSTEM, Ledger, LedgerOptions
from elpo_fast.tasks.operations import BY_NAME, KINDS, PARAPHRASES, Kind, draw, mistakes
from elpo_fast.types import End, Task, Verdict


def ledger(seed: int = 0, key: int | str = 0, **options: object) -> Ledger:
    return Ledger(LedgerOptions(**options), seed=seed, key=key)


def execute(task: Task, codes: list[str]) -> tuple[int, str]:
    """The value that the Python session holds after these calls, and all that was shown. A call
    that raises changes nothing."""
    scope: dict[str, Any] = {}
    shown = io.StringIO()
    reveals = itertools.chain(task.reveals, itertools.repeat(task.reveals[-1]))
    with contextlib.redirect_stdout(shown):
        exec(task.setup, scope)
        for code in codes:
            with contextlib.suppress(ValueError):
                exec(code, scope)
                print(next(reveals))
    return scope["x"], shown.getvalue()


def calls(task: Task) -> list[str]:
    return [f"do({code})" for code in task.info["code"]]


def grade(task: Task, text: str, end: End = End.ANSWER) -> Verdict:
    messages = [*task.messages, {"role": "assistant", "content": text}]
    return asyncio.run(ledger().grade(task, messages, end))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_code_of_a_kind_computes_what_apply_does(kind):
    for x in (1, 2, 7, 10, 40, 99, 120, 305, 999, 0, -12):
        for constant in range(kind.low, kind.high + 1):
            try:
                value = eval(kind.code.format(c=constant), {"x": x})
            except ValueError:
                value = x
            assert value == kind.apply(x, constant)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_wordings_are_many_distinct_and_carry_the_constant(kind):
    assert len(set(kind.wordings)) == PARAPHRASES
    assert all(("{c}" in wording) == (kind.high > 0) for wording in kind.wordings)


def test_no_wording_means_two_kinds():
    texts = [
        wording.format(c=constant)
        for kind in KINDS
        for wording in kind.wordings
        for constant in range(kind.low, kind.high + 1)
    ]
    # "over 3" and the like belong to one kind: equal texts only where the code is equal too.
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("options", [{}, {"level": 1}, {"level": 3, "steps": (4, 7)}], ids=str)
def test_truth_is_what_python_computes(options):
    source = ledger(**options)
    for index in range(100):
        task = source.train(index)
        assert execute(task, calls(task))[0] == task.truth


def test_session_shows_one_line_at_a_time():
    task = ledger().train(0)
    lines = task.info["lines"]
    assert task.messages[-1]["content"] == lines[0]
    values = [execute(task, calls(task)[: step + 1])[0] for step in range(4)]
    shown = [
        str(part) for pair in zip(values, [*lines[1:], "answer"], strict=True) for part in pair
    ]
    assert execute(task, calls(task))[1].splitlines() == shown
    assert not any(line in str(task.messages) + task.setup for line in lines[1:])


def test_session_goes_on_after_the_last_line():
    task = ledger().train(0)
    value, shown = execute(task, [*calls(task), "do(x+1)"])
    assert value == task.truth + 1
    assert shown.endswith(f"\n{task.truth}\nanswer\n{value}\nanswer\n")


def test_values_stay_small_and_every_operation_changes_them():
    source = ledger(level=3, steps=6, max_value=500)
    for index in range(100):
        task = source.train(index)
        values = [execute(task, calls(task)[:step])[0] for step in range(7)]
        assert all(1 <= value <= 500 for value in values)
        assert all(a != b for a, b in itertools.pairwise(values))


def test_no_single_mistake_leads_to_the_right_answer():
    options = LedgerOptions(level=3, steps=5)
    source = Ledger(options, seed=3, key=0)
    kinds = options.active_kinds
    planted = 0
    for index in range(60):
        task = source.train(index)
        right = calls(task)
        for step, code in enumerate(task.info["code"]):
            kind, constant = operation(code)
            wrong_codes = ["x"]
            if constant:
                wrong_codes += [kind.code.format(c=constant + d) for d in (-1, 1)]
            wrong_codes += [
                other.code.format(c=constant or other.low) for other in kinds if other != kind
            ]
            for wrong in wrong_codes:
                planted += 1
                value, _ = execute(task, [*right[:step], f"do({wrong})", *right[step + 1 :]])
                assert value != task.truth
    assert planted > 60 * 5 * len(kinds)


def operation(code: str) -> tuple[Kind, int]:
    """The kind and constant behind a task's code."""
    return next(
        (kind, constant)
        for kind in KINDS
        for constant in range(kind.low, kind.high + 1)
        if kind.code.format(c=constant) == code
    )


def test_draw_without_the_filter_would_forgive_mistakes():
    # The digit sum of 12 and of 21 are equal: reversing or not makes no difference before it.
    reverse, digits = BY_NAME["reverse"], BY_NAME["digits"]
    assert digits.apply(12, 0) in {digits.apply(wrong, 0) for wrong in mistakes(12, reverse, 0, ())}


def test_draw_gives_up_where_nothing_fits():
    assert draw(random.Random(0), 1, 3, (BY_NAME["halve"], BY_NAME["divide"]), 9) is None


def test_turn_budget_is_one_call_an_operation_and_the_answer():
    task = ledger(steps=5).train(0)
    assert task.max_turns == 6
    assert len(task.info["code"]) == task.info["steps"] == 5
    assert len(task.info["lines"]) == 5


def test_the_task_does_not_tell_the_secret():
    for index in range(50):
        task = ledger(start=(871, 871), level=1).train(index)
        assert "871" not in str(task.messages) and execute(task, []) == (871, "")


def test_demonstration_is_one_call_an_operation_then_the_answer():
    source = ledger()
    task = source.train(7)
    *messages, answer = source.demonstration(task)
    functions = [call["function"] for message in messages for call in message["tool_calls"]]
    assert {function["name"] for function in functions} == {"python_session"}
    assert [function["arguments"] for function in functions] == [{"code": c} for c in calls(task)]
    assert execute(task, calls(task))[0] == task.truth
    assert answer == {"role": "assistant", "content": f"<answer>{task.truth}</answer>"}
    assert grade(task, answer["content"]).correct


def test_tasks_are_deterministic_and_identifiers_unique():
    one, two = ledger(seed=5), ledger(seed=5)
    assert [one.train(i) for i in (3, 0, 9)] == [two.train(i) for i in (3, 0, 9)]
    tasks = [one.train(i) for i in range(300)] + [one.held_out(i) for i in range(300)]
    assert len({task.id for task in tasks}) == 600


def test_seed_draws_training_tasks_and_leaves_held_out_tasks_alone():
    assert ledger(seed=1).train(0) != ledger(seed=2).train(0)
    assert ledger(seed=1).held_out(0) == ledger(seed=2).held_out(0)
    assert ledger(seed=0).held_out(0) != ledger(seed=1).train(0)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_key_draws_both_splits(split):
    first, again, other = (getattr(ledger(key=key), split)(0) for key in ("a", "a", "b"))
    assert first == again != other


@pytest.mark.parametrize(
    ("seed", "secrets", "equal"),
    [
        (None, ("a", "a"), True),
        (None, ("a", "b"), False),
        (None, (None, None), False),
        (3, ("a", "b"), True),
        (3, (None, None), True),
    ],
)
def test_tasks_are_drawn_with_the_runs_secret_unless_a_public_seed_is_asked_for(
    seed, secrets, equal
):
    config = TaskConfig(seed=seed)
    one, two = (make_source(config, 0, run_function=None, secret=secret) for secret in secrets)
    assert (one.train(0) == two.train(0)) is (one.held_out(0) == two.held_out(0)) is equal


def test_a_secret_of_a_run_does_not_change_its_tokenizer():
    config = TaskConfig()
    secrets = (make_source(config, 0, run_function=None, secret=secret) for secret in "ab")
    one, two = (list(tokenizer_texts(source, config, 0, None)) for source in secrets)
    assert one == two


@pytest.mark.parametrize("steps", [2, 4])
def test_splits_share_no_sequence_of_operations_for_any_seed(steps):
    # Two steps are few enough for the splits to meet by chance if nothing kept them apart.
    sources = [ledger(seed=seed, steps=steps, level=1) for seed in range(3)]
    train = {tuple(s.train(i).info["code"]) for s in sources for i in range(700)}
    held_out = {tuple(sources[0].held_out(i).info["code"]) for i in range(700)}
    assert not train & held_out
    assert len(held_out) > 30


def test_splits_draw_from_one_distribution_of_wordings():
    source = ledger(level=1)
    words = [
        {re.sub("[0-9]+", "#", line) for i in range(300) for line in split(i).info["lines"]}
        for split in (source.train, source.held_out)
    ]
    assert words[0] == words[1] and len(words[0]) == 4 * PARAPHRASES


def test_options_bound_what_is_drawn():
    source = ledger(kinds=("add", "double"), wordings=1, steps=(2, 3), start=(20, 21))
    tasks = [source.train(i) for i in range(80)]
    assert {re.sub("[0-9]", "", line) for task in tasks for line in task.info["lines"]} == {
        "add ",
        "double it",
    }
    assert {task.info["steps"] for task in tasks} == {2, 3}
    assert {execute(task, [])[0] for task in tasks} == {20, 21}


@pytest.mark.parametrize(
    ("text", "correct", "reason"),
    [
        ("<answer>{truth}</answer>", True, "answered {truth}, as expected"),
        ("it is {truth}", True, "answered {truth}, as expected"),
        ("<answer>1</answer> no, <answer>0{truth}</answer>", True, "answered {truth}, as expected"),
        ("<answer>{truth}</answer> 5 tries", True, "answered {truth}, as expected"),
        ("<answer>-{truth}</answer>", False, "answered -{truth}, expected {truth}"),
        ("<answer>{truth}1</answer>", False, "answered {truth}1, expected {truth}"),
        ("", False, "no answer found in the final message"),
        ("<answer></answer> {truth}", False, "no answer found in the final message"),
        ("9" * 5000, False, "answered " + "9" * 20 + ", expected {truth}"),
    ],
    ids=["tag", "plain", "last tag", "tag wins", "sign", "digits", "empty", "empty tag", "huge"],
)
def test_verdict_reads_the_last_number_and_says_why(text, correct, reason):
    task = ledger().train(0)
    verdict = grade(task, text.format(truth=task.truth))
    assert verdict == Verdict(correct, 1.0 if correct else -1.0, reason.format(truth=task.truth))


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (End.TURN_LIMIT, "turn limit reached before an answer"),
        (End.LENGTH, "cut at a token limit before an answer was complete"),
    ],
)
def test_unfinished_trajectories_are_wrong_whatever_they_say(end, reason):
    task = ledger().train(0)
    verdict = grade(task, f"<answer>{task.truth}</answer>", end)
    assert verdict == Verdict(False, -1.0, reason)


def test_rewards_are_options():
    source = ledger(reward_correct=2.0, reward_wrong=-1.1)
    task = source.train(0)
    for answer, reward in ((task.truth, 2.0), (task.truth + 1, -1.1)):
        message = {"role": "assistant", "content": f"<answer>{answer}</answer>"}
        assert asyncio.run(source.grade(task, [message], End.ANSWER)).reward == reward


def test_vocabulary_texts_cover_every_word_of_the_family():
    source = ledger(level=3, steps=6)
    words = set(re.findall(r"[a-z]+|[0-9]+|[^a-z0-9]", " ".join(source.vocabulary_texts())))
    for index in range(100):
        task = source.train(index)
        said = [message["content"] for message in task.messages] + calls(task) + task.info["lines"]
        for text in said:
            assert set(re.findall(r"[a-z]+|[0-9]+|[^a-z0-9]", text)) <= words
        assert str(task.truth) in words


def test_system_message_is_the_sources_own_or_the_configurations():
    assert ledger().train(0).messages[0]["content"] == SYSTEM
    source = make_source(TaskConfig(system="Do it."), 0, run_function=None)
    assert source.train(0).messages[0] == {"role": "system", "content": "Do it."}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepz": 4}, "unknown key task.options.stepz; did you mean task.options.steps?"),
        ({"steps": 0}, "task.options.steps.0: Input should be greater than or equal to 1, got 0"),
        ({"steps": [5, 4]}, "task.options: steps: the lower bound 5 exceeds the upper bound 4"),
        ({"level": 4}, "task.options.level: Input should be less than or equal to 3, got 4"),
        ({"kinds": ["add", "ad"]}, "task.options: unknown kind 'ad'; known: add, subtract,"),
        ({"kinds": ["add"]}, "task.options: kinds must name two or more kinds"),
        ({"start": [10, 1000]}, "task.options: start up to 1000 exceeds max_value=999"),
        ({"held_out_fraction": 1.0}, "task.options.held_out_fraction: Input should be less than 1"),
        ({"reward_wrong": "nan"}, "task.options.reward_wrong: Input should be a finite number"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options_give_one_clear_line(options, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as caught:
        make_source(TaskConfig(options=options), 0, run_function=None)
    assert "\n" not in str(caught.value)


def test_options_that_allow_no_task_say_what_to_widen():
    with pytest.raises(ValueError, match=r"found no train ledger task .* allow more kinds"):
        ledger(kinds=("halve", "divide"), steps=9, start=(1, 2)).train(0)
