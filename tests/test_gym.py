"""What the comparison on reasoning-gym's chain sums learns from, in `bench/gym`."""

from __future__ import annotations

from pathlib import Path

import pytest

from elpo_fast.config import load_config
from elpo_fast.tasks import make_source
from elpo_fast.tasks.gym_verifier import make_dataset
from elpo_fast.train.sft import read_data

FOLDER = Path(__file__).parents[1] / "bench" / "gym"


def test_chats_are_right_and_none_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    config = load_config(FOLDER / "chain_sum.yaml", ["sft.held_out_fraction=0"])
    source = make_source(config.task, 0, None)
    held_out = {source.held_out(index).messages[-1]["content"] for index in range(300)}
    verifier = make_dataset("chain_sum", {}, seed=0, size=1)
    for chat in read_data(config.sft).train:
        system, question, *said = chat.messages
        assert system["content"] == config.task.system and question["content"] not in held_out
        expression = question["content"].removesuffix(" =").rpartition(": ")[2]
        session: dict[str, int] = {}
        for call, result in zip(said[:-1:2], said[1:-1:2], strict=True):
            code = call["tool_calls"][0]["function"]["arguments"]["code"]
            statement, _, shown = code.partition(";")
            exec(statement, session)
            assert result["content"] == str(session[shown])
        answer = said[-1]["content"].removeprefix("<answer>").removesuffix("</answer>")
        assert verifier.score_answer(answer, {"answer": str(eval(expression))}) == 1
        assert len(said) // 2 == len(expression.split()[::2]) < config.rollout.max_turns
