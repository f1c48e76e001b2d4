"""Mathematical equality by math-verify, called in the sandbox: sympy can work on one answer for
hours. The sandbox imports this module once. Payloads and results are JSON."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import math_verify
import sympy

from elpo_fast.tasks.calculation import only_calculate

# It warns at every call that its own time limits are off: they need signals in the main thread,
# and the sandbox has a limit of its own.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_SPACE = r"(?:,?\\[,;:! ]|~|\{,\}|\s)"
_GROUPED = re.compile(rf"(?<![\w.,])\d{{1,3}}(?:{_SPACE}\d{{3}})+(?![\w,]*\d)")
_EXPONENT = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?!\w)")
_OR = re.compile(r"\\(?:text|textrm|mathrm|mbox)\{\s*or\s*\}|\bor\b|\\l?or\b|\\vee\b|\\cup\b")
_RELATION = re.compile(r"[<>≤≥≠]|\\(?:leq?|geq?|lt|gt|neq?)(?![a-z])")


def equal(payload: Mapping[str, Any]) -> dict[str, Any]:
    r"""Whether `answer` equals one of `truths`, all LaTeX without `\boxed`: numbers however their
    digits are grouped, inequalities and the intervals they describe."""
    only_calculate()
    answer = payload["answer"]
    return {"correct": any(_equal(truth, answer) for truth in payload["truths"])}


def _equal(truth: str, answer: str) -> bool:
    truth, answer = _plain_numbers(truth), _plain_numbers(answer)
    if math_verify.verify(
        _parse(truth), _parse(answer), allow_set_relation_comp=True, timeout_seconds=None
    ):
        return True
    sides = [_OR.split(truth), _OR.split(answer)]
    if max(map(len, sides)) == 1 or not any(_RELATION.search(text) for text in (truth, answer)):
        return False
    sets = [[_set(part) for part in side] for side in sides]
    if any(part is None for side in sets for part in side):
        return False
    return bool(sympy.Union(*sets[0]) == sympy.Union(*sets[1]))


def _plain_numbers(text: str) -> str:
    r"""`1\,000` as 1000 and `1.5e3` as a product."""
    text = _GROUPED.sub(lambda found: re.sub(_SPACE, "", found[0]), text)
    return _EXPONENT.sub(r"\1\\times 10^{\2}", text)


def _set(text: str) -> Any:
    """The real numbers that an inequality or an interval describes; `None` where it is neither."""
    parsed = next(iter(_parse(text)), None)
    if isinstance(parsed, sympy.Set):
        return parsed
    if not isinstance(parsed, (sympy.core.relational.Relational, sympy.And)):
        return None
    return parsed.as_set() if len(parsed.free_symbols) == 1 else None


def _parse(text: str) -> Any:
    return math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None)


# Once in the server, so that every call forked from it finds the parser's tables built.
equal({"answer": r"\frac{1}{2}", "truths": ["0.5"]})
