"""`verifiers`: environments of the package of that name, by id: their rows, rubric and tools.

Single-turn and tool environments: those whose answer to a message is none, or what their tools
return, so that a rollout tree may branch there. What answers in a way of its own, or keeps a state
for its tools, is refused.

Invariants
- The environment is trusted, as is everything named in a configuration. Its tools and its rubric
  run in one thread with an event loop of its own, and so one at a time unless they await.
- The rubric sees what it sees in `verifiers`: messages with `tool_calls` (of the `hermes` format),
  the row, and a state with a step for each assistant message; but no tokens and no responses.
- Whoever loads an environment keeps their handlers of signals, which `verifiers` would replace.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import signal
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from packaging.specifiers import SpecifierSet
from pydantic import Field

from elpo_fast import own
from elpo_fast.config import ConfigError, PositiveFloat, Section
from elpo_fast.tasks.common import (
    FirstJudged,
    Reward,
    SplitFraction,
    digest,
    is_held_out,
    shown,
    with_system,
)
from elpo_fast.types import End, Message, Task, TaskSource, Tool, ToolResult, Verdict

SUPPORTED = SpecifierSet(">=0.1.9,<0.2")

_log = logging.getLogger(__name__)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_Result = TypeVar("_Result")


class VerifiersOptions(Section):
    env: str  # an environment's id, e.g. gsm8k; its package has to be installed
    args: dict[str, Any] = Field(default_factory=dict)  # of its load_environment
    held_out_fraction: SplitFraction = 0.05  # of its rows, where it has none for evaluation
    correct_above: Reward = 0.5  # a reward counts as correct if it is larger
    timeout_s: PositiveFloat = 60.0  # of a tool's call, and of the rubric


class Verifiers(TaskSource):
    """The task source. Training tasks come in an order shuffled by the run's seed, the same in
    every epoch; held-out tasks in the environment's order."""

    name = "verifiers"
    Options = VerifiersOptions

    def __init__(self, options: VerifiersOptions, *, seed: int, system: str | None = None) -> None:
        """`ConfigError` for an environment that is not there, or cannot be branched or judged."""
        self.options, self.system = options, system
        self._env = _loaded(options)
        self._client = _client()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="elpo-verifiers", daemon=True).start()
        self.tools = [EnvironmentTool(self, schema) for schema in _schemas(self._env)]
        self._train, self._held_out = self._split()
        self.train_size, self.held_out_size = len(self._train), len(self._held_out)
        random.Random(seed).shuffle(self._train)
        self._first = FirstJudged()

    def train(self, index: int) -> Task:
        return self._task("train", self._train, index)

    def held_out(self, index: int) -> Task:
        return self._task("held-out", self._held_out, index)

    async def grade(self, task: Task, messages: Sequence[Message], end: End) -> Verdict:
        """Correct if the rubric's reward is above `correct_above`."""
        if end is End.FAULT:
            return Verdict(False, 0.0, "a fault ended it")
        state = await self.there(self._scored(task, messages, end))
        reward = float(state["reward"])
        marks = ", ".join(f"{name} {mark:g}" for name, mark in state["metrics"].items())
        right = reward > self.options.correct_above
        verdict = Verdict(right, reward, f"the rubric gives {reward:g}: {marks}")
        self._first.show(messages, verdict)
        return verdict

    async def there(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """What `work` gives in the environment's thread; `TimeoutError` after the time limit."""
        async with asyncio.timeout(self.options.timeout_s):
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def called(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """What a tool of the environment answers, and whether that is an error."""
        try:
            answer = await self._env.call_tool(name, dict(arguments), "call")
        except Exception as error:  # which `verifiers` shows the model, too
            return str(self._env.error_formatter(error)), True
        return _text(answer["content"]), False

    async def _scored(self, task: Task, messages: Sequence[Message], end: End) -> Any:
        """The environment's state at the end of a trajectory, with its reward."""
        prompt, said = messages[: len(task.messages)], messages[len(task.messages) :]
        row = {**task.truth, "prompt": _theirs(prompt)}
        state = await self._env.init_state(row, self._client, "policy", {})
        state = await self._env.setup_state(state) or state
        before, completion = list(state["prompt"]), _theirs(said)
        for number, message in enumerate(completion):
            if message["role"] == "assistant":
                state["trajectory"].append(
                    {
                        "prompt": [*before, *completion[:number]],
                        "completion": [message],
                        "response": None,
                        "tokens": None,
                        "reward": None,
                        "advantage": None,
                        "is_truncated": end is End.LENGTH,
                        "trajectory_id": state["trajectory_id"],
                        "extras": {},
                    }
                )
        state["completion"] = completion
        dict.update(state, is_completed=True, is_truncated=end is End.LENGTH)
        score, rubric = {}, self._env.rubric
        if own.takes(rubric.score_rollout, "score_sem"):  # before 0.1.10
            score = {"score_sem": nullcontext()}
        await rubric.score_rollout(state, **score)
        return state

    def _split(self) -> tuple[list[_Row], list[_Row]]:
        """Training and held-out rows, which are not the same."""
        rows, theirs = self._rows("dataset"), self._rows("eval_dataset")
        fraction = self.options.held_out_fraction
        held_out = theirs or [row for row in rows if is_held_out(row.content, fraction)]
        contents = {row.content for row in held_out}
        train = [row for row in rows if row.content not in contents]
        if theirs and len(train) < len(rows):
            _log.warning(
                "%d of %d training rows of %s are among its rows for evaluation and left out",
                *(len(rows) - len(train), len(rows), self.options.env),
            )
        return train, held_out

    def _rows(self, kind: str) -> list[_Row]:
        """Of one of the environment's two data sets; none where it has not got it."""
        env, name = self._env, self.options.env
        if getattr(env, f"{kind}_source", getattr(env, kind)) is None:
            return []
        return [_Row(number, row, name) for number, row in enumerate(getattr(env, f"get_{kind}")())]

    def _task(self, split: str, rows: Sequence[_Row], index: int) -> Task:
        if not rows:
            raise ConfigError(
                f"{self.options.env} leaves no {split} task; change task.options.held_out_fraction "
                "or its args"
            )
        row = rows[index % len(rows)]
        turns = self._env.max_turns
        return Task(
            id=f"{self.options.env}-{split}-{row.number}-{row.content[:8]}",
            messages=with_system(row.prompt, self.system),
            source=self.name,
            truth=row.columns,
            max_turns=turns if turns > 0 else None,
            info=row.info,
        )


class EnvironmentTool(Tool):
    """One function of a tool environment; stateless."""

    def __init__(self, source: Verifiers, schema: Mapping[str, Any]) -> None:
        self.schema = schema
        self._source, self._name = source, schema["function"]["name"]

    async def call(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult:
        started = asyncio.get_running_loop().time()
        try:
            text, error = await self._source.there(self._source.called(self._name, arguments))
        except TimeoutError:
            text, error = f"timed out after {self._source.options.timeout_s:g} s", True
        return ToolResult(text, state, error, asyncio.get_running_loop().time() - started)


class _Row:
    """One of an environment's rows."""

    def __init__(self, number: int, columns: Mapping[str, Any], env: str) -> None:
        self.number, self.columns = number, dict(columns)
        prompt, info = columns["prompt"], columns.get("info") or {}
        self.info: Mapping[str, Any] = json.loads(info) if isinstance(info, str) else info
        if isinstance(prompt, str) or {"oai_tools", "tool_defs"} & set(self.info):
            what = "a text to complete" if isinstance(prompt, str) else "tools of its own"
            raise ConfigError(
                f"task.options.env: row {number} of {env} has {what}; take an environment of chats "
                "whose tools are the same in every row"
            )
        self.prompt = [{"role": m["role"], "content": _text(m["content"])} for m in prompt]
        asked = [m["content"] for m in self.prompt if m["role"] != "system"]
        self.content = digest("\x1f".join(asked))


def _loaded(options: VerifiersOptions) -> Any:
    """The environment, if it is one that can be used."""
    try:
        found = version("verifiers")
    except PackageNotFoundError:
        found = None
    if found is None or found not in SUPPORTED:
        raise ConfigError(
            f"task.source: verifiers needs the package verifiers{SUPPORTED}, whose environments "
            f"have rows, a rubric and tools, and {found or 'none'} is installed; "
            "pip install 'elpo-fast[verifiers]'"
        )
    name = options.env
    with _as_it_was():
        import verifiers as vf

        logging.getLogger("verifiers").setLevel(logging.WARNING)
        try:
            env = vf.load_environment(name, **options.args)
        except Exception as error:  # whatever an environment does when it is loaded
            raise ConfigError(
                f"task.options.env: {name} cannot be loaded ({shown(str(error), 200)}); install "
                "its package, and see task.options.args"
            ) from error
    answers = getattr(type(env), "env_response", None)
    if answers not in (vf.SingleTurnEnv.env_response, vf.ToolEnv.env_response):
        raise ConfigError(
            f"task.options.env: {name} is a {type(env).__name__}, which answers in a way of its "
            "own and cannot be branched; take a SingleTurnEnv or a ToolEnv"
        )
    stops = [each for each in env._stop_conditions if not each.__module__.startswith("verifiers.")]
    if stops:
        raise ConfigError(
            f"task.options.env: {name} ends rollouts by {stops[0].__name__}, which nothing asks "
            "here; take an environment that ends with an answer"
        )
    rubric = env.rubric
    if any(map(rubric._is_group_func, rubric._get_reward_funcs())):
        raise ConfigError(
            f"task.options.env: {name} rewards groups of rollouts; take one that rewards each"
        )
    if not any(rubric._get_reward_weights()):
        raise ConfigError(f"task.options.env: {name} has no reward; give it a rubric")
    return env


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Leaves handlers of signals and progress bars of data sets as they were."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if not bars:
            datasets.enable_progress_bars()


def _client() -> Any:
    """What a state has for a client; nobody asks it anything."""
    try:
        from verifiers.clients import resolve_client
        from verifiers.types import ClientConfig
    except ImportError:  # before 0.1.11 any thing will do
        return None
    return resolve_client(ClientConfig(api_base_url="http://localhost"))


def _schemas(env: Any) -> list[dict[str, Any]]:
    """OpenAI function schemas of its tools."""
    named = getattr(env, "oai_tools", None)
    if named is None:
        named = [
            {
                "function": {
                    name: getattr(tool, name) for name in ("name", "description", "parameters")
                }
            }
            for tool in getattr(env, "tool_defs", None) or ()
        ]
    return [{"type": "function", "function": dict(tool["function"])} for tool in named]


def _theirs(messages: Iterable[Message]) -> list[Any]:
    """Messages as `verifiers` has them: calls beside the text, and answers with the call's id."""
    found: list[Any] = []
    number = 0
    for message in messages:
        said: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        call = _read(message["content"]) if message["role"] == "assistant" else None
        if call is not None:
            number += 1
            said["content"] = _CALL.sub("", said["content"]).strip()
            function = {"name": call["name"], "arguments": json.dumps(call.get("arguments", {}))}
            said["tool_calls"] = [{"id": f"call{number}", "type": "function", "function": function}]
        if message["role"] == "tool":
            said["tool_call_id"] = f"call{number}"
        found.append(said)
    try:
        from verifiers.utils.message_utils import normalize_messages
    except ImportError:  # before 0.1.11
        return found
    return list(normalize_messages(found))


def _read(text: str) -> dict[str, Any] | None:
    """The call in a message, if there is one that can be read."""
    call = _CALL.search(text)
    try:
        found = json.loads(call[1]) if call else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("name"), str) else None


def _text(content: Any) -> str:
    """The text of a message's content, which may be in parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or f"[{part.get('type')}]" for part in content or ())
