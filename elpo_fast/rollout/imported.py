"""Conversations and trajectories that others wrote down, in tokens as a rollout would have them.

A conversation's tokens are what the template makes of the messages up to a user's, then alternately
the assistant's tokens, its end of turn included, and the glue around a tool's response. Messages do
not say with which probability tokens were sampled: log-probs are 0 here, and have to be recomputed
before training against them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elpo_fast.config import ConfigError
from elpo_fast.rollout.chat import Chat
from elpo_fast.tasks.conversations import Conversation, ConversationError, read_conversation
from elpo_fast.tasks.records import Faults, Record, kind, read
from elpo_fast.tree.merge import merge_equal_steps
from elpo_fast.tree.samples import SUFFIX, read_samples
from elpo_fast.tree.store import Tree
from elpo_fast.types import End, Message, valid_text

Ids = NDArray[np.int32]
_THINK = "<think>"
_EXPECTED = (
    'expected rows such as {"messages": [{"role": "user", "content": "What is 6 times 7?"}, '
    '{"role": "assistant", "content": "42"}], "reward": 1.0}, or {"prompt": [...], "completion": '
    '[...], "reward": 1.0}'
)


class Turn(NamedTuple):
    """A message of the assistant, and what stands between it and the next one."""

    tokens: Ids
    trained: bool
    glue: Ids  # the tool's response; empty for the last one

    @property
    def parts(self) -> list[tuple[Ids, bool]]:
        """Tokens and whether they are the agent's to learn."""
        return [(self.tokens, self.trained), (self.glue, False)]


def read_trees(
    path: str, chat: Chat, *, split: str | None = None, correct_above: float = 0.5
) -> list[Tree]:
    """Trajectories of a file, a folder, `hf:org/name` or `module:function` (see
    `elpo_fast.tasks.records`) as trees: one for each prompt, in the order in which they come, in
    which equal steps are one node.

    Rows have `messages`, or `prompt` and `completion` as TRL's and verifiers' have, each a list of
    messages or text, and `reward`; optionally `correct` (else whether the reward is larger than
    `correct_above`), `end`, `reason`, and `example_id` or `task`, the tree's name. A `.pt` file has
    the samples of slime or miles, in tokens and with log-probs (see `elpo_fast.tree.samples`).
    Raises `ConfigError` with all that is wrong with rows, `TreeError` for such a file.
    """
    if path.endswith(SUFFIX):
        return read_samples(path, correct_above=correct_above)
    faults = Faults(path)
    trees: dict[bytes, Tree] = {}
    rows = 0
    for place, record in read(path, split, faults, section="task.options"):
        rows += 1
        try:
            _add(trees, record, place, chat, correct_above)
        except ConversationError as error:
            faults.add(f"{place}{error.where}", str(error))
    faults.check(rows, _EXPECTED)
    if not trees:
        raise ConfigError(f"{path} has no rows")
    return [merge_equal_steps(tree) for tree in trees.values()]


def _add(
    trees: dict[bytes, Tree], record: Record, place: str, chat: Chat, correct_above: float
) -> None:
    """A row's trajectory to the tree of its prompt."""
    reward = record.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise ConversationError(f"its reward must be a number, not {reward!r}")
    asked = in_turns(read_conversation(_joined(record), place), chat)
    if len(asked) > 1:
        raise ConversationError("asks the assistant more than once; a trajectory has one prompt")
    ((prompt, turns),) = asked
    tree = trees.get(prompt.tobytes())
    if tree is None:
        name = next((record[key] for key in ("example_id", "task") if key in record), place)
        tree = trees[prompt.tobytes()] = Tree(prompt, task_id=str(name))
    node = 0
    for turn in turns:
        ids = np.concatenate([turn.tokens, turn.glue])
        agent = np.arange(len(ids)) < len(turn.tokens)
        zeros = np.zeros(len(ids), np.float32)
        node = tree.add_step(node, ids, agent, zeros, zeros, tool_call=len(turn.glue) > 0)
    correct = record.get("correct")
    tree.finish(
        node,
        reward=float(reward),
        correct=reward > correct_above if correct is None else bool(correct),
        end=str(record.get("end") or End.ANSWER),
        reason=valid_text(str(record.get("reason") or "")),
    )


def _joined(record: Record) -> Record:
    """A row with `prompt` and `completion` as one with `messages`."""
    if record.get("completion") is None:
        return record
    messages: list[Any] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.get(column)
        if isinstance(value, str):
            value = [{"role": role, "content": value}]
        if not isinstance(value, list):
            raise ConversationError(
                f"{column} must be text or a list of messages, not {kind(value)}"
            )
        messages += value
    return {**record, "messages": messages}


def in_turns(conversation: Conversation, chat: Chat) -> list[tuple[Ids, list[Turn]]]:
    """The prompt and the turns after it for each time that the assistant is asked: what the user
    says next begins another prompt, with all that went before as the template shows it by then
    (some leave earlier thinking out).

    Raises `ConversationError` for what the model's template or the form of calls refuses.
    """
    chat = _with_tools_of(conversation, chat)
    end_of_turn = chat.decode([chat.end_of_turn])
    found: list[tuple[Ids, list[Turn]]] = []
    said: list[Message] = []
    asks = True
    messages = conversation.messages
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            said.append({"role": message["role"], "content": message["content"]})
            continue
        if asks:
            try:
                found.append((chat.prompt(said), []))
            except ConfigError as error:
                raise ConversationError(str(error)) from None
        prompt, turns = found[-1]
        text = valid_text(chat.call_text(message))
        said.append({"role": "assistant", "content": text})
        if end_of_turn in text:
            raise ConversationError(
                f"a message of the assistant has {end_of_turn} in it, the template's own mark; "
                "give messages as they were before a template"
            )
        before = turns[-1].glue if turns else prompt
        if chat.decode(before[-8:]).rstrip().endswith(_THINK):  # opened by the template
            text = text.removeprefix(_THINK).lstrip("\n")
        tokens = np.append(chat.encode(text), np.int32(chat.end_of_turn))
        following = [each["role"] for each in messages[number : number + 2]]
        asks = following != ["tool", "assistant"]
        glue = np.zeros(0, np.int32)
        if not asks:
            glue = chat.response_glue(tokens, messages[number]["content"])
        turns.append(Turn(tokens, message.get("weight") != 0, glue))
    return found


def _with_tools_of(conversation: Conversation, chat: Chat) -> Chat:
    """`chat`, describing the tools that a conversation has. Where the run has one of the same name,
    that is described; without a list of its own, those of the run if its calls are theirs."""
    calls: list[Mapping[str, Any]] = conversation.calls
    offered = {tool["function"]["name"]: tool for tool in chat.tools}
    if chat.call_format == "code":
        for call in calls:
            if call["name"] not in offered or call["arguments"].keys() != {"code"}:
                raise ConversationError(
                    f"it calls {call['name']}({', '.join(call['arguments'])}), and "
                    f"rollout.call_format=code has but {', '.join(offered)}(code); set hermes"
                )
        return chat
    tools = conversation.tools
    if tools is None:
        names = {call["name"] for call in calls}
        tools = tuple(chat.tools) if names and names <= offered.keys() else ()
    return chat.with_tools([offered.get(tool["function"]["name"], tool) for tool in tools])
