"""Supervised fine-tuning, on conversations (`sft.data`) and on demonstrations of the task source.

Both are rollout trees, so they go through the same packed forward as reinforcement learning; the
loss is the mean negative log-likelihood over the agent tokens of the batch. The tools of a
demonstration really ran; a conversation has their results.

A conversation's tokens are those that its messages would have in a rollout
(`elpo_fast.rollout.imported`). What the user says after an answer begins another branch of the
tree; equal prefixes are computed once.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np

from elpo_fast.config import Config, ConfigError, SftConfig
from elpo_fast.rollout.chat import Chat
from elpo_fast.rollout.collector import Collector
from elpo_fast.rollout.imported import in_turns
from elpo_fast.tasks.conversations import (
    Conversation,
    ConversationError,
    check,
    read_conversations,
)
from elpo_fast.tasks.records import Faults
from elpo_fast.train.metrics import StepStats
from elpo_fast.train.step import PolicyOptimizer, warmup_cosine
from elpo_fast.tree.pack import Scored, micro_batches
from elpo_fast.tree.store import Forest, Tree
from elpo_fast.types import End

WINDOW = 8  # updates over which the loss is averaged for `sft.target_loss`
HELD_OUT = 0.05  # share of the prompts


class Data(NamedTuple):
    """What `sft.data` and the held-out keys name."""

    train: list[Conversation]
    held_out: list[Conversation]


class Examples(NamedTuple):
    """`Data` in tokens, and in words how much that is."""

    train: list[Tree]
    held_out: list[Tree]
    said: str

    @property
    def digest(self) -> str:
        """Equal for equal tokens in equal order."""
        found = hashlib.sha256()
        for tree in (*self.train, *self.held_out):
            for ids, agent in zip(tree.token_ids, tree.agent, strict=True):
                found.update(ids.tobytes() + agent.tobytes())
        return found.hexdigest()


def read_data(sft: SftConfig) -> Data:
    """Raises `ConfigError` for files that cannot be read, with all that is wrong with them."""
    if sft.data is None:
        return Data([], [])
    rows = read_conversations(sft.data, sft.split)
    if sft.held_out_path is not None or sft.held_out_split is not None:
        return Data(rows, read_conversations(sft.held_out_path or sft.data, sft.held_out_split))
    fraction = HELD_OUT if sft.held_out_fraction is None else sft.held_out_fraction
    prompts = sorted({row.prompt for row in rows})
    held_out = {*prompts[: max(1, round(fraction * len(prompts))) if fraction else 0]}
    data = Data(
        [row for row in rows if row.prompt not in held_out],
        [row for row in rows if row.prompt in held_out],
    )
    if not data.train:
        raise ConfigError(
            f"{sft.data} has one prompt, which is held out; give it more, or set "
            "sft.held_out_fraction=0"
        )
    return data


def in_tokens(data: Data, chat: Chat, config: Config, context: int | None) -> Examples:
    """`data` as trees. `context`: tokens that the model has positions for.

    Raises `ConfigError` for conversations that cannot be rendered, and for those that are too long
    unless they are to be left out.
    """
    sft = config.sft
    key, limit = "rollout.max_tokens", config.rollout.max_tokens
    if sft.max_tokens is not None:
        key, limit = "sft.max_tokens", sft.max_tokens
    what, remedy = f"{key}={limit}", f"raise {key} or "
    if context is not None and context < limit:
        limit, what, remedy = context, f"the {context} of the model's context", ""
    faults = Faults(sft.data or "")
    long: list[Tree] = []

    def fitting(conversations: Sequence[Conversation]) -> list[Tree]:
        trees: list[Tree] = []
        for conversation in conversations:
            try:
                tree = tree_of(conversation, chat)
            except ConversationError as error:
                faults.add(conversation.place.removeprefix(f"{sft.data} "), str(error))
                continue
            (long if _length(tree) > limit else trees).append(tree)
        return trees

    train, held_out = fitting(data.train), fitting(data.held_out)
    total = len(data.train) + len(data.held_out)
    check(faults, total - len(faults))
    tokens = sum(len(ids) for tree in train for ids in tree.token_ids)
    trained = sum(int(agent.sum()) for tree in train for agent in tree.agent)
    said = f"{len(train)} conversations, {trained} of {tokens} tokens trained on"
    if held_out:
        said += f"; {len(held_out)} held out"
    called = {call["name"] for each in (*data.train, *data.held_out) for call in each.calls}
    if unknown := sorted(called - {tool["function"]["name"] for tool in chat.tools}):
        said += f"; they call {', '.join(unknown)}, not among this run's tools (tools.names)"
    if long:
        problem = (
            f"{len(long)} of {total} conversations have more tokens than {what} (first "
            f"{long[0].task_id} with {_length(long[0])}, at most {max(map(_length, long))})"
        )
        if not train:
            raise ConfigError(f"{problem}; {remedy}give shorter ones")
        if sft.overlong == "refuse":
            raise ConfigError(f"{problem}; {remedy}set sft.overlong=drop")
        said += f"; {problem} and are left out"
    return Examples(train, held_out, said)


def _length(tree: Tree) -> int:
    return max(map(tree.path_length, tree.leaves))


def tree_of(conversation: Conversation, chat: Chat) -> Tree:
    """A conversation in tokens: one branch for each time that the assistant is asked.

    Raises `ConversationError` for what the model's template or the form of calls refuses.
    """
    tree = Tree(np.zeros(0, np.int32), task_id=conversation.place)
    for prompt, turns in in_turns(conversation, chat):
        parts = [(prompt, False), *(part for turn in turns for part in turn.parts)]
        ids = np.concatenate([ids for ids, _ in parts])
        agent = np.concatenate([np.full(len(ids), trained) for ids, trained in parts])
        unknown = np.zeros(len(ids), np.float32)
        node = tree.add_step(0, ids, agent, unknown, unknown, tool_call=False)
        tree.finish(node, reward=1.0, correct=True, end=End.ANSWER)
    return tree


async def cold_start(
    config: Config,
    collector: Collector,
    optimizer: PolicyOptimizer,
    on_step: Callable[[StepStats, bool], None] = lambda *_: None,
    *,
    guard: Callable[[Forest], AbstractContextManager[None]] = lambda _: nullcontext(),
    seed: int,
    conversations: Sequence[Tree] = (),
    losses: Sequence[float] = (),
) -> None:
    """Train on `conversations` and the first `sft.demonstrations` training tasks for `sft.epochs`,
    in random order.

    The optimizer starts afresh with the cold start's learning rate and a warm-up and cosine of it;
    or goes on after the updates that had `losses`, with the moments that it has. `guard` is entered
    around each update of a forest, and `on_step` told whether an epoch ended with it. Stops when
    the mean loss of the last `WINDOW` updates is at or below `sft.target_loss`. Raises
    `ConfigError` where the task source has no solver.
    """
    source, sft = collector.source, config.sft
    demonstrated = await collector.demonstrations(
        [source.train(index) for index in range(sft.demonstrations)]
    )
    trees = [*conversations, *(tree for tree in demonstrated if tree is not None)]
    if len(trees) < len(conversations) + len(demonstrated):
        raise ConfigError(
            f"task source {source.name} has no solver to demonstrate with; "
            "set sft.demonstrations=0 and start from a model that knows the tool format"
        )
    schedule = warmup_cosine(sft.warmup, sft.steps(len(trees)))
    if losses:
        optimizer.lr, optimizer.schedule = sft.lr, schedule
    else:
        optimizer.restart(lr=sft.lr, schedule=schedule)
    rng = np.random.default_rng(seed)
    recent = deque(losses, maxlen=WINDOW)
    step = 0
    for _ in range(sft.epochs):
        order = rng.permutation(len(trees))
        for first in range(0, len(trees), sft.batch):
            step += 1
            if step <= len(losses):
                continue
            if len(recent) == WINDOW and sum(recent) / WINDOW <= sft.target_loss:
                return
            forest = Forest.from_trees([trees[i] for i in order[first : first + sft.batch]])
            batches = micro_batches(
                forest,
                imitation(forest),
                range(len(forest)),
                budget_tokens=config.train.micro_batch_tokens,
            )
            with guard(forest):
                stats = optimizer.nll_update(batches)
            recent.append(stats.loss)
            on_step(stats, first + sft.batch >= len(trees))


def held_out_loss(trees: Sequence[Tree], optimizer: PolicyOptimizer, budget_tokens: int) -> float:
    """Mean negative log-likelihood over the agent tokens of `trees`, in nats."""
    forest = Forest.from_trees(trees)
    batches = micro_batches(
        forest, imitation(forest), range(len(forest)), budget_tokens=budget_tokens
    )
    logprobs = optimizer.logprobs(batches, temperature=1.0)
    total = sum(float(each.sum(dtype=np.float64)) for each in logprobs)
    return -total / max(int(forest.agent.sum()), 1)


def imitation(forest: Forest) -> Scored:
    """Weights of the mean over all agent tokens, in the form that trees are packed with."""
    zero = np.zeros(len(forest.parent))
    pos = zero + 1.0 / max(int(forest.agent.sum()), 1)
    return Scored(zero, zero, zero, zero, pos=pos, neg=zero, eps_low=zero, eps_high=0.0)
