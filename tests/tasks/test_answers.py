"""Answers as models write them, against ground truths as data sets have them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from elpo_fast.tasks.answers import Choice, choice_letter, forms_asked, read_answer
from elpo_fast.tasks.file import FileOptions, FileSource
from elpo_fast.types import End, Verdict

UNION = r"(-\infty,-1)\cup(1,\infty)"


def grade(sandbox, folder: Path, truth: object, text: str, prompt: str = "Say.") -> Verdict:
    path = folder / "tasks.jsonl"
    row = {"prompt": [{"role": "user", "content": prompt}], "reward_model": {"ground_truth": truth}}
    path.write_text(json.dumps(row))
    options = FileOptions(path=str(path), held_out_fraction=1)
    source = FileSource(options, seed=0, run_function=sandbox.call_function)
    said = [{"role": "assistant", "content": text}]
    return asyncio.run(source.grade(source.held_out(0), said, End.ANSWER))


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        *(("C", said) for said in ("C", "C. 42 cm", "(C)", r"\text{(C)}")),
        *(("C", said) for said in (r"\textbf{(C)}\ 42", "C)42", "**C**")),
        ("(C)", "C"),
        (r"\text{C}", "C: 42 cm"),
        (r"(-\infty,3]", r"x\le 3"),
        (r"x \leq 3", r"(-\infty,3]"),
        ("(1,5)", "1<x<5"),
        (UNION, r"x<-1 \text{ or } x>1"),
        (r"(-\infty,2)\cup(2,\infty)", r"x\neq 2"),
        ("1.5e3", "1500"),
        ("1500", r"1.5\times 10^3"),
        ("-0.001", "-1E-3"),
        *(("1000000", said) for said in (r"1\,000\,000", "1 000 000", "1,000,000")),
        ("1000000", r"1,\!000{,}000"),
        ("1000000", "1\u2009000\u202f000"),
        ("$18", "18"),
        ("yes", "Yes"),
        ("True", "true"),
    ],
)  # fmt: skip
def test_equal_answers_are_correct(sandbox, tmp_path, truth: str, answer: str) -> None:
    verdict = grade(sandbox, tmp_path, truth, rf"So \boxed{{{answer}}}.")
    assert verdict.correct, verdict.reason


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        *(("C", said) for said in ("D", "D. 42 cm", "C or D", "C, D", "CD", "42", "C+1")),
        (r"(-\infty,3)", r"x\le 3"),
        (UNION, r"x<-1 \text{ or } x\ge 1"),
        (UNION, r"x<-1"),
        ("1.5e3", "150"),
        ("(3,5)", "3 5"),
        ("35", "3 5"),
    ],
)
def test_other_answers_are_wrong(sandbox, tmp_path, truth: str, answer: str) -> None:
    verdict = grade(sandbox, tmp_path, truth, rf"So \boxed{{{answer}}}.")
    assert not verdict.correct and verdict.reason.startswith("answered ")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("End with #### and the number.", "So it is\n#### 3"),
        ("End with #### and the number.", "#### Step 1\nis hard\n#### **3**"),
        ("End with #### and the number.", r"So it is #### \boxed{3}"),
        ("End with #### and the number.", r"So it is \boxed{3}"),
        ("Write <answer>...</answer>.", "<answer> 3 </answer>"),
        ("The last line is Answer: $Answer", "It is 4?\nNo.\n**Answer:** $3$."),
        ("The last line is Answer: $Answer", "final answer: 3"),
        (r"Put it into \boxed{}.", "#### 5\n\\boxed{3}\n#### Step 4"),
    ],
)
def test_an_answer_is_read_in_the_form_that_the_prompt_asks_for(
    sandbox, tmp_path, prompt: str, text: str
) -> None:
    verdict = grade(sandbox, tmp_path, "3", text, prompt)
    assert verdict.correct, verdict.reason


def test_other_forms_than_asked_for_are_not_read() -> None:
    for form in ("#### 3", "<answer>3</answer>", "Answer: 3"):
        assert read_answer(form, forms_asked(r"Use \boxed{}.")) is None
        assert read_answer(form, frozenset()) is None
    assert read_answer(r"x = 3; \boxed{4}", frozenset(), r"x = (\d+)") == "3"
    assert read_answer(r"\boxed{4}", frozenset(), r"x = (\d+)") == "4"


def test_an_option_is_chosen_by_its_text_too() -> None:
    choice = Choice("B", "10 keV")
    assert choice.chosen(r"\text{10 keV}") and choice.chosen("B. 11 keV")
    assert not choice.chosen("10 eV") and not Choice("B").chosen("10 keV")
    assert [choice_letter(text) for text in ("B", "Both", "b")] == ["B", None, None]
