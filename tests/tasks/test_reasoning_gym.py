"""Reasoning-gym sets by name: disjoint splits, verifiers out of process, junk gets nothing."""

from __future__ import annotations

import asyncio
import re

import pytest

from elpo_fast.config import ConfigError, TaskConfig
from elpo_fast.tasks import make_source
from elpo_fast.tasks.gym_verifier import NONSENSE, make_dataset, pack_entry
from elpo_fast.tasks.gym_verifier import score as score_packed
from elpo_fast.tasks.reasoning_gym import ReasoningGym, ReasoningGymOptions, read_answer
from elpo_fast.types import End, Verdict


def gym(run_function=None, seed: int = 0, key: int | str = 0, **options: object) -> ReasoningGym:
    options = ReasoningGymOptions(**options)
    return ReasoningGym(options, seed=seed, key=key, run_function=run_function)


def grade(source: ReasoningGym, task, text: str, end: End = End.ANSWER) -> Verdict:
    return asyncio.run(source.grade(task, [{"role": "assistant", "content": text}], end))


# Sets whose questions are few (coin_flip), whose sets are of limited length (word_ladder), and both
# kinds of ordinary ones.
@pytest.mark.parametrize("dataset", ["coin_flip", "word_ladder", "chain_sum", "tower_of_hanoi"])
def test_splits_share_no_question_for_any_seed(dataset):
    sources = [gym(dataset=dataset, seed=seed) for seed in range(2)]
    train = {s.train(i).messages[-1]["content"] for s in sources for i in range(100)}
    held_out = {sources[0].held_out(i).messages[-1]["content"] for i in range(100)}
    assert not train & held_out
    assert len(held_out) > 10


def test_without_the_split_by_content_different_seeds_would_share_questions():
    one, two = (make_dataset("coin_flip", {}, seed=seed, size=100) for seed in (1, 1000))
    assert {one[i]["question"] for i in range(100)} & {two[i]["question"] for i in range(100)}


def test_tasks_are_deterministic_random_access_and_named_apart():
    one, two = gym(dataset="chain_sum", seed=4), gym(dataset="chain_sum", seed=4)
    assert [one.train(i) for i in (700, 0, 3)] == [two.train(i) for i in (700, 0, 3)]
    assert len({task.id for i in range(300) for task in (one.train(i), one.held_out(i))}) == 600


def test_seed_draws_training_tasks_and_leaves_held_out_tasks_alone():
    one, two = gym(dataset="chain_sum", seed=1), gym(dataset="chain_sum", seed=2)
    assert one.train(0) != two.train(0)
    assert one.held_out(0) == two.held_out(0)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_key_draws_both_splits(split):
    sources = (gym(dataset="chain_sum", key=key) for key in ("a", "a", "b"))
    first, again, other = (getattr(source, split)(0) for source in sources)
    assert first == again != other


def test_size_makes_epochs():
    source = gym(dataset="chain_sum", size=5)
    assert source.train_size == 5 and gym(dataset="chain_sum").train_size is None
    assert source.train(12) == source.train(2) != source.train(3)


def test_dataset_config_reaches_the_dataset():
    source = gym(dataset="chain_sum", config={"min_terms": 2, "max_terms": 2})
    problems = [source.train(i).messages[-1]["content"] for i in range(20)]
    assert all(len(re.findall(r"\d+ [+-] \d+", problem)) == 1 for problem in problems)
    assert not any(re.search(r"[+-] \d+ [+-]", problem) for problem in problems)


def test_composite_takes_its_parts_by_name():
    config = {"datasets": [{"name": "chain_sum"}, {"name": "gcd", "weight": 2.0}]}
    source = gym(dataset="composite", config=config)
    assert {source.train(i).info["dataset"] for i in range(30)} == {"chain_sum", "gcd"}


def test_verdict_of_right_wrong_and_partial_answers(sandbox):
    source = gym(sandbox.call_function, dataset="chain_sum")
    task = source.train(0)
    truth = task.truth["answer"]
    right = grade(source, task, f"so <answer>{truth}</answer>")
    assert right == Verdict(True, 1.0, f"the verifier accepts {truth}")
    # The library gives partial marks for a text that contains the truth.
    partial = grade(source, task, f"<answer>maybe {truth}</answer>")
    assert not partial.correct and partial.reward == -1.0
    assert re.fullmatch(
        rf"the verifier refuses maybe {truth}: it scores 0\.\d+, not 1", partial.reason
    )


@pytest.mark.parametrize(
    ("text", "end", "reason"),
    [
        ("<answer>1</answer>", End.TURN_LIMIT, "turn limit reached before an answer"),
        ("<answer>1</answer>", End.LENGTH, "cut at a token limit before an answer was complete"),
        ("<answer></answer>", End.ANSWER, "no answer found in the final message"),
    ],
    ids=["turn limit", "length", "empty"],
)
def test_no_answer_needs_no_verifier(text, end, reason):
    source = gym(dataset="chain_sum")
    assert grade(source, source.train(0), text, end) == Verdict(False, -1.0, reason)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("9**9**9", "the verifier failed on this answer: timed out after 3 s"),
        (
            "__import__('os')._exit(3)",
            "the verifier refuses __import__('os')._exit(3): it scores 0.01, not 1",
        ),
        ("1+", "the verifier refuses 1+: it scores 0.01, not 1"),
    ],
    ids=["hang", "code", "syntax"],
)
def test_hostile_answers_lose_and_nothing_else_happens(sandbox, answer, reason):
    source = gym(sandbox.call_function, dataset="countdown", timeout_s=3.0)
    verdict = grade(source, source.train(0), f"<answer>{answer}</answer>")
    assert verdict == Verdict(False, -1.0, reason)


def test_verifier_is_not_run_in_this_process(run_function, monkeypatch):
    from reasoning_gym.arithmetic.chain_sum import ChainSumDataset

    monkeypatch.setattr(ChainSumDataset, "score_answer", lambda *_: pytest.fail("run in process"))
    source = gym(run_function, dataset="chain_sum")
    task = source.train(0)
    assert grade(source, task, task.truth["answer"]).correct


def test_a_broken_verifier_is_not_a_wrong_answer():
    async def broken(function, payload, timeout_s):
        raise RuntimeError("no such module")

    source = gym(broken, dataset="chain_sum")
    with pytest.raises(
        RuntimeError, match=r"verifier .*gym_verifier:score does not work here: no such module"
    ):
        grade(source, source.train(0), "<answer>1</answer>")


def score(dataset: str, entry: dict, answer: str) -> dict:
    return score_packed(
        {
            "dataset": dataset,
            "config": {},
            "entry": pack_entry(entry),
            "answer": answer,
        }
    )


# arc_agi judges by tuples; prime_factorization raises on junk; rush_hour has no reference answer.
@pytest.mark.parametrize("dataset", ["arc_agi", "prime_factorization", "countdown", "syllogism"])
def test_reference_answer_gets_full_marks_after_the_journey(dataset):
    entry = make_dataset(dataset, {}, seed=5, size=4)[3]
    assert score(dataset, entry, entry["answer"]) == {"score": 1.0, "error": ""}
    assert score(dataset, entry, "junk")["score"] < 1


def test_verifier_that_raises_scores_zero_and_says_what():
    entry = make_dataset("prime_factorization", {}, seed=5, size=4)[3]
    result = score("prime_factorization", entry, "junk")
    assert result["score"] == 0 and result["error"].startswith("ValueError")


def test_verifier_that_accepts_nonsense_is_overruled():
    dataset = make_dataset("game_of_life_halting", {}, seed=5, size=4)
    entry = dataset[3]
    assert dataset.score_answer(NONSENSE, entry) == 1.0
    assert score("game_of_life_halting", entry, "junk")["score"] == 0
    assert score("game_of_life_halting", entry, f" {entry['answer']} ")["score"] == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> then <answer> 2 </answer>", "2"),
        (r"\boxed{3} <answer>2</answer>", "2"),
        (r"\boxed{1} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("first line\n last line \n", "last line"),
        ("<answer></answer>\n7", ""),
        ("", ""),
    ],
    ids=["last tag", "tag first", "last box", "last line", "empty tag", "nothing"],
)
def test_read_answer_takes_tag_then_box_then_line(text, answer):
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "task.options.dataset: Field required"),
        (
            {"dataset": "countdwn"},
            "task.options.dataset: reasoning-gym has no set 'countdwn'; did you mean countdown",
        ),
        (
            {"dataset": "gcd", "sise": 3},
            "unknown key task.options.sise; did you mean task.options.",
        ),
        (
            {"dataset": "gcd", "config": {"min_number": 3}},
            "unknown key task.options.config.min_number of gcd; did you mean min_numbers?",
        ),
        (
            {"dataset": "gcd", "config": {"min_numbers": 9, "max_numbers": 3}},
            "task.options.config does not suit gcd: ",
        ),
        ({"dataset": "composite"}, "task.options.config does not suit composite: Must specify"),
    ],
    ids=["no set", "set", "option", "setting", "value", "composite"],
)
def test_wrong_options_give_one_clear_line(options, message):
    config = TaskConfig(source="reasoning_gym", options=options)
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as caught:
        make_source(config, 0, run_function=None)
    assert "\n" not in str(caught.value)


def test_too_few_questions_for_a_split_say_so():
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    source = gym(dataset="chain_sum", config=config, held_out_fraction=1e-6)
    with pytest.raises(ValueError, match="too few different questions for a held-out split"):
        source.held_out(0)


def test_system_message_is_the_configurations_or_the_sources():
    config = TaskConfig(source="reasoning_gym", options={"dataset": "gcd"}, system="Solve.")
    assert make_source(config, 0, run_function=None).train(0).messages[0]["content"] == "Solve."
    assert "<answer>" in gym(dataset="gcd").train(0).messages[0]["content"]
