"""Rows and a reward of one's own, each a function."""

import re


def rows(largest: int = 20):
    for first in range(1, largest):
        for second in range(1, largest):
            yield {"prompt": f"What is {first} plus {second}?", "sum": first + second}


def score(task, messages, end):
    """1 for the right sum, less for one that is near, nothing for no number at all."""
    numbers = re.findall(r"\d+", messages[-1]["content"])
    if not numbers:
        return 0.0
    return 1 / (1 + abs(int(numbers[-1]) - task.info["sum"]))
