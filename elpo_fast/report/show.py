"""`elpo tree show RUN`: one rollout tree of a run in the terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from elpo_fast.algo import score
from elpo_fast.config import check_run, run_config
from elpo_fast.report.readable import Decode
from elpo_fast.report.tree_view import render_tree
from elpo_fast.tree import io
from elpo_fast.tree.store import Forest


def show_run(run: Path, *, step: int | None = None, tree: int | None = None) -> None:
    """Draw tree `tree` of training step `step`; defaults: the latest step, the first tree whose
    critical step is localized. Raises `LookupError` where there is no such run, step or tree."""
    step, file = step_file(run, step)
    forest = io.load(file)
    tree = interesting(forest) if tree is None else tree
    if not 0 <= tree < len(forest):
        raise LookupError(f"step {step} has trees 0 to {len(forest) - 1}, not {tree}")
    scored = score(forest, run_config(run).algo)
    console = Console()
    console.print(f"{run}, step {step}, tree {tree} of {len(forest)}: {forest.task_ids[tree]}")
    console.print(render_tree(forest, tree, scored, decoder(run)))


def saved_steps(run: Path) -> dict[int, Path]:
    """The training steps whose trees a run keeps, perhaps none, and their files."""
    return {
        int(found[1]): path
        for path in (run / "trees").glob("*.npz")
        if (found := re.fullmatch(r"step_(\d+)", path.stem))
    }


def steps_of(run: Path) -> dict[int, Path]:
    """The same of a run that has some; `LookupError` for what is none or has none."""
    check_run(run)
    steps = saved_steps(run)
    if not steps:
        raise LookupError(f"{run} has no saved trees; train with train.save_trees=true")
    return steps


def step_file(run: Path, step: int | None) -> tuple[int, Path]:
    """A step, by default the latest, and the file of its trees; `LookupError` without one."""
    steps = steps_of(run)
    step = max(steps) if step is None else step
    if step not in steps:
        raise LookupError(f"{run} has no trees of step {step}; steps: {_ranges(sorted(steps))}")
    return step, steps[step]


def interesting(forest: Forest) -> int:
    """The first tree with a localized critical step and a success, else with the former, else 0."""
    localized = forest.tree[forest.critical_node[forest.critical_localized]]
    successes = np.add.reduceat(forest.correct[forest.leaf_node] == 1, forest.leaf_start[:-1])
    both = [int(tree) for tree in localized if successes[tree]]
    return min(both or localized.tolist() or [0])


def decoder(run: Path) -> Decode:
    """What turns token ids of a run into text."""
    if not (run / "tokenizer").is_dir():
        raise LookupError(f"{run} has no tokenizer: it is the run folder of another version")
    return decoder_of(tokenizer_of(str(run / "tokenizer")))


def tokenizer_of(model: str) -> Any:
    """That of a model folder or Hub id; `LookupError` without one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise LookupError(f"cannot load the tokenizer of {model}: {said}") from None


def decoder_of(tokenizer: Any) -> Decode:
    """What turns its token ids into text."""
    return lambda ids: str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _ranges(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
