"""A policy that says what it is told to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.types import Completion, Sampling


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], None]:
    """Makes the local engine draw its messages from these; one with a call ends there."""

    def speak(sayings: Sequence[str]) -> None:
        async def generate(
            self: LocalEngine, prefix_ids: Any, n: int, sampling: Sampling
        ) -> list[Completion]:
            rng = np.random.default_rng(sampling.seed)
            completions = []
            for text in rng.choice(list(sayings), n):
                ids = self._tokenizer(str(text), add_special_tokens=False).input_ids
                called = text.endswith("</tool_call>")
                ids = np.array(ids if called else [*ids, self._tokenizer.eos_token_id], np.int32)
                some = np.full(len(ids), -1, np.float32)
                finish = "stop_string" if called else "stop_token"
                completions.append(
                    Completion(ids, some, -some, finish, weight_version=self.weight_version)
                )
            return completions

        monkeypatch.setattr(LocalEngine, "generate", generate)

    return speak
