"""A rollout tree as text for the terminal: one line a step, the critical step marked.

A line reads: step number, the mark where the step is critical, correct and all trajectories below,
node reward r (Eq. 6), advantage A (Eq. 10), for a leaf its ordinal, verdict and reason, and what
the agent wrote and the tool answered. No meaning is carried by colour alone. Lines are cropped to
the terminal's width; what matters most comes first.
"""

from __future__ import annotations

import numpy as np
from rich.text import Text
from rich.tree import Tree as RichTree

from elpo_fast.report.readable import CONTROL_TOKEN, Decode, node_text, read_message, read_response
from elpo_fast.tree import ops
from elpo_fast.tree.pack import Scored
from elpo_fast.tree.store import Forest

LOCALIZED = "◀ first irrecoverable step (localized)"
NOT_LOCALIZED = "◀ first irrecoverable step is here or later (not localized: budget spent)"


def render_tree(forest: Forest, tree_index: int, scored: Scored, decode: Decode | None) -> RichTree:
    """Tree `tree_index` of a forest, for `Console.print`.

    `decode` turns token ids into text; `None` (or a tree without tokens) leaves the texts out.
    """
    nodes, lines = forest.nodes(tree_index), _Lines(forest, tree_index, scored, decode)
    drawn = {nodes.start: RichTree(lines.root(nodes.start), guide_style="dim")}
    for node in nodes[1:]:
        drawn[node] = drawn[int(forest.parent[node])].add(lines.step(node))
    return drawn[nodes.start]


def critical_nodes(forest: Forest) -> dict[int, bool]:
    """Critical nodes, with whether some search localized them."""
    found: dict[int, bool] = {}
    for node, localized in zip(forest.critical_node, forest.critical_localized, strict=True):
        found[int(node)] = found.get(int(node), False) or bool(localized)
    return found


def critical_sign(localized: bool) -> str:
    return LOCALIZED if localized else NOT_LOCALIZED


class _Lines:
    """The text of each node's line."""

    def __init__(self, forest: Forest, tree: int, scored: Scored, decode: Decode | None) -> None:
        self.forest, self.scored, self.decode = forest, scored, decode
        parent, leaf = forest.parent, forest.leaf_node
        correct = (forest.correct[leaf] == 1).astype(np.float64)
        self.below, self.successes = (
            ops.leaf_sum(parent, leaf, each) for each in (np.ones(len(leaf)), correct)
        )
        self.first_leaf = forest.leaves(tree).start
        self.leaf_of = {int(leaf[ordinal]): ordinal for ordinal in forest.leaves(tree)}
        self.critical = critical_nodes(forest)

    def root(self, node: int) -> Text:
        """Names the figures; ends with the prompt's end, where the task is."""
        count, reward, advantage = self._figures(node)
        line = _line(
            "task", f" · {count} correct · node reward r {reward} · advantage A {advantage}"
        )
        prompt = _plain(CONTROL_TOKEN.sub(" ", self._text(node, agent=False)))
        if prompt:
            line.append(" · " + (prompt if len(prompt) <= 160 else "…" + prompt[-159:]), "dim")
        return line

    def step(self, node: int) -> Text:
        count, reward, advantage = self._figures(node)
        line = _line(f"step {int(self.forest.depth[node])}")
        if node in self.critical:
            line.append(f" {critical_sign(self.critical[node])}", "bold red")
        line.append(f" · {count} · r {reward} · A {advantage}")
        if node in self.leaf_of:
            leaf, won = self.leaf_of[node], self.forest.correct[node] == 1
            reason = _plain(self.forest.reasons[leaf]) or self.forest.ends[leaf]
            line.append(
                f" · {'✓' if won else '✗'} #{leaf - self.first_leaf} {reason}",
                "green" if won else "red",
            )
        if said := abbreviate_message(self._text(node, agent=True)):
            line.append(f" · {said}")
        if heard := abbreviate_response(self._text(node, agent=False)):
            line.append(f" → {heard}", "cyan")
        return line

    def _figures(self, node: int) -> tuple[str, str, str]:
        """Correct of all trajectories below, node reward, advantage."""
        # + 0.0: a figure that rounds to zero from below is not shown as -0.00.
        reward = round(float(self.scored.node_reward[node]), 2) + 0.0
        advantage = round(float(self.scored.advantage[node]), 2) + 0.0
        count = f"{self.successes[node]:.0f}/{self.below[node]:.0f}"
        return count, f"{reward:.2f}", f"{advantage:+.2f}"

    def _text(self, node: int, *, agent: bool) -> str:
        return node_text(self.forest, node, self.decode, agent=agent)


def _line(name: str, rest: str = "") -> Text:
    return Text(no_wrap=True, overflow="ellipsis").append(name, "bold").append(rest)


def abbreviate_message(text: str, limit: int = 60) -> str:
    """An assistant message on one line: its words, and of a tool call only name and arguments."""
    words, call = read_message(text)
    asked = ""
    if call is not None:
        asked = call.text
        if call.name and call.arguments is not None:
            asked = f"{call.name}({', '.join(map(str, call.arguments.values()))})"
    parts = (_crop(_plain(words), limit), _crop(_plain(asked), limit))
    return " ".join(part for part in parts if part)


def abbreviate_response(text: str, limit: int = 40) -> str:
    """A tool's response on one line, without the chat template's control tokens and roles."""
    return _crop(_plain(read_response(text)), limit)


def _plain(text: str) -> str:
    """One line of printable characters: model output must not steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def _crop(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
