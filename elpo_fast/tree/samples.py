"""Trees of the samples that slime and miles save with `--save-debug-rollout-data FILE.pt`.

Such a file is `torch.save({"samples": [...]})` of one mapping a trajectory: `tokens`, of which the
last `response_length` are the response, `loss_mask` (1 where the agent wrote) and
`rollout_log_probs` of the response, `reward`, `status`. What agents branched is there leaf by leaf;
equal beginnings make the tree again. Files are read without running code of theirs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elpo_fast.tree.merge import merge_equal_steps
from elpo_fast.tree.store import Tree, TreeError

SUFFIX = ".pt"
_UNFINISHED = ("aborted", "pending")
_ENDS = {"completed": "answer", "truncated": "length", "failed": "fault"}


def read_samples(path: str | Path, *, correct_above: float = 0.5) -> list[Tree]:
    """One tree for each prompt, in the order in which they come, equal steps merged; tokens and
    log-probs as they were sampled (log-probs 0 where the file has none), no entropies.

    A step is what the agent wrote up to the next token that it did not, and what follows up to its
    own next one. A reward is a number, or a mapping with a `score`; a trajectory is correct where
    it is larger than `correct_above`. Samples that were aborted or removed are left out. Raises
    `TreeError`.
    """
    trees: dict[bytes, Tree] = {}
    for number, sample in enumerate(_samples(path)):
        if sample.get("status") in _UNFINISHED or sample.get("remove_sample"):
            continue
        try:
            _add(trees, sample, correct_above)
        except (TreeError, TypeError, ValueError) as error:
            raise TreeError(f"{path}: sample {number}: {error}") from None
    if not trees:
        raise TreeError(f"{path} has no sample that was finished and kept")
    return [merge_equal_steps(tree) for tree in trees.values()]


def _samples(path: str | Path) -> list[Mapping[str, Any]]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TreeError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # damage surfaces as nearly anything inside zipfile and pickle
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise TreeError(
            f"{path} is not a file of torch.save, or it is damaged"
            if foreign is None
            else f"{path} holds {foreign[1]}, whose reading could run code; save its samples again "
            "without it"
        ) from None
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list) or not all(isinstance(each, dict) for each in samples):
        raise TreeError(
            f'{path} has no list of "samples"; slime and miles write one with '
            "--save-debug-rollout-data"
        )
    return samples


def _add(trees: dict[bytes, Tree], sample: Mapping[str, Any], correct_above: float) -> None:
    """A sample's trajectory to the tree of its prompt."""
    tokens = np.asarray(sample.get("tokens", ()), np.int32)
    length = sample.get("response_length", 0)
    if not 0 < length < len(tokens):
        raise TreeError(f"response_length is {length}, of {len(tokens)} tokens")
    prompt, response = tokens[:-length], tokens[-length:]
    agent = _of_response(sample, "loss_mask", 1, length).astype(np.bool_)
    logprob = np.where(agent, _of_response(sample, "rollout_log_probs", 0, length), 0)
    reward = sample.get("reward")
    if isinstance(reward, Mapping):
        reward = reward.get("score")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise TreeError(f'its reward must be a number, or have a "score", not {reward!r}')
    tree = trees.get(prompt.tobytes())
    if tree is None:
        group = sample.get("group_index")
        name = f"prompt {len(trees)}" if group is None else f"group {group}"
        tree = trees[prompt.tobytes()] = Tree(prompt, task_id=name)
    # Steps begin where the agent goes on after something that is not its own.
    starts = [0, *(np.flatnonzero(agent[1:] & ~agent[:-1]) + 1)]
    node = 0
    for first, last in zip(starts, [*starts[1:], length], strict=True):
        part = slice(first, last)
        node = tree.add_step(
            node,
            response[part],
            agent[part],
            logprob[part],
            np.zeros(last - first, np.float32),
            tool_call=not agent[last - 1],
        )
    end = _ENDS.get(str(sample.get("status")), "answer")
    tree.finish(node, reward=float(reward), correct=reward > correct_above, end=end)


def _of_response(
    sample: Mapping[str, Any], name: str, default: float, length: int
) -> NDArray[np.float32]:
    """A column of the response's tokens, `[length]`."""
    values: Sequence[float] | None = sample.get(name)
    if values is None:
        return np.full(length, default, np.float32)
    if len(values) != length:
        raise TreeError(f"{name} has {len(values)} values, for a response of {length} tokens")
    return np.asarray(values, np.float32)
