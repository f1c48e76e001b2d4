"""The collector drives planners, engine and tools, and fills one `Tree` a task.

Many trees grow at once, and within a tree every trajectory runs on its own: while one waits for a
tool, others decode. The planner says which node to sample from and how often; it alone counts the
budget. All trajectories of one request are added to the tree in their ordinal order when the last
of them has finished, so that a tree does not depend on who finished first.

A trajectory ends by an answer (an assistant message without a tool call), at the turn limit, or at
a token limit; its verdict and `End` are stored with its leaf. Faulty tool calls are answered with
what was wrong and the trajectory goes on. Where the parser, a tool or the grader raises, it ends
with a verdict that says so; only `RunError` and what the engine raises end the collection.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol, TypeVar

import numpy as np

from elpo_fast import own
from elpo_fast.algo.planners import Planner, trajectory_of
from elpo_fast.config import ConfigError, RolloutConfig
from elpo_fast.regions import CLOCK, region
from elpo_fast.rollout.chat import Chat
from elpo_fast.tasks.common import WRONG_REWARD, shown
from elpo_fast.tools.truncate import truncate
from elpo_fast.tree.store import Tree
from elpo_fast.types import (
    Completion,
    End,
    Engine,
    MalformedCall,
    Message,
    RunError,
    Sampling,
    Task,
    TaskSource,
    ToolCall,
    ToolResult,
    Verdict,
    valid_text,
)

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_MAX_FAULT = 300  # characters of an exception


class Tools(Protocol):
    """What the collector needs of a toolbox; states are opaque and branchable."""

    async def open(self, task: Task) -> Any: ...
    async def execute(self, state: Any, call: ToolCall | MalformedCall) -> ToolResult: ...
    async def release(self, states: Iterable[Any]) -> None: ...


@dataclass(slots=True)
class CollectStats:
    """Counts over everything collected since creation; times in seconds, tokens in tokens."""

    trajectories: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    malformed_calls: int = 0
    faults: int = 0  # trajectories that one of ours failed on
    tool_seconds: float = 0.0
    tool_tokens: int = 0  # responses and the template's glue


@dataclass(slots=True)
class _Turn:
    """One step before it becomes a tree node."""

    token_ids: np.ndarray
    agent: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    tool_call: bool
    weight_version: int
    messages: list[Message]
    state: Any  # tool state after the step
    fault: str | None  # why its message could not be read or its call not be run


@dataclass(frozen=True, slots=True)
class _Situation:
    """Where a trajectory continues: what was said up to a node, its depth, the tools' state."""

    messages: tuple[Message, ...]
    turns: int
    state: Any

    def after(self, turn: _Turn) -> _Situation:
        return _Situation((*self.messages, *turn.messages), self.turns + 1, turn.state)


class Collector:
    """Collects rollout trees with one engine and one toolbox."""

    def __init__(
        self,
        engine: Engine,
        tools: Tools,
        chat: Chat,
        source: TaskSource,
        config: RolloutConfig,
        *,
        output_tokens: int,
    ) -> None:
        self.engine, self.tools, self.chat, self.source = engine, tools, chat, source
        self.config = config
        self.output_tokens = output_tokens
        self.stats = CollectStats()
        self._known_faults: set[tuple[str, type[BaseException]]] = set()

    async def collect(
        self,
        tasks: Sequence[Task],
        make_planner: Callable[[], Planner],
        *,
        seed: int,
        temperature: float | None = None,
        in_flight: int | None = None,
        on_tree: Callable[[Tree], None] | None = None,
    ) -> list[Tree]:
        """One finished tree a task, in the order of `tasks`.

        `seed` and the task's id decide all sampling seeds; `temperature` and `in_flight`, trees
        that grow at once, replace the configuration's (for evaluation). `on_tree` is called as
        each tree completes.
        """
        sampling = Sampling(
            max_tokens=self.config.max_turn_tokens,
            temperature=self.config.temperature if temperature is None else temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            min_p=self.config.min_p,
            stop=self.chat.stop,
            stop_token_ids=self.chat.stop_token_ids,
        )

        async def grow(task: Task) -> Tree:
            tree = await _Growth(self, task, sampling, seed).run(make_planner())
            if on_tree is not None:
                on_tree(tree)
            return tree

        return await self._for_each(tasks, grow, in_flight)

    async def demonstrations(self, tasks: Sequence[Task]) -> list[Tree | None]:
        """`demonstrate` for many tasks at once, in their order."""
        return await self._for_each(tasks, self.demonstrate)

    async def _for_each(
        self,
        tasks: Sequence[Task],
        work: Callable[[Task], Awaitable[_Result]],
        in_flight: int | None = None,
    ) -> list[_Result]:
        """`work` on `in_flight` tasks at a time, or `trees_in_flight`; its results in the order of
        `tasks`."""
        gate = asyncio.Semaphore(in_flight or self.config.sizes().trees_in_flight)

        async def one(task: Task) -> _Result:
            async with gate:
                return await work(task)

        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(task)) for task in tasks]
        return [done.result() for done in running]

    async def demonstrate(self, task: Task) -> Tree | None:
        """The source's demonstration as a one-branch tree, its tools really run; `None` without a
        solver. Raises `RuntimeError` where the demonstration does not earn a correct verdict."""
        solution = self.source.demonstration(task)
        if solution is None:
            return None
        tree = Tree(self.chat.prompt(task.messages), task_id=task.id, info=dict(task.info))
        states = [await self.tools.open(task)]
        said: list[Message] = []
        node = 0
        for message in solution:
            text = self.chat.call_text(message)
            call = self.chat.parse_call(text)
            tokens = self.chat.encode(text)
            if call is None:
                tokens = np.append(tokens, np.int32(self.chat.end_of_turn))
            completion = Completion(
                tokens, np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.float32), "stop"
            )
            turn = await self.turn(completion, states[-1])
            if turn.fault is not None:
                raise RuntimeError(f"the demonstration of task {task.id} failed: {turn.fault}")
            states.append(turn.state)
            said += turn.messages
            node = _append(tree, node, turn)
        await self.tools.release(states)
        verdict = await self.source.grade(task, [*task.messages, *said], End.ANSWER)
        if not verdict.correct:
            raise RuntimeError(
                f"the demonstration of task {task.id} is judged wrong ({verdict.reason}); "
                "fix the task source or leave the task out"
            )
        tree.finish(
            node, reward=verdict.reward, correct=True, end=End.ANSWER, reason=verdict.reason
        )
        return tree

    async def turn(self, completion: Completion, state: Any, *, last: bool = False) -> _Turn:
        """Turn one assistant message into a step: run its tool call, unless it is the last turn
        allowed, and append the response as environment tokens. After a fault there are none."""
        messages: list[Message] = []
        glue = np.zeros(0, np.int32)
        call: ToolCall | MalformedCall | None = None
        result: ToolResult | None = None
        fault: str | None = None
        doing = "reading its message"
        try:
            with region("chat"):
                text = self.chat.message_text(completion.token_ids)
                messages.append({"role": "assistant", "content": text})
                call = None if completion.finish == "length" else self.chat.parse_call(text)
            if call is not None and not last:
                doing = "running its tool call"
                with region("tool", getattr(call, "name", "malformed call")):
                    result = await self.tools.execute(state, call)
                state = result.state
                with region("chat"):
                    content = truncate(
                        result.content,
                        self.output_tokens,
                        lambda text: self.chat.encode(text).tolist(),
                        self.chat.decode,
                    )
                    glue = self.chat.response_glue(completion.token_ids, content)
                messages.append({"role": "tool", "content": content})
        except RunError:
            raise
        except (Exception, SystemExit) as problem:
            fault = self._fault(doing, problem)
        if result is not None:
            self.stats.tool_calls += 1
            self.stats.tool_errors += result.error
            self.stats.malformed_calls += isinstance(call, MalformedCall)
            self.stats.tool_seconds += result.seconds
        zeros = np.zeros(len(glue), np.float32)
        self.stats.tool_tokens += len(glue)
        return _Turn(
            token_ids=np.concatenate([completion.token_ids, glue]),
            agent=np.concatenate(
                [np.ones(len(completion.token_ids), bool), np.zeros(len(glue), bool)]
            ),
            logprobs=np.concatenate([completion.logprobs, zeros]),
            entropies=np.concatenate([completion.entropies, zeros]),
            tool_call=call is not None,
            weight_version=completion.weight_version,
            messages=messages,
            state=state,
            fault=fault,
        )

    async def judge(
        self, task: Task, messages: Sequence[Message], end: End, fault: str | None
    ) -> tuple[End, Verdict]:
        """How a trajectory really ended, and its verdict: after a fault, of the grader at last, the
        verdict says which and has the reward of a failure."""
        if fault is None:
            try:
                return end, await self._grade(task, messages, end)
            except RunError:
                raise
            except (Exception, SystemExit) as problem:
                fault = self._fault("judging it", problem)
        self.stats.faults += 1
        reward = WRONG_REWARD
        try:
            reward = (await self._grade(task, messages, End.FAULT)).reward
        except RunError:
            raise
        except (Exception, SystemExit) as problem:
            self._fault("judging it after a fault", problem)
        return End.FAULT, Verdict(False, reward, fault)

    async def _grade(self, task: Task, messages: Sequence[Message], end: End) -> Verdict:
        with region("grading", task.id):
            verdict = await own.awaited(self.source.grade(task, messages, end))
        if not isinstance(verdict, Verdict):
            raise TypeError(f"grade returned a {type(verdict).__name__}, not a Verdict")
        return verdict

    def _fault(self, doing: str, problem: BaseException) -> str:
        """A fault in one sentence; the first of its kind is logged with its traceback."""
        said = shown("".join(traceback.format_exception_only(problem)), _MAX_FAULT)
        kind = doing, type(problem)
        if kind not in self._known_faults:
            self._known_faults.add(kind)
            traced = valid_text("".join(traceback.format_exception(problem)))
            _log.warning("a trajectory: %s failed\n%s", doing, traced)
        return f"{doing} failed: {said}"


class _Growth:
    """One tree while it grows."""

    def __init__(self, collector: Collector, task: Task, sampling: Sampling, seed: int) -> None:
        self.collector, self.task, self.sampling = collector, task, sampling
        # crc32, not hash(): the same in every process.
        self.seeds = np.random.SeedSequence([seed, zlib.crc32(task.id.encode())])
        with region("chat"):
            prompt = collector.chat.prompt(task.messages)
        limit = collector.config.max_tokens
        if len(prompt) >= limit:
            raise ConfigError(
                f"task {task.id}: its prompt has {len(prompt)} tokens, "
                f"rollout.max_tokens={limit} leaves no room to answer; raise it"
            )
        self.tree = Tree(prompt, task_id=task.id, info=dict(task.info))
        self.max_turns = task.max_turns or collector.config.max_turns
        self.situations: dict[int, _Situation] = {}
        self.fault: str | None = None  # of its tools

    async def run(self, planner: Planner) -> Tree:
        """Grow the tree until the planner is done; where its tools do not open, every trajectory
        ends with its first message."""
        self.sampling = replace(self.sampling, entropies=planner.reads_entropy)
        state = None
        try:
            with region("tool", "open"):
                state = await self.collector.tools.open(self.task)
        except RunError:
            raise
        except (Exception, SystemExit) as problem:
            self.fault = self.collector._fault("opening its tools", problem)
        self.situations[0] = _Situation(tuple(self.task.messages), 0, state)
        pending: set[asyncio.Task[list[int]]] = set()
        try:
            while not planner.done:
                with region("planning"):
                    for request in planner.requests():
                        if request.count > 0:
                            work = self._sample(request.node, request.count)
                            pending.add(asyncio.create_task(work))
                if not pending:
                    raise RunError(
                        f"{type(planner).__name__} is not done and asks for nothing; a planner has "
                        "to be done when all that it asked for was observed"
                    )
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                with region("planning"):
                    for finished in done:
                        for leaf in finished.result():
                            planner.observe(trajectory_of(self.tree, leaf))
        finally:
            for unfinished in pending:
                unfinished.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            # Steps without a call hand their parent's state on: release each one once.
            states = {id(at.state): at.state for at in self.situations.values()}
            if self.fault is None:
                await self.release(states.values())
        for critical in planner.critical:
            self.tree.mark_critical(critical.node, critical.leaf, critical.localized)
        return self.tree

    async def release(self, states: Iterable[Any]) -> None:
        """What a tool raises here is logged: the trajectories are complete."""
        try:
            await self.collector.tools.release(states)
        except RunError:
            raise
        except (Exception, SystemExit) as problem:
            self.collector._fault("releasing its tools", problem)

    async def _sample(self, node: int, count: int) -> list[int]:
        """Sample `count` trajectories that continue after `node`; their leaves, in order."""
        prefix, began = self.tree.path_tokens(node), perf_counter()
        seeds = self.seeds.spawn(1)[0].generate_state(count + 1)
        first = await self._generate(prefix, count, int(seeds[0]))
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(self._finish(node, prefix, completion, int(seed), began))
                for completion, seed in zip(first, seeds[1:], strict=True)
            ]
        with region("planning"):
            return [self._add(node, *done.result()) for done in running]

    async def _finish(
        self, node: int, prefix: np.ndarray, completion: Completion, seed: int, began: float
    ) -> tuple[list[_Turn], End, Verdict]:
        """Run one trajectory below `node` from its first new message, asked for at `began`, to its
        end, and grade it."""
        rng = np.random.default_rng(seed)
        here = self.situations[node]
        turns: list[_Turn] = []
        fault: str | None = None
        end: End | None = None
        while end is None:
            last = here.turns + 1 >= self.max_turns or self.fault is not None
            turn = await self.collector.turn(completion, here.state, last=last)
            turns.append(turn)
            here = here.after(turn)
            prefix = np.concatenate([prefix, turn.token_ids])
            fault = self.fault or turn.fault
            if fault is not None:
                end = End.FAULT
            elif completion.finish == "length":
                end = End.LENGTH
            elif not turn.tool_call:
                end = End.ANSWER
            elif last:
                end = End.TURN_LIMIT
            elif len(prefix) >= self.collector.config.max_tokens:
                end = End.LENGTH
            else:
                (completion,) = await self._generate(prefix, 1, int(rng.integers(2**32)))
        end, verdict = await self.collector.judge(self.task, here.messages, end, fault)
        CLOCK.note("trajectory", "trajectories", began, f"{self.task.id}: {end}")
        return turns, end, verdict

    async def _generate(self, prefix: np.ndarray, n: int, seed: int) -> list[Completion]:
        room = self.collector.config.max_tokens - len(prefix)
        sampling = replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room), seed=seed)
        return await self.collector.engine.generate(prefix, n, sampling)

    def _add(self, node: int, turns: list[_Turn], end: End, verdict: Verdict) -> int:
        """Append a finished trajectory below `node`; its leaf ordinal."""
        for turn in turns:
            situation = self.situations[node].after(turn)
            node = _append(self.tree, node, turn)
            self.situations[node] = situation
        self.collector.stats.trajectories += 1
        return self.tree.finish(
            node,
            reward=verdict.reward,
            correct=verdict.correct,
            end=end.value,
            reason=verdict.reason,
        )


def _append(tree: Tree, parent: int, turn: _Turn) -> int:
    return tree.add_step(
        parent,
        turn.token_ids,
        turn.agent,
        turn.logprobs,
        turn.entropies,
        tool_call=turn.tool_call,
        weight_version=turn.weight_version,
    )
