"""One's own things by name: what is found, what is called how, and what is said of faults."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import elpo_fast as elpo
from elpo_fast import own
from elpo_fast.algo import check
from elpo_fast.config import AlgoConfig, ConfigError, TaskConfig, ToolConfig, parse_config
from elpo_fast.model.tokenizer import train_tokenizer
from elpo_fast.rollout.chat import Chat
from elpo_fast.tasks import make_source
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import End, RunError, Task, ToolCall, ToolResult, Verdict

MODULE = """
from __future__ import annotations
import asyncio, os, time
import numpy as np
from elpo_fast import CallFormat, Section, Task, TaskSource, Tool, ToolCall, ToolResult, Verdict

number = 3

def rows(count: int = 12, split: str = "all"):
    for index in range(count):
        yield {"prompt": f"Say {index} of {split}.", "wanted": str(index)}

def odd():
    return [{"question": "a"}, "b"]

def no_rows():
    return 3

def score(task, messages, end):
    return float(messages[-1]["content"] == task.info["wanted"])

async def late(task, messages, end):
    await asyncio.sleep(0)
    return Verdict(True, 7, f"{task.truth} {end.value} {os.getpid()}")

def hangs(task, messages, end):
    time.sleep(600)

def stops(task, messages, end):
    return next(iter(()))

def dies(task, messages, end):
    os._exit(3)

def text(task, messages, end):
    return "good"

def two(task, messages):
    return 1.0

class Source(TaskSource):
    name = "source"

    def __init__(self, seed, key, level: int = 1):
        self.seed, self.key, self.level = seed, key, level

    def train(self, index):
        return Task(f"t{index}", ({"role": "user", "content": f"level {self.level}"},), self.name)

    held_out = train

    async def grade(self, task, messages, end):
        return Verdict(True, 1.0, "fine")

class Bare:
    def train(self, index):
        return None

def schema(name):
    parameters = {"type": "object", "properties": {}}
    function = {"name": name, "description": "", "parameters": parameters}
    return {"type": "function", "function": function}

class ToTheEnd(CallFormat):
    opening, closing = "CALL ", ""

    def __init__(self, tools):
        self.tool = tools[0]["function"]["name"]

    def read(self, body):
        return ToolCall(self.tool, {"code": body})

    def write(self, name, arguments):
        return arguments["code"]

class Counter(Tool):
    class Options(Section):
        start: int = 0
        step: int = 1

    schema = schema("count")

    def __init__(self, options):
        self.options, self.released = options, []

    def open(self, task):  # need not be a coroutine
        return [self.options.start]

    async def call(self, state, arguments):
        return ToolResult(str(state[0] + self.options.step), [state[0] + self.options.step])

    async def release(self, states):
        self.released += states

class Slow(Tool):
    schema = schema("slow")

    async def call(self, state, arguments):
        await asyncio.sleep(600)

class Sloppy(Tool):
    schema = schema("sloppy")

    async def call(self, state, arguments):
        return "text"

class NoSchema(Tool):
    async def call(self, state, arguments):
        return None

class NoCall(Tool):
    schema = schema("nothing")

class Changing(Counter):
    schema = schema("change")

    async def call(self, state, arguments):
        state[0] += 1
        return ToolResult(str(state[0]), state)

class Forgetful(Counter):
    schema = schema("forget")

    async def call(self, state, arguments):
        return ToolResult("done")

def short(forest):
    return [1.0]

def infinite(forest, weight):
    return np.full(len(forest.leaf_node), np.inf)
"""


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mine.py` in the working directory, which is importable by nothing but our own doing."""
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")  # the path is restored at the end
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")


def installed(tmp_path: Path, **points: str) -> None:
    """A package of another one that registers entry points by `kind="name = module:attribute"`."""
    about = tmp_path / "other-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    text = "".join(f"[elpo_fast.{kind}]\n{line}\n" for kind, line in points.items())
    (about / "entry_points.txt").write_text(text)
    sys.path.insert(0, str(tmp_path))


def source(**task: Any) -> Any:
    config = TaskConfig.model_validate({"seed": 0, **task})
    return make_source(config, 3, None, apart=Toolbox(ToolConfig(names=[])).apart)  # type: ignore


def graded(found: Any, task: Task, said: str, end: End = End.ANSWER) -> Verdict:
    messages = [*task.messages, {"role": "assistant", "content": said}]
    return asyncio.run(found.grade(task, messages, end))


def test_a_function_gives_rows_and_another_the_reward() -> None:
    found = source(
        source="mine:rows",
        reward="mine:score",
        options={"arguments": {"count": 40}, "held_out_fraction": 0.3},
        system="Be brief.",
    )
    assert found.train_size + found.held_out_size == 40 and found.held_out_size > 0
    task = found.train(0)
    assert task.messages[0]["content"] == "Be brief." and set(task.info) == {"wanted"}
    right, wrong = graded(found, task, task.info["wanted"]), graded(found, task, "no")
    assert right == Verdict(True, 1.0, "mine:score gives 1")
    assert wrong == Verdict(False, 0.0, "mine:score gives 0")


def test_a_function_may_know_splits() -> None:
    found = source(
        source="file",
        reward="mine:score",
        options={"path": "mine:rows", "split": "train", "held_out_split": "test"},
    )
    assert (found.train_size, found.held_out_size) == (12, 12)
    assert "of test" in found.held_out(0).messages[0]["content"]


def test_rows_of_a_function_can_have_our_verdicts() -> None:
    columns = {"question": "prompt", "answer": "wanted"}
    found = source(source="mine:rows", options={"columns": columns})
    task = found.train(0)
    assert "\\boxed" in task.messages[-1]["content"]
    assert graded(found, task, f"\\boxed{{{task.truth[0]}}}").correct


def test_a_file_with_a_reward_needs_no_answers(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "Say a.", "wanted": "a"}\n' * 30)
    options = {"path": "rows.jsonl", "columns": {"question": "q"}, "held_out_fraction": 1.0}
    found = source(source="file", options=options, reward="mine:score")
    assert found.held_out(0).messages[0]["content"] == "Say a."  # nothing is added
    assert graded(found, found.held_out(0), "a").correct


def test_rewards_may_be_coroutines_that_return_verdicts() -> None:
    columns = {"question": "prompt", "answer": "wanted"}
    found = source(source="mine:rows", reward="mine:late", options={"columns": columns})
    task = found.train(0)
    verdict = graded(found, task, "", End.LENGTH)
    assert verdict == Verdict(True, 7, f"{task.truth} length {os.getpid()}")


def test_rewards_with_a_time_limit_run_in_a_process_of_their_own() -> None:
    found = source(source="mine:rows", reward="mine:late", reward_timeout_s=60)
    verdict = graded(found, found.train(0), "")
    none, answer, process = verdict.reason.split()
    assert (verdict.correct, verdict.reward, none, answer) == (True, 7, "None", "answer")
    assert int(process) != os.getpid()


@pytest.mark.parametrize(
    ("reward", "limit", "problem"),
    [
        ("mine:hangs", 0.5, "timed out after 0.5 s"),
        ("mine:dies", 60, "ended (exit status 3) before it answered"),
        ("mine:stops", 60, "it raised StopIteration"),
        ("mine:stops", None, "it raised StopIteration"),
        ("mine:text", None, "mine:text returned a str; return a number or a Verdict"),
    ],
)
def test_faulty_rewards_raise_what_ends_the_trajectory(reward, limit, problem: str) -> None:
    found = source(source="mine:rows", reward=reward, reward_timeout_s=limit)
    with pytest.raises((RuntimeError, TypeError)) as caught:
        graded(found, found.train(0), "")
    assert problem in str(caught.value) and not isinstance(caught.value, RunError)
    failed = graded(found, found.train(0), "", End.FAULT)  # without asking again
    assert (failed.correct, failed.reward) == (False, -1)


def test_a_class_is_a_source(tmp_path: Path) -> None:
    found = source(source="mine:Source", options={"level": 4})
    assert (found.seed, found.key, found.level) == (3, 0, 4)
    assert (found.train_size, found.held_out_size, found.demonstration(None)) == (None, None, None)
    assert {"level 4", "system\nuser\nassistant\ntool\n"} == {*found.vocabulary_texts()}


def test_entry_points_are_names(tmp_path: Path) -> None:
    installed(tmp_path, tasks="plain = mine:Source", rewards="late = mine:late")
    config = parse_config({"task": {"source": "plain", "reward": "late", "seed": 0}})
    found = source(**config.task.model_dump())
    assert found.name == "source" and graded(found, found.train(0), "").reward == 7


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"source": "ledgr"}, "task.source: unknown name; did you mean ledger?"),
        (
            {"reward": "score"},
            "named as module:attribute, or by an entry point in the group elpo_f",
        ),
        ({"source": "mine"}, "known: ledger, reasoning_gym, file, verifiers;"),
        ({"reward_timeout_s": 3}, "set reward or drop it"),
        ({"correct_above": float("inf")}, "task.correct_above"),
    ],
)
def test_names_that_nothing_has_are_said_with_the_configuration(task, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"task": task})
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            {"source": "nowhere:rows"},
            "task.source: nowhere:rows cannot be imported (ModuleNotFound",
        ),
        ({"source": "broken:rows"}, "(ZeroDivisionError: division by zero, "),
        ({"source": "broken:rows"}, "broken.py line 2)"),
        ({"source": "mine:Sorce"}, "mine has no 'Sorce'; did you mean mine:Source?"),
        ({"source": "mine:number"}, "task.source: mine:number is a int; name a function or class"),
        ({"source": ":rows"}, "task.source: :rows is not of the form module:attribute"),
        (
            {"source": "mine:Source", "options": {"lvl": 2}},
            "unknown key task.options.lvl; did you mean task.options.level?",
        ),
        ({"source": "mine:Source", "options": {"level": "x"}}, "task.options.level: Input should"),
        ({"source": "mine:Source", "system": "Go."}, "has no parameter `system`"),
        ({"source": "mine:Bare"}, "task.source: mine:Bare has no name, train_size, held_out"),
        ({"source": "mine:rows", "options": {}}, "columns: prompt, wanted"),
        ({"source": "mine:odd", "reward": "mine:score"}, "row 1: must be an object, not text"),
        ({"source": "mine:odd", "reward": "mine:score"}, '{"prompt": "What is 6 times 7?"}; other'),
        ({"source": "mine:no_rows"}, "mine:no_rows must give rows, one mapping each, not int"),
        (
            {"source": "mine:rows", "options": {"arguments": {"cuont": 3}}},
            "unknown key task.options.arguments.cuont; did you mean task.options.arguments.count?",
        ),
        (
            {"source": "mine:rows", "options": {"columns": {"question": "prompt"}}},
            "set task.reward",
        ),
        ({"reward": "mine:two"}, "mine:two cannot be called with (task, messages, end)"),
        ({"reward": "mine:scroe"}, "task.reward: mine has no 'scroe'; did you mean mine:score?"),
    ],
)
def test_faults_of_tasks_and_rewards_are_one_sentence(task: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source(**task)
    assert said in str(caught.value)


def calls(config: ToolConfig, *names: str) -> tuple[list[ToolResult], Toolbox]:
    box = Toolbox(config)

    async def main() -> list[ToolResult]:
        state = await box.open(Task("t", (), "test"))
        results = [await box.execute(state, ToolCall(name, {})) for name in names]
        await box.release([state, *(result.state for result in results)])
        await box.close()
        return results

    return asyncio.run(main()), box


def test_a_tool_has_options_and_states_that_need_not_be_hashable() -> None:
    options = {"mine:Counter": {"start": 5, "step": 2}}
    config = ToolConfig(names=["mine:Counter"], options=options)
    results, box = calls(config, "count", "count")
    assert [result.content for result in results] == ["7", "7"]  # both from the same state
    assert box.schemas[0]["function"]["name"] == "count"
    released = box._tools["count"][0]._tool.released  # type: ignore[attr-defined]
    assert released == [[5], [7], [7]]


def test_a_tool_that_takes_too_long_is_cancelled() -> None:
    (result,), _ = calls(ToolConfig(names=["mine:Slow"], timeout_s=0.1), "slow")
    assert (result.content, result.error) == ("timed out after 0.1 s", True)


def test_a_tool_must_return_a_result() -> None:
    with pytest.raises(TypeError, match=r"Sloppy\.call returned a str; return a ToolResult"):
        calls(ToolConfig(names=["mine:Sloppy"]), "sloppy")


def test_a_tool_that_changes_its_state_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    calls(ToolConfig(names=["mine:Changing"]), "change", "change")
    assert [r.getMessage().split(" that ")[0] for r in caplog.records] == [
        "Changing.call changed the state"
    ]
    caplog.clear()
    calls(ToolConfig(names=["mine:Counter"]), *["count"] * 15)
    assert not caplog.records


def test_a_tool_that_forgets_its_state_is_said() -> None:
    with pytest.raises(TypeError, match=r"Forgetful\.call returned no state"):
        calls(ToolConfig(names=["mine:Forgetful"]), "forget")


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ({"names": ["pyton_session"]}, "did you mean python_session?"),
        ({"names": ["mine:Countr"]}, "tools.names: mine has no 'Countr'; did you mean"),
        ({"names": ["mine:NoSchema"]}, "tools.names: mine:NoSchema has no schema"),
        ({"names": ["mine:NoCall"]}, "tools.names: mine:NoCall has no call"),
        ({"options": {"mine:Counter": {}}}, "'mine:Counter' is not one"),
        (
            {"names": ["mine:Counter"], "options": {"mine:Counter": {"begin": 2}}},
            "unknown key tools.options.mine:Counter.begin; known: start, step",
        ),
    ],
)
def test_faults_of_tools_are_one_sentence(tools: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Toolbox(parse_config({"tools": tools}).tools)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("algo", "said"),
    [
        ({"planner": "bell"}, "did you mean bel?"),
        ({"planner": "mine:Source"}, "algo.options.planner.seed: Field required"),
        (
            {"planner": "mine:Counter", "options": {"planner": {"step": 1}}},
            "mine:Counter has no critical, reads_entropy, done",
        ),
        ({"options": {"planner": {"x": 1}}}, "algo.options.planner is for one of your own"),
        ({"options": {"planers": {}}}, "did you mean algo.options.planner?"),
        ({"advantage": "mine:nothing"}, "algo.advantage: mine has no 'nothing'"),
        ({"weights": "mine:short", "options": {"weights": {"a": 1}}}, "algo.options.weights.a"),
    ],
)
def test_faults_of_algorithms_are_one_sentence(algo: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(parse_config({"algo": algo}).algo)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def chat(call_format: str) -> Chat:
    tokenizer = train_tokenizer(["call a tool to the end"] * 5)
    tool = {"type": "function", "function": {"name": "run", "description": "", "parameters": {}}}
    return Chat(tokenizer, call_format, [tool])


def test_a_format_of_calls_may_end_with_the_message() -> None:
    mine = chat("mine:ToTheEnd")
    function = {"name": "run", "arguments": {"code": "x = 1\n"}}
    text = mine.call_text(
        {"role": "assistant", "content": "So ", "tool_calls": [{"function": function}]}
    )
    assert text == "So CALL x = 1\n" and mine.stop == ()
    assert mine.parse_call(text) == ToolCall("run", {"code": "x = 1\n"})
    assert mine.parse_call("So") is None
    prompt = mine.decode(mine.prompt([{"role": "user", "content": "Do it."}]))
    assert '"run"' not in prompt and '"run"' in chat("hermes").decode(
        chat("hermes").prompt([{"role": "user", "content": "Do it."}])
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine:Counter", "mine:Counter has no opening, closing"),
        ("mine:Source", "rollout.call_format.seed: Field required"),
        ("mine:ToTheEd", "did you mean mine:ToTheEnd?"),
    ],
)
def test_faults_of_formats_are_one_sentence(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        chat(name)


def star(rewards: list[float]) -> elpo.Forest:
    tree = elpo.Tree(np.arange(3, dtype=np.int32), task_id="t", info={})
    for reward in rewards:
        ids = np.arange(2, dtype=np.int32)
        zeros = np.zeros(2, np.float32)
        node = tree.add_step(
            0, ids, np.ones(2, bool), zeros, zeros, tool_call=False, weight_version=0
        )
        tree.finish(node, reward=reward, correct=reward > 0, end="answer", reason="")
    return elpo.Forest.from_trees([tree])


@pytest.mark.parametrize(
    ("algo", "said"),
    [
        ({"weights": "mine:short"}, r"shape \[1\]; it has to be \[2\], one for each trajectory"),
        ({"advantage": "mine:short"}, r"\[2\], one for each trajectory, or \[3\], one for each no"),
        ({"advantage": "mine:infinite"}, "mine:infinite gave 2 numbers that are not finite"),
    ],
)
def test_numbers_that_are_none_end_the_run(algo: dict[str, str], said: str) -> None:
    with pytest.raises(RunError, match=said):
        elpo.score(star([1.0, -1.0]), AlgoConfig.model_validate(algo))


def test_an_advantage_belongs_to_trajectories_or_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    forest = star([1.0, -1.0])
    mine = own.find("advantages", "mine:short", "algo.advantage").__globals__
    config = AlgoConfig(advantage="mine:short")
    grouped = elpo.score(forest, AlgoConfig(advantage="group"))
    for values in ([2.0, -2.0], [9.0, 2.0, -2.0]):
        mine["short"] = lambda forest, values=values: values
        scored = elpo.score(forest, config)
        assert scored.advantage[1:].tolist() == [2.0, -2.0]
        ratio = 2.0 / grouped.advantage[1]
        np.testing.assert_allclose(scored.pos[1:], ratio * grouped.pos[1:])
        np.testing.assert_allclose(scored.neg[1:], ratio * grouped.neg[1:])


def test_the_public_face_is_there() -> None:
    for name in elpo.__all__:
        assert getattr(elpo, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = elpo.nothing
