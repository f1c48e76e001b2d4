"""The collector against a scripted engine and tools whose every answer is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from elpo_fast.algo.bel import BelPlanner
from elpo_fast.algo.star import StarPlanner
from elpo_fast.config import RolloutConfig
from elpo_fast.model.tokenizer import train_tokenizer
from elpo_fast.rollout.chat import Chat
from elpo_fast.rollout.collector import Collector
from elpo_fast.tree.store import Tree
from elpo_fast.types import (
    Completion,
    End,
    MalformedCall,
    Message,
    RunError,
    Sampling,
    Task,
    ToolCall,
    ToolResult,
    Verdict,
)

STEPS = 5
TOOL = {"type": "function", "function": {"name": "python_session", "parameters": {}}}
GOOD, BAD, ANSWER = "<code>good</code>", "<code>bad</code>", "<answer>1</answer><|im_end|>"


class Engine:
    """Writes what `policy(text of the prefix, random generator)` says."""

    weight_version = 7

    def __init__(self, chat: Chat, policy: Callable[[str, np.random.Generator], str]) -> None:
        self.chat, self.policy = chat, policy
        self.samplings: list[Sampling] = []

    async def generate(
        self, prefix_ids: np.ndarray, n: int, sampling: Sampling
    ) -> list[Completion]:
        self.samplings.append(sampling)
        assert sampling.seed is not None
        rng = np.random.default_rng(sampling.seed)
        await asyncio.sleep(rng.uniform(0, 0.003))
        completions = []
        for _ in range(n):
            ids = self.chat.encode(self.policy(self.chat.decode(prefix_ids), rng))
            finish = "length" if len(ids) > sampling.max_tokens else "stop_string"
            ids = ids[: sampling.max_tokens]
            some = np.linspace(-2, -1, len(ids), dtype=np.float32)
            completions.append(Completion(ids, some, -some, finish, weight_version=7))
        return completions


class Tools:
    """State: the tuple of codes run so far. Counts what is open."""

    def __init__(self) -> None:
        self.opened, self.released = 0, 0

    async def open(self, task: Task) -> tuple[str, ...]:
        self.opened += 1
        return ()

    async def execute(self, state: Any, call: ToolCall | MalformedCall) -> ToolResult:
        if isinstance(call, MalformedCall):
            return ToolResult(call.problem, state, error=True)
        self.opened += 1
        await asyncio.sleep(0.001)
        return ToolResult(str(len(state) + 1), (*state, call.arguments["code"]))

    async def release(self, states: Iterable[Any]) -> None:
        self.released += len(list(states))


class Source:
    """Correct exactly if every one of `STEPS` calls was good."""

    name = "scripted"
    train_size = held_out_size = None

    def train(self, index: int) -> Task:
        return Task(
            f"t{index}", ({"role": "user", "content": "go"},), self.name, max_turns=STEPS + 1
        )

    held_out = train

    def vocabulary_texts(self) -> Iterable[str]:
        return ["go good bad"]

    def demonstration(self, task: Task) -> Sequence[Message]:
        call = {"function": {"name": "python_session", "arguments": {"code": "good"}}}
        calls = [{"role": "assistant", "content": "", "tool_calls": [call]}] * STEPS
        return [*calls, {"role": "assistant", "content": "<answer>1</answer>"}]

    async def grade(self, task: Task, messages: Sequence[Message], end: End) -> Verdict:
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        correct = end is End.ANSWER and said.count(GOOD) == STEPS and BAD not in said
        return Verdict(correct, float(correct), end.value)


def collector_for(
    policy: Callable[[str, np.random.Generator], str], **config: Any
) -> tuple[Collector, Tools]:
    chat = Chat(train_tokenizer(["go good bad code answer"] * 5), "code", [TOOL])
    tools = Tools()
    settings = RolloutConfig(**{"max_turn_tokens": 40, "max_tokens": 2000, **config})
    return Collector(Engine(chat, policy), tools, chat, Source(), settings, output_tokens=50), tools


def said_so_far(text: str) -> list[str]:
    return [GOOD if part.startswith("good") else BAD for part in text.split("<code>")[1:]]


def errs_at(step: int) -> Callable[[str, np.random.Generator], str]:
    """Never recovers after an error and errs at `step` (from 1) unless the prefix reaches it."""

    def policy(text: str, rng: np.random.Generator) -> str:
        said = said_so_far(text)
        if len(said) == STEPS:
            return ANSWER
        return BAD if len(said) + 1 == step else GOOD

    return policy


def coin(text: str, rng: np.random.Generator) -> str:
    """Good or bad by chance, answering after all steps."""
    if len(said_so_far(text)) == STEPS:
        return ANSWER
    return GOOD if rng.random() < 0.8 else BAD


def collect(collector: Collector, planner: Callable[[], Any], tasks: int = 3) -> list[Tree]:
    source = collector.source
    return asyncio.run(collector.collect([source.train(i) for i in range(tasks)], planner, seed=1))


def test_budget_ends_and_states_are_exact() -> None:
    collector, tools = collector_for(coin)
    trees = collect(collector, lambda: BelPlanner(16, 3, 1, 3, 5.0))
    for tree in trees:
        assert len(tree.leaves) == 16
        assert set(tree.ends) == {"answer"}
        assert all(tree.correct[leaf] == (tree.reward[leaf] == 1.0) for leaf in tree.leaves)
        assert set(tree.weight_version[1:]) == {7}
        assert any(len(tree.path(leaf)) == STEPS + 2 for leaf in tree.leaves)
    assert collector.stats.trajectories == 48
    assert tools.opened == tools.released


def test_search_finds_the_planted_step_through_the_whole_pipeline() -> None:
    """Every second trajectory errs at step 3, never elsewhere, and never recovers from it."""

    def policy(text: str, rng: np.random.Generator) -> str:
        said = said_so_far(text)
        if len(said) == STEPS:
            return ANSWER
        return BAD if len(said) == 2 and rng.random() < 0.5 else GOOD

    collector, _ = collector_for(policy)
    found = []
    for tree in collect(collector, lambda: BelPlanner(16, 2, 3, 3, 5.0), tasks=20):
        searches = zip(tree.critical_node, tree.critical_leaf, tree.critical_localized, strict=True)
        for node, leaf, localized in searches:
            if localized:
                found.append(tree.path(tree.leaves[leaf]).index(node))
    # Anchor 3 always fails; anchor 2 recovers unless all three suffixes err again: 7 in 8.
    assert len(found) >= 20
    assert max(found) == 3
    assert np.mean(np.array(found) == 3) > 0.7


def test_environment_tokens_are_masked_and_paths_are_conversations() -> None:
    collector, _ = collector_for(errs_at(2))
    (tree,) = collect(collector, lambda: StarPlanner(2), tasks=1)
    for leaf in tree.leaves:
        text = collector.chat.decode(tree.path_tokens(leaf))
        agent = np.concatenate([tree.token_ids[n][tree.agent[n] == 1] for n in tree.path(leaf)])
        assert collector.chat.decode(agent) == GOOD + BAD + GOOD * 3 + ANSWER
        assert text.count("<|im_start|>tool\n") == STEPS
        assert text.endswith(ANSWER)
        for node in tree.path(leaf):
            environment = tree.agent[node] == 0
            assert not tree.logprob[node][environment].any()


@pytest.mark.parametrize(
    ("policy", "config", "end"),
    [
        (lambda text, rng: GOOD, {}, "turn_limit"),
        (lambda text, rng: "x" * 200, {}, "length"),
        (lambda text, rng: GOOD, {"max_tokens": 60}, "length"),
        (lambda text, rng: ANSWER, {}, "answer"),
        (lambda text, rng: "<code>never closed<|im_end|>", {"max_turn_tokens": 60}, "turn_limit"),
    ],
    ids=["turn limit", "message limit", "context limit", "answer", "malformed to the end"],
)
def test_end_of_trajectory_is_named(policy: Any, config: dict[str, int], end: str) -> None:
    collector, tools = collector_for(policy, **config)
    (tree,) = collect(collector, lambda: StarPlanner(2), tasks=1)
    assert tree.ends == [end, end]
    assert tree.reasons == [end, end]
    assert tools.opened == len({0}) + collector.stats.tool_calls - collector.stats.malformed_calls


def test_malformed_call_is_answered_and_the_trajectory_goes_on() -> None:
    def policy(text: str, rng: np.random.Generator) -> str:
        return ANSWER if "not closed" in text else "<code>oops<|im_end|>"

    collector, _ = collector_for(policy)
    (tree,) = collect(collector, lambda: StarPlanner(1), tasks=1)
    assert tree.ends == ["answer"]
    assert collector.stats.malformed_calls == 1
    assert "not closed with </code>" in collector.chat.decode(tree.path_tokens(tree.leaves[0]))


@pytest.mark.parametrize("make", [lambda: StarPlanner(2), lambda: BelPlanner(2, 2, 1, 3, 5.0)])
def test_engines_are_told_whether_entropies_decide_anything(make: Any) -> None:
    collector, _ = collector_for(coin)
    collect(collector, make, tasks=1)
    assert {each.entropies for each in collector.engine.samplings} == {make().reads_entropy}


def test_trees_do_not_depend_on_who_finishes_first() -> None:
    def texts(tree: Tree, chat: Chat) -> list[str]:
        return [chat.decode(tree.path_tokens(leaf)) for leaf in tree.leaves]

    runs = []
    for in_flight in (1, 8):
        collector, _ = collector_for(coin, trees_in_flight=in_flight)
        trees = collect(collector, lambda: BelPlanner(12, 2, 1, 3, 5.0), tasks=6)
        runs.append([texts(tree, collector.chat) for tree in trees])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_demonstration_is_one_branch_with_tools_really_run() -> None:
    collector, _ = collector_for(coin)
    tree = asyncio.run(collector.demonstrate(collector.source.train(0)))
    assert tree is not None
    assert len(tree) == STEPS + 2
    agent = np.concatenate(
        [ids[mask == 1] for ids, mask in zip(tree.token_ids, tree.agent, strict=True)]
    )
    assert collector.chat.decode(agent) == GOOD * STEPS + ANSWER
    assert "<|im_start|>tool\n5<|im_end|>" in collector.chat.decode(tree.path_tokens(len(tree) - 1))


def test_a_planner_that_stalls_is_named() -> None:
    class Stalled(StarPlanner):
        done = False

    collector, tools = collector_for(coin)
    with pytest.raises(ExceptionGroup) as caught:
        collect(collector, lambda: Stalled(2), tasks=1)
    assert "Stalled is not done and asks for nothing" in str(caught.value.exceptions[0])
    assert isinstance(caught.value.exceptions[0], RunError)
    assert tools.opened == tools.released


def test_prompt_that_leaves_no_room_is_refused() -> None:
    collector, _ = collector_for(coin, max_tokens=5)
    with pytest.raises(ExceptionGroup) as caught:
        collect(collector, lambda: StarPlanner(1), tasks=1)
    assert "raise it" in str(caught.value.exceptions[0])


def broken(text: str, rng: np.random.Generator) -> str:
    """The third call asks for what breaks; every other trajectory is good."""
    said = said_so_far(text)
    if len(said) == STEPS:
        return ANSWER
    return "<code>break</code>" if len(said) == 2 and rng.random() < 0.5 else GOOD


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


FAULTS = {
    "exception": (OverflowError("int too large"), "OverflowError: int too large"),
    "lone surrogate": (ValueError("\ud83d"), "ValueError: \\ud83d"),
    "exit": (SystemExit(3), "SystemExit: 3"),
    "group": (ExceptionGroup("two", [KeyError(1)]), "ExceptionGroup: two (1 sub-exception)"),
    "no message": (Unprintable(), "Unprintable: <exception str() failed>"),
}


@pytest.mark.parametrize("where", ["parser", "tool", "grader"])
@pytest.mark.parametrize(("problem", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_ends_its_trajectory_alone(
    where: str, problem: BaseException, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, tools = collector_for(broken)
    parse, execute, grade = collector.chat.parse_call, tools.execute, collector.source.grade

    def parse_call(text: str) -> Any:
        if "break" in text and where == "parser":
            raise problem
        return parse(text)

    async def run(state: Any, call: Any) -> ToolResult:
        if call.arguments["code"] == "break" and where == "tool":
            raise problem
        return await execute(state, call)

    async def judge(task: Task, messages: Sequence[Message], end: End) -> Verdict:
        broke = any("break" in message["content"] for message in messages)
        if broke and where == "grader" and end is not End.FAULT:
            raise problem
        if end is End.FAULT:
            return Verdict(False, -0.25, "a fault")
        return await grade(task, messages, end)

    monkeypatch.setattr(collector.chat, "parse_call", parse_call)
    monkeypatch.setattr(tools, "execute", run)
    monkeypatch.setattr(collector.source, "grade", judge)
    trees = collect(collector, lambda: StarPlanner(8))
    doing = {"parser": "reading its message", "tool": "running its tool call"}
    faults = 0
    for tree in trees:
        for leaf, end, reason in zip(tree.leaves, tree.ends, tree.reasons, strict=True):
            assert tree.correct[leaf] == (end == "answer")
            if end == "fault":
                faults += 1
                assert reason.startswith(f"{doing.get(where, 'judging it')} failed: ")
                assert reason.endswith(said) and tree.reward[leaf] == -0.25
                if where != "grader":
                    assert tree.agent[leaf].all()  # no answer was made up
            else:
                assert (end, reason, tree.reward[leaf]) == ("answer", "answer", 1.0)
    assert 0 < faults == collector.stats.faults < 24
    assert collector.stats.trajectories == 24
    assert tools.opened == tools.released


@pytest.mark.parametrize("verdict", [None, True, (True, 1.0, "right")])
def test_a_grader_that_fails_on_everything_fails_every_trajectory(
    verdict: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collector, _ = collector_for(coin)

    async def grade(*_: Any) -> Any:
        return verdict

    monkeypatch.setattr(collector.source, "grade", grade)
    trees = collect(collector, lambda: BelPlanner(6, 2, 1, 3, 5.0))
    kind = type(verdict).__name__
    for tree in trees:
        assert set(tree.ends) == {"fault"} and len(tree.leaves) == 6
        said = f"judging it failed: TypeError: grade returned a {kind}, not a Verdict"
        assert set(tree.reasons) == {said}
        assert {tree.reward[leaf] for leaf in tree.leaves} == {-1.0}
    assert collector.stats.faults == 18
    assert sum("judging it failed" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("where", ["open", "release"])
def test_tools_that_do_not_open_or_release_end_trajectories_not_the_run(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collector, tools = collector_for(coin)

    async def fail(*_: Any) -> Any:
        raise OSError("no device")

    monkeypatch.setattr(tools, where, fail)
    trees = collect(collector, lambda: BelPlanner(6, 2, 1, 3, 5.0))
    assert [len(tree.leaves) for tree in trees] == [6, 6, 6]
    assert sum("ing its tools failed" in message for message in caplog.messages) == 1
    ends = {end for tree in trees for end in tree.ends}
    if where == "release":
        assert "fault" not in ends
    else:
        assert ends == {"fault"} and collector.stats.faults == 18
        said = "opening its tools failed: OSError: no device"
        assert {reason for tree in trees for reason in tree.reasons} == {said}


@pytest.mark.parametrize("where", ["tool", "grader"])
def test_faults_of_the_run_end_the_collection(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    collector, tools = collector_for(coin)

    async def fail(*_: Any) -> Any:
        raise RunError("the service is down")

    if where == "tool":
        monkeypatch.setattr(tools, "execute", fail)
    else:
        monkeypatch.setattr(collector.source, "grade", fail)
    with pytest.raises(ExceptionGroup) as caught:
        collect(collector, lambda: StarPlanner(2), tasks=1)
    assert "the service is down" in str(caught.value.exceptions[0].exceptions[0])  # type: ignore[attr-defined]


def test_demonstration_with_a_fault_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, tools = collector_for(coin)

    async def fail(*_: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(tools, "execute", fail)
    with pytest.raises(RuntimeError, match=r"task t0 failed: running its tool call failed: Key"):
        asyncio.run(collector.demonstrate(collector.source.train(0)))


def test_engine_failure_ends_collection_and_releases_states() -> None:
    def policy(text: str, rng: np.random.Generator) -> str:
        if len(said_so_far(text)) == 3:
            raise RuntimeError("the engine died")
        return GOOD

    collector, tools = collector_for(policy)
    with pytest.raises(ExceptionGroup):
        collect(collector, lambda: StarPlanner(2), tasks=2)
    assert tools.released >= 2
