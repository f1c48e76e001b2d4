r"""Where the answer stands in a message, and multiple choice.

A prompt asks for its answer in one of these forms; `\boxed{...}` is read in any case:

    \boxed{42}      #### 42      <answer>42</answer>      Answer: 42
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from elpo_fast.tasks.common import last_boxed, last_tagged

HASHES = r"####[ \t]*(.+)"
"""GSM8K's form of an answer."""
_LINE = r"(?im)^[\W_]*(?:final[ ])?answer[*_ ]*:[*_ ]*(\S.*)$"
_ASKS = {
    "boxed": re.compile(r"\\boxed|\bboxed?\b", re.IGNORECASE),
    "hashes": re.compile("####"),
    "tags": re.compile("<answer>"),
    "line": re.compile(r"\banswer[*_ ]*:[*_ ]*\S", re.IGNORECASE),
}
_UNWRAPPED = re.compile(
    r"\\(?:text|math)(?:bf|rm|it|sf|tt|up|normal)?\b|\\mbox|\\(?:q?quad|bf|rm)\b|[${}~]|\\[ ,;:!]"
)
_LETTER = re.compile(r"\W*([A-Z])(?:\W*|[.:)\]]+.*|\s+[-–—]\s.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Choice:
    """The right option of several: its letter and, where it is known, what it says."""

    letter: str
    text: str = ""

    def chosen(self, answer: str) -> bool:
        """Whether an answer is this option: its letter, with or without a text, or its text."""
        letter = choice_letter(answer)
        return letter == self.letter if letter else bool(self.text) and _same(answer, self.text)


def choice_letter(text: str) -> str | None:
    r"""The letter of `C`, `(C)`, `\text{C}`, `C. 42 cm`; `None` where there is none."""
    found = _LETTER.fullmatch(_UNWRAPPED.sub(" ", text).strip())
    return found[1] if found else None


def forms_asked(prompt: str) -> frozenset[str]:
    """In which forms a prompt wants its answer, of those that can be read."""
    return frozenset(name for name, pattern in _ASKS.items() if pattern.search(prompt))


def read_answer(text: str, forms: frozenset[str], pattern: str | None = None) -> str | None:
    r"""The answer in a message: what the last match of `pattern` has in its first group, else in
    the forms asked for, else in `\boxed{...}`; `None` without one."""
    found = last_match(pattern, text) if pattern else None
    if found is None and "boxed" in forms:
        found = last_boxed(text)
    if found is None and "hashes" in forms:
        found = last_match(HASHES, text)
    if found is None and "tags" in forms:
        found = last_tagged(text)
    if found is None and "line" in forms:
        found = last_match(_LINE, text)
    if found is None:
        return last_boxed(text)
    return last_boxed(found) or found.strip("*$ \t\n").removesuffix(".")


def last_match(pattern: str, text: str) -> str | None:
    """The first group of the last match, the whole match where the pattern has none."""
    found = list(re.finditer(pattern, text))
    return found[-1][1 if found[-1].re.groups else 0].strip() if found else None


def _same(one: str, other: str) -> bool:
    """Equal words, up to case, spaces and marks around them."""

    def words(text: str) -> str:
        return " ".join(_UNWRAPPED.sub(" ", text).casefold().split()).strip(" .")

    return words(one) == words(other)
