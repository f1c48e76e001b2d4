"""`elpo tree html`: the rollout trees of a run, or of a file, as one page for a browser.

The list of trees is in the page as it is; each tree's figures and texts, and apart from these its
tokens, are compressed and read when they are looked at, so that thousands open at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elpo_fast import __version__
from elpo_fast.algo import score
from elpo_fast.config import AlgoConfig, is_run, run_config
from elpo_fast.report import page
from elpo_fast.report.readable import Decode, node_text, read_message, read_prompt, read_response
from elpo_fast.report.search import rounds
from elpo_fast.report.show import decoder, decoder_of, steps_of, tokenizer_of
from elpo_fast.rollout.chat import Chat
from elpo_fast.rollout.imported import read_trees
from elpo_fast.tree import io, ops
from elpo_fast.tree.pack import Scored
from elpo_fast.tree.store import Forest

if TYPE_CHECKING:
    from elpo_fast.report.ratios import Ratios

_MESSAGES = (".jsonl", ".jsonl.gz", ".parquet")  # what files of trajectories as chats end in
_WINDOW = 16  # tokens before one that decide how it is written


class _Source(NamedTuple):
    """Forests with the training step they come from (`None`: a file's), and how to read them."""

    name: str
    algo: AlgoConfig
    decode: Decode | None
    forests: Iterator[tuple[int | None, Forest]]


def write_tree_page(
    source: Path,
    out: Path | None = None,
    *,
    steps: tuple[int, int] | None = None,
    tokenizer: str | None = None,
    with_ratios: bool = False,
) -> tuple[Path, int]:
    """Write the page of a run's trees, those of the first to the last of `steps`, or of a file of
    trees or of trajectories, whose `tokenizer` is that of a model folder or Hub id; by default
    `trees.html` in the run, or a page beside the file. Where it is, and how many trees it has.
    `with_ratios` computes every token's importance ratio with the run's latest checkpoint. Raises
    `LookupError`, `TreeError` or `ConfigError` where there are no trees or no checkpoint."""
    if out is None:
        out = source / "trees.html" if source.is_dir() else source.with_suffix(".html")
    trees = _open(source, steps, tokenizer)
    pieces = trees.decode and Pieces(trees.decode)
    ratios = _ratios(source) if with_ratios else None
    index: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    details, tokens = [], []
    for step, forest in trees.forests:
        scored = score(forest, trees.algo)
        moved = None if ratios is None else ratios(forest, scored)
        for tree in range(len(forest)):
            drawn = _Drawn(forest, tree, scored, trees.decode, pieces, moved)
            row = (step, tree, *drawn.row())
            for name, value in zip(_COLUMNS, row, strict=True):
                index[name].append(value)
            figures, texts = page.as_json(drawn.figures()), page.as_json(drawn.texts())
            # Search looks into the second line alone.
            details.append(page.packed(f"{figures}\n{texts}"))
            tokens.append(page.packed(page.as_json(drawn.tokens())))
    meta = {"name": trees.name, "version": __version__, **_said_of(trees.algo)}
    body = [
        page.asset("trees.html"),
        page.data("index", page.as_json({**meta, "trees": index})),
        page.data("details", "\n".join(details)),
        page.data("tokens", "\n".join(tokens)),
        f"<script>\n{page.asset('trees.js')}</script>",
    ]
    page.write(
        out, page.page(f"{trees.name} · rollout trees", page.asset("trees.css"), "\n".join(body))
    )
    return out, len(details)


def _ratios(run: Path) -> Ratios:
    if not is_run(run):
        raise LookupError(f"{run} is no run folder: ratios need a checkpoint")
    from elpo_fast.report.ratios import ratios_of

    return ratios_of(run)


def _open(source: Path, steps: tuple[int, int] | None, tokenizer: str | None) -> _Source:
    if not source.is_dir():
        run = source.resolve().parent.parent  # of a file in a run's `trees`
        known = source.suffix == ".npz" and is_run(run)
        algo = run_config(run).algo if known else AlgoConfig()
        named = tokenizer and tokenizer_of(tokenizer)
        if source.name.endswith(_MESSAGES):
            if not named:
                raise LookupError(
                    f"{source} has messages; --tokenizer MODEL says whose tokens they become"
                )
            forest = Forest.from_trees(read_trees(str(source), Chat(named, "hermes", ())))
        else:
            forest = io.read(source)
        decode = decoder_of(named) if named else decoder(run) if known else None
        return _Source(source.name, algo, decode, iter([(None, forest)]))
    files = steps_of(source)
    chosen = [step for step in files if steps is None or steps[0] <= step <= steps[1]]
    if not chosen:
        raise LookupError(
            f"{source} has no trees of the steps {steps and '-'.join(map(str, steps))}; "
            f"it has {min(files)} to {max(files)}"
        )
    forests = ((step, io.load(files[step])) for step in sorted(chosen))
    return _Source(source.resolve().name, run_config(source).algo, decoder(source), forests)


def _said_of(algo: AlgoConfig) -> dict[str, Any]:
    """What the page tells of an algorithm."""
    hierarchical = {"lambda_tree": algo.lambda_tree} if algo.advantage == "hierarchical" else {}
    return {
        "planner": algo.planner,
        "advantage": algo.advantage,
        "weights": algo.weights,
        **hierarchical,
        "eps_low": algo.clip.eps_low,
    }


_COLUMNS = ("step", "tree", "task", "outcomes", "localized", "open", "malformed")
"""What the list shows and filters by: trajectories in sampling order as 1 and 0, searches that
found their step and that did not, malformed calls."""


class _Drawn:
    """One tree as plain values; nodes are counted from its root, leaves are ordinals."""

    def __init__(
        self,
        forest: Forest,
        tree: int,
        scored: Scored,
        decode: Decode | None,
        pieces: Pieces | None,
        ratio: NDArray[np.float64] | None,
    ) -> None:
        self.forest, self.tree, self.scored = forest, tree, scored
        self.decode, self.pieces, self.ratio = decode, pieces, ratio
        self.nodes = forest.nodes(tree)
        self.span = slice(self.nodes.start, self.nodes.stop)
        self.leaves = forest.leaf_node[slice(*forest.leaf_start[tree : tree + 2])]
        self.critical = forest.tree[forest.critical_node] == tree
        self.said = [read_message(self._text(node, agent=True)) for node in self.nodes]

    def row(self) -> tuple[Any, ...]:
        localized = self.forest.critical_localized[self.critical]
        return (
            self.forest.task_ids[self.tree],
            "".join("1" if self.forest.correct[leaf] == 1 else "0" for leaf in self.leaves),
            int(localized.sum()),
            int((~localized).sum()),
            sum(self._malformed(node) for node in range(len(self.nodes))),
        )

    def figures(self) -> dict[str, Any]:
        forest, start, scored = self.forest, self.nodes.start, self.scored
        parent = forest.parent[self.span] - start
        parent[0] = -1
        first = int(forest.leaf_start[self.tree])
        leaves = slice(first, first + len(self.leaves))
        searches = zip(
            forest.critical_node[self.critical],
            forest.critical_leaf[self.critical],
            forest.critical_localized[self.critical],
            strict=True,
        )
        written = ops.segment_sum(forest.token_start, forest.agent)[self.span]
        columns = ("node_reward", "branch", "trajectory", "advantage", "pos", "neg", "eps_low")
        return {
            "parent": parent.tolist(),
            **{name: _short(getattr(scored, name)[self.span]) for name in columns},
            "eps_high": scored.eps_high,
            "version": forest.weight_version[self.span].tolist(),
            "written": written.tolist(),
            "heard": (forest.token_count[self.span] - written).tolist(),
            "malformed": [n for n in range(len(self.nodes)) if self._malformed(n)],
            "leaf": (self.leaves - start).tolist(),
            "reward": _short(forest.reward[self.leaves]),
            "correct": (forest.correct[self.leaves] == 1).astype(int).tolist(),
            "end": forest.ends[leaves],
            "critical": [
                {"node": int(node) - start, "leaf": int(leaf) - first, "localized": bool(localized)}
                for node, leaf, localized in searches
            ],
            "rounds": [
                {
                    "node": each.node - start,
                    "first": each.first,
                    "count": each.count,
                    "correct": each.correct,
                    "search": each.search,
                    "suspects": [node - start for node in each.suspects],
                }
                for each in rounds(forest, self.tree)
            ],
        }

    def texts(self) -> dict[str, Any]:
        forest = self.forest
        first = int(forest.leaf_start[self.tree])
        info = {key: v for key, v in forest.infos[self.tree].items() if key != "node_names"}
        return {
            "prompt": read_prompt(self._text(self.nodes.start, agent=False)),
            "names": forest.infos[self.tree].get("node_names"),
            "info": json.dumps(info, ensure_ascii=False) if info else "",
            "words": [said.words.strip() for said in self.said],
            "call": [None if said.call is None else str(said.call) for said in self.said],
            "tool": [said.call.name if said.call else "" for said in self.said],
            "response": [
                "" if node == self.nodes.start else read_response(self._text(node, agent=False))
                for node in self.nodes
            ],
            "reason": forest.reasons[first : first + len(self.leaves)],
        }

    def tokens(self) -> list[Any]:
        """Of each node the agent's tokens as texts, their log-probs and entropies in nats and their
        ratios; nothing where nobody can read them, and no column whose every value is 0: it was not
        recorded."""
        whole = slice(*self.forest.token_start[[self.span.start, self.span.stop]])
        columns = [
            None if values is None or not values[whole].any() else _short(values[whole])
            for values in (self.forest.logprob, self.forest.entropy, self.ratio)
        ]
        rows: list[Any] = []
        for node in self.nodes:
            span = slice(*self.forest.token_start[node : node + 2])
            agent = self.forest.agent[span] == 1
            if self.pieces is None or not agent.any():
                rows.append(None)
                continue
            said = self.pieces(self.forest.token_ids[span][agent])
            places = (np.flatnonzero(agent) + span.start - whole.start).tolist()
            figures = (
                None if values is None else [values[place] for place in places]
                for values in columns
            )
            rows.append([said, *figures])
        return rows

    def _malformed(self, node: int) -> bool:
        call = self.said[node].call
        return bool(self.forest.tool_call[self.nodes[node]]) and call is not None and call.malformed

    def _text(self, node: int, *, agent: bool) -> str:
        return node_text(self.forest, node, self.decode, agent=agent)


class Pieces:
    """Splits a text into what each of its tokens adds; "" for one that only begins a character."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._single = lru_cache(maxsize=None)(lambda token: decode(np.array([token], np.int32)))

    def __call__(self, token_ids: NDArray[np.int32]) -> list[str]:
        alone = [self._single(int(token)) for token in token_ids]
        whole = "".join(alone)
        if "�" not in whole and whole == self._decode(token_ids):
            return alone
        found = []
        for at in range(len(token_ids)):
            start = max(0, at - _WINDOW)
            before = self._decode(token_ids[start:at]).rstrip("�")
            found.append(self._decode(token_ids[start : at + 1]).rstrip("�")[len(before) :])
        return found


def _short(values: NDArray[Any]) -> list[float | None]:
    """Four digits of each, which is what a page shows; `None` for what is not finite."""
    finite = np.isfinite(values)
    numbers = np.where(finite, values, 0).astype(np.float64)
    size = np.abs(np.where(numbers == 0, 1, numbers))
    scale = 10.0 ** (3 - np.floor(np.log10(size)))
    rounded = (np.round(numbers * scale) / scale + 0.0).tolist()
    return [value if fine else None for value, fine in zip(rounded, finite.tolist(), strict=True)]
