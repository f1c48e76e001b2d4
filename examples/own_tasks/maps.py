"""A task source of one's own, a class: random roads, and the way from one town to another."""

import random
from itertools import pairwise

from elpo_fast import End, Section, Task, TaskSource, Verdict


class MapOptions(Section):
    towns: int = 5


class MapTasks(TaskSource):
    Options = MapOptions
    name = "maps"

    def __init__(self, options, key, system=None):
        self.options, self.key = options, key
        self.system = system or "Find the way. Answer with the towns, such as A B C."

    def train(self, index):
        return self._task(f"train-{index}")

    def held_out(self, index):
        return self._task(f"held-out-{index}")

    async def grade(self, task, messages, end):
        towns = messages[-1]["content"].split()
        roads = {frozenset(road) for road in task.truth}
        known = all(frozenset(step) in roads for step in pairwise(towns))
        correct = end is End.ANSWER and known and towns[:1] + towns[-1:] == ["A", task.info["to"]]
        return Verdict(correct, 1.0 if correct else -1.0, f"went {towns[:10]}")

    def _task(self, name):
        towns = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: self.options.towns]
        rng = random.Random(f"{self.key} {name}")
        roads = [rng.sample(towns, 2) for _ in range(2 * len(towns))]
        roads += [[rng.choice(towns[:n]), towns[n]] for n in range(1, len(towns))]  # all in reach
        to = rng.choice(towns[1:])
        shown = ", ".join(f"{one}-{other}" for one, other in roads)
        question = f"There are the roads {shown}. How does one come from A to {to}?"
        messages = (
            {"role": "system", "content": self.system},
            {"role": "user", "content": question},
        )
        return Task(name, messages, self.name, truth=roads, info={"to": to})
