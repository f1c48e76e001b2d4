"""Samples of other trainers as trees: branches by equal tokens, what was sampled kept as it was."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elpo_fast.tree import io
from elpo_fast.tree.samples import read_samples
from elpo_fast.tree.store import TreeError

PROMPT = [1, 2, 3]
CALL, HEARD = ([10, 11], [1, 1]), ([20], [0])


def sample(*parts: tuple[list[int], list[int]], **columns: Any) -> dict[str, Any]:
    """As `Sample.to_dict` makes it; other columns that it has do not matter here."""
    response = [token for tokens, _ in parts for token in tokens]
    mask = [each for _, masks in parts for each in masks]
    return {
        "group_index": 4,
        "prompt": "text",
        "tokens": PROMPT + response,
        "response_length": len(response),
        "loss_mask": mask,
        "rollout_log_probs": [-0.5 * token for token in response],
        "reward": 1.0,
        "status": "completed",
        "metadata": {"turns": 2},
        **columns,
    }


def saved(folder: Path, samples: object) -> Path:
    torch.save({"rollout_id": 0, "samples": samples}, folder / "rollout_0.pt")
    return folder / "rollout_0.pt"


def test_leaves_of_a_branched_session_are_one_tree(tmp_path: Path) -> None:
    samples = [
        sample(CALL, HEARD, ([30, 31], [1, 1])),
        sample(CALL, HEARD, ([32], [1]), reward={"score": 0.2}, status="truncated"),
        sample(([12], [1]), HEARD, ([33], [1]), reward=0, status="failed"),
        sample(([40], [1]), status="aborted", reward=None),
        sample(([41], [1]), remove_sample=True),
        sample(([42], [1]), tokens=[9, 42], group_index=None, loss_mask=None),
    ]
    one, other = read_samples(saved(tmp_path, samples))
    assert one.parent == [-1, 0, 1, 1, 0, 4]
    assert [ids.tolist() for ids in one.token_ids[:4]] == [PROMPT, [10, 11, 20], [30, 31], [32]]
    assert one.agent[1].tolist() == [1, 1, 0]
    np.testing.assert_allclose(one.logprob[1], [-5, -5.5, 0])
    assert one.tool_call == [False, True, False, False, True, False]
    assert [one.reward[leaf] for leaf in one.leaves] == [1, 0.2, 0]
    assert [one.correct[leaf] for leaf in one.leaves] == [1, 0, 0]
    assert one.ends == ["answer", "length", "fault"]
    assert (one.task_id, other.task_id) == ("group 4", "prompt 1")
    assert other.agent[1].tolist() == [1]


def test_a_file_of_samples_is_read_like_any_of_trees(tmp_path: Path) -> None:
    path = saved(tmp_path, [sample(CALL), sample(CALL, rollout_log_probs=None)])
    forest = io.read(path)
    assert np.diff(forest.leaf_start).tolist() == [2]


@pytest.mark.parametrize(
    ("samples", "fault"),
    [
        ([sample(CALL), sample(CALL, reward=None)], r"sample 1: its reward must .* not None"),
        ([sample(CALL, reward={"acc": 1})], "its reward must be a number, or have a"),
        ([sample(CALL, reward=float("nan"))], "its reward must be a number"),
        ([sample(CALL, response_length=0)], "sample 0: response_length is 0, of 5 tokens"),
        ([sample(CALL, loss_mask=[1])], "loss_mask has 1 values, for a response of 2 tokens"),
        ([sample(CALL, status="pending")], "has no sample that was finished"),
        ([sample(CALL, metadata=Fraction(1, 2))], "holds fractions.Fraction, whose reading"),
        ("none", 'has no list of "samples"'),
    ],
)
def test_faults_are_one_sentence(samples: object, fault: str, tmp_path: Path) -> None:
    with pytest.raises(TreeError, match=fault):
        read_samples(saved(tmp_path, samples))


def test_what_is_no_such_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(TreeError, match=r"cannot read .*: No such file"):
        read_samples(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no pickle")
    with pytest.raises(TreeError, match=r"is not a file of torch\.save"):
        read_samples(tmp_path / "text.pt")
