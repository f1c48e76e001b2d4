"""What the task sources share: splitting by content, reading answers, calling verifiers."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Awaitable, Mapping, Sequence
from typing import Annotated, Any, Protocol

from pydantic import Field

from elpo_fast.config import Section
from elpo_fast.types import End, Message, RunError, Verdict

_log = logging.getLogger(__name__)

CORRECT_REWARD, WRONG_REWARD = 1.0, -1.0
"""Default rewards. Normalised advantages do not depend on their scale (but for epsilon)."""

Reward = Annotated[float, Field(allow_inf_nan=False)]
SplitFraction = Annotated[float, Field(gt=0, lt=1)]


class RunFunction(Protocol):
    """Calls `function` ("module:function") with a JSON payload out of process, confined.

    Returns its JSON result. Raises `RuntimeError` where the function raises, does not finish
    within `timeout_s` seconds, or its process dies; the message says which.
    """

    def __call__(
        self, function: str, payload: Mapping[str, Any], timeout_s: float
    ) -> Awaitable[Any]: ...


class RewardOptions(Section):
    """Options that every source has."""

    reward_correct: Reward = CORRECT_REWARD
    reward_wrong: Reward = WRONG_REWARD

    def verdict(self, correct: bool, reason: str) -> Verdict:
        return Verdict(correct, self.reward_correct if correct else self.reward_wrong, reason)


def digest(content: str) -> str:
    """Hexadecimal hash of a problem's content, equal in every process and on every machine."""
    return hashlib.sha256(content.encode()).hexdigest()


def asked(messages: Sequence[Message]) -> str:
    """Hash of what is asked, system messages and differences in white space left out."""
    said = [" ".join(m["content"].split()) for m in messages if m["role"] != "system"]
    return digest("\x1f".join(said))


def is_held_out(content_digest: str, fraction: float) -> bool:
    """Whether the problem with this digest belongs to the held-out split."""
    return int(content_digest[:13], 16) < fraction * 16**13


def derived_seed(*parts: int | str) -> int:
    """A 31-bit seed from its parts, equal in every process."""
    return int(digest("\x1f".join(map(str, parts)))[:8], 16) >> 1


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """`messages` with their system message set to `system`, unchanged where that is `None`."""
    if system is None:
        return tuple(messages)
    rest = [message for message in messages if message["role"] != "system"]
    return ({"role": "system", "content": system}, *rest)


def final_text(messages: Sequence[Message]) -> str:
    """Text of the last assistant message, empty where there is none."""
    for message in reversed(messages):
        if message["role"] == "assistant":
            return str(message.get("content") or "")
    return ""


def unfinished(end: End) -> str | None:
    """Why a trajectory that ended so has no answer; `None` where it was free to give one."""
    match end:
        case End.ANSWER:
            return None
        case End.TURN_LIMIT:
            return "turn limit reached before an answer"
        case End.LENGTH:
            return "cut at a token limit before an answer was complete"
        case End.FAULT:
            return "a fault ended it before an answer"


def last_tagged(text: str) -> str | None:
    """Content of the last `<answer>...</answer>`, stripped."""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    return text[start + len("<answer>") :].partition("</answer>")[0].strip() if start >= 0 else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}`, braces balanced, stripped."""
    open_braces: list[tuple[int, bool]] = []  # where the content starts, whether it is boxed
    first, last = -1, -1
    for found in re.finditer(r"\\boxed\{|\\[{}]|[{}]", text):
        if found[0] in ("{", r"\boxed{"):
            open_braces.append((found.end(), found[0] != "{"))
        elif found[0] == "}" and open_braces:
            start, boxed = open_braces.pop()
            if boxed and start > first:
                first, last = start, found.start()
    return text[first:last].strip() if first >= 0 else None


def shown(answer: str, limit: int = 60) -> str:
    """An answer on one line, short enough for a reason."""
    line = " ".join(answer.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


class FirstJudged:
    """Shows one trajectory with its verdict, for people to check what is rewarded."""

    def __init__(self) -> None:
        self._shown = False

    def show(self, messages: Sequence[Message], verdict: Verdict) -> None:
        if not self._shown:
            self._shown = True
            said = "\n".join(f"[{m['role']}] {m.get('content') or ''}" for m in messages)
            _log.warning("the first trajectory that was judged:\n%s", said)
            _log.warning("its reward is %g: %s", verdict.reward, verdict.reason)


async def run_verifier(
    run: RunFunction,
    function: str,
    payload: Mapping[str, Any],
    control: Mapping[str, Any],
    timeout_s: float,
) -> tuple[Mapping[str, Any] | None, str]:
    """The verifier's result, or `None` and a sentence where the answer made it fail.

    An answer can kill or hang its verifier, and is wrong then. A verifier that fails on the
    harmless `control` payload as well is itself broken: `RunError`, not a wrong answer.
    """
    try:
        return await run(function, payload, timeout_s), ""
    except RuntimeError as error:
        try:
            await run(function, control, timeout_s)
        except RuntimeError:
            raise RunError(f"verifier {function} does not work here: {error}") from error
        problem = str(error).strip().rpartition("\n")[2]  # after the traceback, if there is one
        return None, f"the verifier failed on this answer: {shown(problem, 100)}"
