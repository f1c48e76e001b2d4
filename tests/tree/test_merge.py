"""Equal siblings become one node; what that changes in the advantages, on trees made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from elpo_fast.algo import score
from elpo_fast.config import AlgoConfig
from elpo_fast.tree.merge import merge_equal_steps
from elpo_fast.tree.store import Forest, Tree


def grown(*trajectories: tuple[str, bool]) -> Tree:
    """Trajectories from the root as words, a step a letter: lower-case letters are the agent's
    tokens, and a dot after one is a token of its environment."""
    tree = Tree([1, 2])
    for word, correct in trajectories:
        node = 0
        for number, letter in enumerate(word, 1):
            ids, last = [ord(letter), 0], number == len(word)
            node = tree.add_step(node, ids, [1, 0], [-1.0, 0.0], [1.0, 0.0], tool_call=not last)
        tree.finish(node, reward=float(correct), correct=correct, end="answer")
    return tree


def test_equal_steps_are_one_node() -> None:
    tree = grown(("abx", True), ("aby", False), ("acz", False), ("abx", False))
    tree.mark_critical(8, 2, True)  # the c of the third trajectory
    tree.mark_critical(5, 1, False)  # the b of the second
    merged = merge_equal_steps(tree)
    assert merged.parent == [-1, 0, 1, 2, 2, 1, 5, 2]
    assert merged.leaves == [3, 4, 6, 7], "leaves stay apart, in their order"
    for old, new in zip(tree.leaves, merged.leaves, strict=True):
        assert np.array_equal(tree.path_tokens(old), merged.path_tokens(new))
        assert (tree.reward[old], tree.correct[old]) == (merged.reward[new], merged.correct[new])
    assert (merged.ends, merged.reasons) == (tree.ends, tree.reasons)
    assert merged.critical_node == [5, 2]
    assert merged.critical_leaf == [2, 1]
    assert merged.critical_localized == [True, False]
    again = merge_equal_steps(merged)
    assert again.parent == merged.parent and again.critical_node == merged.critical_node


@pytest.mark.parametrize("differs", ["token", "agent", "version", "response"])
def test_steps_that_differ_stay_apart(differs: str) -> None:
    tree = Tree([1])
    for other in (False, True):
        changed = {name: other and name == differs for name in ("token", "agent", "version")}
        ids = [5 + changed["token"], 7, 8 + (other and differs == "response")]
        agent = [1, not changed["agent"], 0]
        node = tree.add_step(
            0, ids, agent, np.zeros(3), np.zeros(3), tool_call=True,
            weight_version=int(changed["version"]),
        )  # fmt: skip
        leaf = tree.add_step(node, [9], [1], [0.0], [0.0], tool_call=False)
        tree.finish(leaf, reward=0.0, correct=False, end="answer")
    assert len(merge_equal_steps(tree)) == len(tree)


def test_branch_advantages_compare_distinct_decisions() -> None:
    """Three times a (one success) against one b (a success): as nodes, successes 1, 0, 0 and 1;
    merged, 1/3 and 1."""
    trees = grown(("ax", True), ("ay", False), ("az", False), ("bw", True))
    config = AlgoConfig(lambda_tree=1.0)
    apart = score(Forest.from_trees([trees]), config)
    merged = merge_equal_steps(trees)
    pooled = score(Forest.from_trees([merged]), config)
    a, b = (
        next(n for n in range(len(merged)) if merged.token_ids[n][0] == ord(letter))
        for letter in "ab"
    )
    # Two siblings, standardised: -1 and 1, whatever their distance.
    assert pooled.pos[a] == 0 and pooled.neg[a] < 0 < pooled.pos[b] and pooled.neg[b] == 0
    assert apart.pos[1] > 0, "alone, the first a looks as good as b"


def test_a_tree_without_equal_steps_is_unchanged() -> None:
    tree = grown(("ax", True), ("by", False))
    merged, same = Forest.from_trees([merge_equal_steps(tree)]), Forest.from_trees([tree])
    for name in ("parent", "token_ids", "agent", "logprob", "entropy", "reward", "leaf_node"):
        assert np.array_equal(getattr(merged, name), getattr(same, name), equal_nan=True)
