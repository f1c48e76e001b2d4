"""Whole benchmarks, as published, against their own solutions. Their files are in the folder that
the environment variable ELPO_BENCHMARKS names: gsm8k_test.jsonl, math500_test.jsonl and
HumanEval.jsonl.gz."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from elpo_fast.tasks.file import FileOptions, FileSource
from elpo_fast.tools.sandbox import Sandbox
from elpo_fast.types import End, Task, Verdict

FOLDER = os.environ.get("ELPO_BENCHMARKS", "")


def graded(
    sandbox: Sandbox, name: str, preset: str, say: Callable[[list[Task], int], str]
) -> list[Verdict]:
    """Verdicts on what `say` makes of task number i."""
    path = Path(FOLDER) / name
    if not FOLDER or not path.is_file():
        pytest.skip(f"{name} is in no folder that ELPO_BENCHMARKS={FOLDER!r} names")
    options = FileOptions(path=str(path), preset=preset)
    source = FileSource(options, seed=0, run_function=sandbox.call_function)
    assert source.train_size == 0
    tasks = [source.held_out(index) for index in range(source.held_out_size)]

    async def all_of(work: Sequence[Awaitable[Any]]) -> list[Any]:
        return await asyncio.gather(*work)

    messages = [
        [{"role": "assistant", "content": say(tasks, index)}] for index in range(len(tasks))
    ]
    work = [
        source.grade(task, said, End.ANSWER) for task, said in zip(tasks, messages, strict=True)
    ]
    return asyncio.run(all_of(work))


def correct(verdicts: list[Verdict]) -> int:
    return sum(verdict.correct for verdict in verdicts)


def test_gsm8k(sandbox: Sandbox) -> None:
    def boxed(tasks: list[Task], index: int) -> str:
        return rf"\boxed{{{tasks[index].info['answer'].rpartition('#### ')[2]}}}"

    verdicts = graded(sandbox, "gsm8k_test.jsonl", "gsm8k", boxed)
    assert correct(verdicts) == len(verdicts) == 1319


def test_math500(sandbox: Sandbox) -> None:
    def solution(tasks: list[Task], index: int) -> str:
        return tasks[index].info["solution"]

    def another(tasks: list[Task], index: int) -> str:
        """The solution of the next task with another answer."""
        truth = tasks[index].truth
        later = (*tasks[index + 1 :], *tasks)
        values = {"5", "x=5"}  # one answer, said in two ways
        return next(
            task.info["solution"]
            for task in later
            if task.truth != truth and not {*task.truth, *truth} <= values
        )

    verdicts = graded(sandbox, "math500_test.jsonl", "math500", solution)
    assert correct(verdicts) == len(verdicts) == 500
    assert correct(graded(sandbox, "math500_test.jsonl", "math500", another)) == 0


@pytest.mark.parametrize(("stub", "passing"), [(False, 164), (True, 0)])
def test_humaneval(sandbox: Sandbox, stub: bool, passing: int) -> None:
    def program(tasks: list[Task], index: int) -> str:
        task = tasks[index]
        body = "    return None\n" if stub else task.info["canonical_solution"]
        return f"```python\n{task.truth.setup}{body}```"

    verdicts = graded(sandbox, "HumanEval.jsonl.gz", "humaneval", program)
    assert len(verdicts) == 164
    assert correct(verdicts) == passing
