"""Verifiers that are called in the sandbox, never in the trainer's process.

Several of reasoning-gym's verifiers evaluate the answer as Python, and sympy can work on one for
hours; here an answer can do no more than lose its own trajectory. Payloads and results are JSON.
This module imports the standard library alone until a verifier is called.
"""

from __future__ import annotations

import base64
import logging
import pickle
from collections.abc import Mapping
from typing import Any

NONSENSE = "§"
"""No verifier should give this full marks; some do."""


def gym_dataset(name: str, config: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """A reasoning-gym set; `composite` takes its parts as mappings, as its YAML form does."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    arguments = dict(config)
    if name == "composite":
        arguments["datasets"] = [
            DatasetSpec(
                weight=part.get("weight", 1.0), config=part.get("config", {}), name=part["name"]
            )
            for part in arguments.get("datasets", [])
        ]
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **arguments)


def pack_entry(entry: Mapping[str, Any]) -> str:
    """A reasoning-gym entry as text. JSON would turn tuples into lists, and `arc_agi` and `rearc`
    then judge right answers wrong."""
    return base64.b64encode(pickle.dumps(entry)).decode()


def gym_score(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Score `answer` for the entry with reasoning-gym's own verifier.

    Some verifiers give full marks to nonsense (`game_of_life_halting` to any text at all). Where
    this one does, only the reference answer itself counts. An exception is a score of 0: verifiers
    raise on answers they cannot read.
    """
    entry = pickle.loads(base64.b64decode(payload["entry"]))
    dataset = gym_dataset(payload["dataset"], payload["config"], seed=0, size=1)
    answer = payload["answer"]

    def score(text: str) -> tuple[float, str]:
        try:
            return float(dataset.score_answer(text, entry)), ""
        except Exception as error:  # whatever the verifier stumbles over
            return 0.0, f"{type(error).__name__}: {error}"

    value, error = score(answer)
    if value >= 1 and score(NONSENSE)[0] >= 1:
        value = float(answer.strip() == str(entry["answer"]).strip())
    return {"score": value, "error": error}


def math_equal(payload: Mapping[str, Any]) -> dict[str, Any]:
    r"""Whether `answer` equals one of `truths`, all LaTeX without `\boxed`, by math-verify."""
    import math_verify

    # Its own time limits need the main thread's signals; the sandbox has a limit of its own.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def parse(text: str) -> Any:
        return math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None)

    answer = parse(payload["answer"])
    correct = any(
        math_verify.verify(parse(truth), answer, timeout_seconds=None)
        for truth in payload["truths"]
    )
    return {"correct": correct}
