"""Trajectories as JSON lines: one object a line, the chat and what became of it.

    task, sample     the task's id, and which of its samples this is, from 0
    correct, reward, end, reason    the verdict
    answer           what the final message answers, as far as it can be read; else null
    turns, tool_calls, malformed_calls    assistant messages, calls in them, unreadable ones
    prompt_tokens, tokens, tool_tokens    shown first, by the model, by tools and template
    messages         the chat, as `{"role": ..., "content": ...}`

A line is written at once: who is killed leaves at most the last one torn, and `Trajectories` drops
that one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elpo_fast.faults import enough_disk
from elpo_fast.rollout.chat import Chat
from elpo_fast.tasks.answers import read_answer
from elpo_fast.tree.store import Tree
from elpo_fast.types import End, MalformedCall, Message, Task

Record = dict[str, Any]

_FORMS = frozenset(("boxed", "hashes", "tags", "line"))


class Trajectories:
    """A file of trajectories, read and then appended to; `records` are by task and sample."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab+")
        self._file.seek(0)
        data = self._file.read()
        self._file.truncate(data.rfind(b"\n") + 1)
        self.records: dict[tuple[str, int], Record] = {}
        for line in data.splitlines(keepends=True):
            if line.endswith(b"\n"):
                self._keep(json.loads(line))

    def add(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with enough_disk(self._path, "choose another folder by --out"):
            # What UTF-8 cannot carry, lone surrogates, as JSON escapes.
            self._file.write(line.encode(errors="backslashreplace"))
            self._file.flush()
        self._keep(record)

    def close(self) -> None:
        self._file.close()

    def _keep(self, record: Record) -> None:
        self.records[record["task"], record["sample"]] = record


def record_of(tree: Tree, task: Task, sample: int, chat: Chat) -> Record:
    """The one trajectory of `tree` as a record."""
    (leaf,) = tree.leaves
    messages: list[Message] = [dict(message) for message in task.messages]
    steps = tree.path(leaf)[1:]
    malformed = 0
    for node in steps:
        tokens, agent = tree.token_ids[node], tree.agent[node].astype(bool)
        text = chat.message_text(tokens[agent])
        messages.append({"role": "assistant", "content": text})
        if tree.tool_call[node]:
            malformed += isinstance(chat.parse_call(text), MalformedCall)
        if not agent.all():
            messages.append({"role": "tool", "content": chat.response_text(tokens[~agent])})
    written = sum(int(tree.agent[node].sum()) for node in steps)
    answered = tree.ends[0] == End.ANSWER
    return {
        "task": task.id,
        "sample": sample,
        "correct": tree.correct[leaf] == 1,
        "reward": tree.reward[leaf],
        "end": str(tree.ends[0]),
        "reason": tree.reasons[0],
        "answer": answer_in(messages[-1]["content"]) if answered else None,
        "turns": len(steps),
        "tool_calls": sum(tree.tool_call[node] for node in steps),
        "malformed_calls": malformed,
        "prompt_tokens": len(tree.token_ids[0]),
        "tokens": written,
        "tool_tokens": tree.path_length(leaf) - len(tree.token_ids[0]) - written,
        "messages": messages,
    }


def answer_in(text: str) -> str | None:
    """The answer that a final message marks in any form, on one line."""
    found = read_answer(text, _FORMS)
    return " ".join(found.split()) if found else None


def read_trajectories(path: Path) -> Iterator[Record]:
    """The chats of a file of JSON lines, one at a time: ours, or any with `messages`.

    Raises `LookupError` for a file that cannot be read or is something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                record = json.loads(line)
                messages = record.get("messages") if isinstance(record, dict) else None
                if not isinstance(messages, list) or not all(
                    isinstance(message, dict) and "role" in message for message in messages
                ):
                    raise LookupError(f'{path} line {number} has no "messages", a list with roles')
                yield record
    except OSError as error:
        raise LookupError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # JSON's and UTF-8's
        raise LookupError(f"{path} is not a file of JSON lines") from None
