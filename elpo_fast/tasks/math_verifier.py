"""Mathematical equality by math-verify, called in the sandbox: sympy can work on one answer for
hours. The sandbox imports this module once. Payloads and results are JSON."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import math_verify

from elpo_fast.tasks.calculation import only_calculate

# It warns at every call that its own time limits are off: they need signals in the main thread,
# and the sandbox has a limit of its own.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def equal(payload: Mapping[str, Any]) -> dict[str, Any]:
    r"""Whether `answer` equals one of `truths`, all LaTeX without `\boxed`."""
    only_calculate()
    answer = _parse(payload["answer"])
    correct = any(
        math_verify.verify(_parse(truth), answer, timeout_seconds=None)
        for truth in payload["truths"]
    )
    return {"correct": correct}


def _parse(text: str) -> Any:
    return math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None)


# Once in the server, so that every call forked from it finds the parser's tables built.
equal({"answer": r"\frac{1}{2}", "truths": ["0.5"]})
