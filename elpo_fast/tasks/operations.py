"""The operations of the `ledger` family: what each does, its Python expression, its wordings.

`code` and `apply` of a kind mean the same (tested); `{c}` in code and wordings stands for the
constant. Wordings of different kinds may differ in little ("take 3 from it", "take it from 300"),
but none is ambiguous given the system message. Everything is short: small models pay per token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of operation; its constant lies in `low..high`, both included, 0 where unused."""

    name: str
    level: int
    code: str
    apply: Callable[[int, int], int]  # x unchanged where the code would raise
    low: int = 0
    high: int = 0

    @property
    def wordings(self) -> list[str]:
        return WORDINGS[self.name].split(" | ")


def _reverse(x: int, _: int) -> int:
    return int(str(x)[::-1]) if x >= 0 else x


def _digit_sum(x: int, _: int) -> int:
    return sum(map(int, str(x))) if x >= 0 else x


KINDS = (
    Kind("add", 1, "x+{c}", lambda x, c: x + c, 2, 9),
    Kind("subtract", 1, "x-{c}", lambda x, c: x - c, 2, 9),
    Kind("double", 1, "x*2", lambda x, c: x * 2),
    Kind("halve", 1, "x//2", lambda x, c: x // 2),
    Kind("multiply", 2, "x*{c}", lambda x, c: x * c, 3, 5),
    Kind("divide", 2, "x//{c}", lambda x, c: x // c, 3, 5),
    Kind("remainder", 2, "x%{c}", lambda x, c: x % c, 21, 59),
    Kind("reverse", 2, "int(str(x)[::-1])", _reverse),
    Kind("complement", 3, "{c}-x", lambda x, c: c - x, 300, 399),
    Kind("digits", 3, "sum(map(int,str(x)))", _digit_sum),
    Kind("tens", 3, "x-x%10", lambda x, c: x - x % 10),
)

WORDINGS = {
    "add": "add {c} | plus {c} | {c} more | raise it by {c} | put {c} on top | increase by {c}",
    "subtract": (
        "subtract {c} | minus {c} | {c} less | lower it by {c} | take {c} from it | reduce by {c}"
    ),
    "double": (
        "double it | times two | twice as much | add it to itself | make two of it | two times that"
    ),
    "halve": (
        "halve it | divide by two | half as much | keep half of it | cut it in two | "
        "split it in two"
    ),
    "multiply": (
        "multiply by {c} | times {c} | {c} times as much | scale it by {c} | make {c} of it | "
        "{c} copies of it"
    ),
    "divide": (
        "divide by {c} | over {c} | cut it in {c} | share it among {c} | "
        "how many {c}s fit | split it in {c}"
    ),
    "remainder": (
        "modulo {c} | remainder by {c} | left over by {c} | take out all {c}s | rest after {c}s | "
        "what {c} leaves"
    ),
    "reverse": (
        "reverse it | read it backwards | mirror it | flip its digits | turn it around | "
        "back to front"
    ),
    "complement": (
        "take it from {c} | {c} minus it | what it lacks to {c} | {c} without it | "
        "subtract it from {c} | how much below {c}"
    ),
    "digits": (
        "digit sum | add its digits | sum of the digits | total its digits | add up the digits | "
        "all digits together"
    ),
    "tens": (
        "down to tens | drop the ones | only full tens | round down to ten | ones to zero | "
        "last digit to zero"
    ),
}
"""Six paraphrases of each kind, the plainest first, so that fewer paraphrases mean easier tasks."""

PARAPHRASES = 6
_PATIENCE = 50  # operations tried for one step before a draw is a dead end
BY_NAME = {kind.name: kind for kind in KINDS}
Operation = tuple[Kind, int]


def draw(
    rng: random.Random, value: int, steps: int, kinds: Sequence[Kind], max_value: int
) -> tuple[int, list[Operation]] | None:
    """`steps` operations from `value` on and the value they lead to, no single mistake forgiven;
    `None` where the draw ran into a dead end.

    Follows the set of values that any single mistake so far would have led to, and takes only
    operations that keep all of them apart from the right value.
    """
    wrong: set[int] = set()
    operations: list[Operation] = []
    while len(operations) < steps:
        for kind in rng.choices(kinds, k=_PATIENCE):
            constant = rng.randint(kind.low, kind.high)
            right = kind.apply(value, constant)
            still_wrong = {kind.apply(other, constant) for other in wrong}
            still_wrong |= mistakes(value, kind, constant, kinds)
            if 1 <= right <= max_value and right not in still_wrong:
                break
        else:
            return None
        operations.append((kind, constant))
        value, wrong = right, still_wrong
    return value, operations


def mistakes(value: int, kind: Kind, constant: int, kinds: Sequence[Kind]) -> set[int]:
    """Values after one step done wrong: left out, its constant one off, or another of `kinds` in
    its place, with the same constant where both take one, else with the lowest it could take."""
    wrong = {other.apply(value, constant or other.low) for other in kinds if other != kind}
    if constant:
        wrong |= {kind.apply(value, constant - 1), kind.apply(value, constant + 1)}
    return wrong | {value}
