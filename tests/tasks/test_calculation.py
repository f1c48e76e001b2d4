"""Answers that are evaluated by their verifier: what they could do, and may not do."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
import sympy

from elpo_fast.tasks.calculation import check
from elpo_fast.tasks.gym_verifier import make_dataset, pack_entry

NAMES = {**vars(sympy), "print": print, "abs": abs, "exec": exec, "x": sympy.Symbol("x")}


@pytest.mark.parametrize(
    "source",
    [
        "(Integer (3 )+Integer (5 ))*Integer (2 )**-1",
        "sin (x )*exp (-x )/3 +sqrt (2 )",
        "Symbol ('y' )+Float ('0.5' )+pi +E",
        "abs(-2) <= 3",
        "[[1, 0], [0, 1]]",
        "['A', 'Q', '_']",
        "(0x3a8 - 0xa72) >> 0x1",
        "Add(1, 2, evaluate=False)",
    ],
)
def test_calculations_pass(source: str) -> None:
    check(source, NAMES)


@pytest.mark.parametrize(
    "source",
    [
        "__import__('os')",
        "print(1)",
        "exec('1')",
        "x.__class__",
        "().__class__.__bases__[0].__subclasses__()",
        "[1, 2][0]",
        "(lambda: 1)()",
        "[i for i in [1]]",
        "f'{1}'",
        "unknown + 1",
        "lambdify(x, x)",
        "sympify('1')",
        "S('1')",
        "Symbol('exec(1)')",
        "Add(*[1, 2])",
        "Max(1, 2, **{'key': exec})",
        "sin(1)(2)",
        "(y := 3)",
        "{1: 2}",
        "Function('f')(print(1))",
        "1; 2",
        "sympy",
    ],
)
def test_anything_else_is_refused(source: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        check(source, NAMES)


# Each takes the verifier over in its own way, and gets full marks without solving the task.
COUNTDOWN = "import reasoning_gym.games.countdown as c; c.sorted = lambda x: 0"
PUZZLE24 = (
    "import reasoning_gym.games.puzzle24 as p; "
    "p.re = type('R', (), dict(findall=lambda *_: ['1'] * 4))"
)
FORGERIES = {
    "countdown": f"[exec({COUNTDOWN!r}), {{target}}][1]",
    "puzzle24": f"[exec({PUZZLE24!r}), 24][1]",
    "polynomial_multiplication": "exec('import sympy; sympy.parse_expr = lambda *_: 1') or 1",
    "simple_integration": "exec('import sympy; sympy.simplify = lambda *_: 0') or 1",
}
SCORE = """
import base64, pickle, sys
from elpo_fast.tasks.gym_verifier import make_dataset
entry = pickle.loads(base64.b64decode(sys.argv[2]))
dataset = make_dataset(sys.argv[1], {}, seed=0, size=1)
print(dataset.score_answer(sys.argv[3], entry), dataset.score_answer(sys.argv[3], entry))
"""


@pytest.mark.parametrize("dataset", FORGERIES)
def test_forged_verdicts_fail_and_would_have_worked(sandbox, dataset: str) -> None:
    entry = make_dataset(dataset, {}, seed=3, size=1)[0]
    answer = FORGERIES[dataset].format(target=entry["metadata"].get("target"))
    command = [sys.executable, "-c", SCORE, dataset, pack_entry(entry), answer]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "1.0" in plain.stdout, (plain.stdout, plain.stderr)

    payload = {"dataset": dataset, "config": {}, "entry": pack_entry(entry), "answer": answer}
    call = sandbox.call_function("elpo_fast.tasks.gym_verifier:score", payload, 20.0)
    assert asyncio.run(call)["score"] < 1
