"""Reasoning-gym's verifiers, called in the sandbox: several evaluate the answer as Python, here
only where it is a calculation (see `calculation`).

The sandbox imports this module once, the library with it. Payloads and results are JSON.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping
from typing import Any

import reasoning_gym
from reasoning_gym.composite import DatasetSpec

from elpo_fast.tasks.calculation import only_calculate

NONSENSE = "§"
"""No verifier should give this full marks; some do."""


def make_dataset(name: str, config: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """A reasoning-gym set; `composite` takes its parts as mappings, as its YAML form does."""
    arguments = dict(config)
    if name == "composite":
        arguments["datasets"] = [
            DatasetSpec(**{"weight": 1.0, "config": {}, **part})
            for part in arguments.get("datasets", [])
        ]
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **arguments)


def pack_entry(entry: Mapping[str, Any]) -> str:
    """A reasoning-gym entry as text. JSON would turn tuples into lists, and `arc_agi` and `rearc`
    then judge right answers wrong."""
    return base64.b64encode(pickle.dumps(entry)).decode()


def score(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Score `answer` for `entry` (packed) of `dataset` with `config`, by the set's own verifier.

    Some verifiers give full marks to nonsense (`game_of_life_halting` to any text at all). Where
    this one does, only the reference answer itself counts. An exception is a score of 0: verifiers
    raise on answers they cannot read.
    """
    entry = pickle.loads(base64.b64decode(payload["entry"]))
    dataset = make_dataset(payload["dataset"], payload["config"], seed=0, size=1)
    only_calculate()
    answer = payload["answer"]

    def marks(text: str) -> tuple[float, str]:
        try:
            return float(dataset.score_answer(text, entry)), ""
        except Exception as error:  # whatever the verifier stumbles over
            return 0.0, f"{type(error).__name__}: {error}"

    value, error = marks(answer)
    if value >= 1 and marks(NONSENSE)[0] >= 1:
        value = float(answer.strip() == str(entry["answer"]).strip())
    return {"score": value, "error": error}
