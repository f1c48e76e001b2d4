"""Environments of the package `verifiers`: rows, rubric, tools, and what is refused."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from elpo_fast.config import ConfigError, TaskConfig, ToolConfig
from elpo_fast.tasks import make_source
from elpo_fast.tasks import verifiers as ours
from elpo_fast.tasks.verifiers import Verifiers
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import End, MalformedCall, ToolCall

vf = pytest.importorskip("verifiers")

ENVIRONMENT = '''
import verifiers as vf
from datasets import Dataset

SEEN = []

def halve(number: int) -> int:
    """Half of a number.

    Args:
        number: an even one
    """
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number // 2

async def wait(seconds: float) -> str:
    """Wait."""
    import asyncio
    await asyncio.sleep(seconds)
    return "waited"

def right(completion, answer, state, info):
    SEEN.append((state, info))
    return float(completion[-1]["content"] == answer)

def short(completion):
    return float(len(completion[-1]["content"]) < 3)

def rows(first, count, **more):
    return Dataset.from_list(
        [
            {"question": f"Half of {2 * n}?", "answer": str(n), "info": {"n": n}, **more}
            for n in range(first, first + count)
        ]
    )

class Chatty(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        return []

class Quits(vf.SingleTurnEnv):
    @vf.stop
    async def enough(self, state):
        return True

def load_environment(kind="tools", held_out=0, overlap=0, **more):
    rubric = vf.Rubric(funcs=[right, short], weights=[1.0, 0.25])
    given = {"dataset": rows(0, 40, **more), "rubric": rubric, "system_prompt": "Be brief."}
    if held_out:
        given["eval_dataset"] = rows(40 - overlap, held_out)
    match kind:
        case "tools":
            return vf.ToolEnv(tools=[halve, wait], max_turns=4, **given)
        case "single":
            return vf.SingleTurnEnv(**given)
        case "chatty":
            return Chatty(**given)
        case "quits":
            return Quits(**given)
        case "groups":
            def of_all(completions):
                return [0.0 for _ in completions]
            return vf.SingleTurnEnv(**{**given, "rubric": vf.Rubric(funcs=[of_all])})
        case "text":
            given = {"dataset": rows(0, 3, prompt="Once upon"), "rubric": rubric}
            return vf.SingleTurnEnv(**given, message_type="completion")
        case "free":
            return vf.SingleTurnEnv(**{**given, "rubric": vf.Rubric()})
    raise RuntimeError(f"there is no {kind}")
'''


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halves.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "halves", raising=False)


def source(seed: int = 0, system: str | None = None, *, options=None, **args) -> Verifiers:
    config = TaskConfig(
        source="verifiers",
        options={"env": "halves", "args": args, **(options or {})},
        system=system,
    )
    return make_source(config, seed, None)  # type: ignore[arg-type, return-value]


def said(*turns: str) -> list[dict[str, str]]:
    roles = ("assistant", "tool")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]


def test_rows_are_tasks_with_the_environments_system_message() -> None:
    found = source()
    tasks = [found.train(index) for index in range(found.train_size)]
    held = [found.held_out(index) for index in range(found.held_out_size)]
    asked = [task.messages[-1]["content"] for task in (*tasks, *held)]
    assert sorted(asked) == sorted(f"Half of {2 * n}?" for n in range(40)) and held
    assert tasks[0].messages[0] == {"role": "system", "content": "Be brief."}
    assert tasks[0].max_turns == 4 and source(kind="single").train(0).max_turns == 1
    n = tasks[0].info["n"]
    assert tasks[0].messages[-1]["content"] == f"Half of {2 * n}?"
    assert found.train(found.train_size) == tasks[0] == source().train(0)
    assert [source(seed=1).train(n).id for n in range(9)] != [task.id for task in tasks[:9]]
    assert source(system="Be rude.").train(0).messages[0]["content"] == "Be rude."


def test_rows_for_evaluation_are_held_out_and_not_trained_on(caplog) -> None:
    found = source(held_out=10)
    assert (found.train_size, found.held_out_size) == (40, 10)
    found = source(held_out=10, overlap=3)
    assert (found.train_size, found.held_out_size) == (37, 10)
    assert "3 of 40 training rows of halves" in caplog.text


def test_the_rubric_judges_with_its_weights() -> None:
    found = source()
    task = found.train(0)
    n = task.info["n"]
    call = f'So: <tool_call>{{"name": "halve", "arguments": {{"number": {2 * n}}}}}</tool_call>'
    messages = [*task.messages, *said(call, str(n), str(n))]
    verdict = asyncio.run(found.grade(task, messages, End.ANSWER))
    assert verdict.correct and verdict.reward == 1.25
    assert "right 1" in verdict.reason and "total_tool_calls 1" in verdict.reason
    assert "halve_calls 1" in verdict.reason and "wait_calls 0" in verdict.reason
    state, info = sys.modules["halves"].SEEN[-1]
    assert info == {"n": n} and state["answer"] == str(n) and len(state["trajectory"]) == 2
    first, response, last = state["completion"]
    assert (first["content"], last["content"]) == ("So:", str(n))
    (made,) = first["tool_calls"]
    assert (made["id"] if isinstance(made, dict) else made.id) == response["tool_call_id"]
    wrong = asyncio.run(found.grade(task, [*task.messages, *said("0000")], End.LENGTH))
    assert not wrong.correct and wrong.reward == 0
    assert sys.modules["halves"].SEEN[-1][0]["is_truncated"]
    assert asyncio.run(found.grade(task, messages, End.FAULT)).reward == 0


def test_its_functions_are_tools() -> None:
    async def main() -> None:
        toolbox = Toolbox(ToolConfig(names=[]))
        found = source(options={"timeout_s": 1})
        toolbox.offer(found.tools)
        assert toolbox.names == ("halve", "wait")
        described = toolbox.schemas[0]["function"]
        assert described["description"] == "Half of a number."
        assert described["parameters"]["properties"]["number"]["description"] == "an even one"
        state = await toolbox.open(found.train(0))
        answers = [
            await toolbox.execute(state, call)
            for call in (
                ToolCall("halve", {"number": 14}),
                ToolCall("halve", {"number": 7}),
                ToolCall("halve", {"numbre": 7}),
                MalformedCall("what?"),
                ToolCall("wait", {"seconds": 60}),
            )
        ]
        assert [answer.error for answer in answers] == [False, True, True, True, True]
        right, odd, unknown, _, late = (answer.content for answer in answers)
        assert (right, odd, late) == ("7", "7 is odd", "timed out after 1 s")
        assert "'number' is a required property" in unknown
        with pytest.raises(ConfigError, match="halve is there twice"):
            toolbox.offer(found.tools)
        await toolbox.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"kind": "chatty"}, "a Chatty, which answers in a way of its own"),
        ({"kind": "quits"}, "ends rollouts by enough"),
        ({"kind": "groups"}, "rewards groups"),
        ({"kind": "free"}, "has no reward"),
        ({"kind": "nothing"}, "cannot be loaded .*there is no nothing"),
        ({"info": json.dumps({"oai_tools": []})}, "row 0 of halves has tools of its own"),
        ({"kind": "text"}, "row 0 of halves has a text to complete"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(args, message) -> None:
    with pytest.raises(ConfigError, match=message):
        source(**args)


@pytest.mark.parametrize("found", ["0.4.0", None])
def test_other_versions_are_refused_in_one_sentence(found, monkeypatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise ours.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(ours, "version", version)
    with pytest.raises(ConfigError, match=rf"and {found or 'none'} is installed; pip install"):
        source()


def test_handlers_of_signals_stay() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    source()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_environment_that_is_not_installed() -> None:
    with pytest.raises(ConfigError, match="nowhere cannot be loaded"):
        source(options={"env": "some/nowhere"})
