"""Equal steps as one node: states that rollouts reached by the same tokens are the same state.

Values then are pooled over all rollouts through a state, and siblings are distinct decisions, as in
RTMC (arXiv 2604.11037). This changes advantages; packing shares equal prefixes in any case.
"""

from __future__ import annotations

from elpo_fast.tree.store import Tree


def merge_equal_steps(tree: Tree) -> Tree:
    """The same trajectories, in a tree whose inner siblings differ in a token.

    Two steps are equal if their parents are, and their tokens, the agent's and the environment's,
    and the weights that sampled them. Leaves stay apart: each is a trajectory with a verdict. Of
    equal steps the first one's log-probs are kept. Searches point to the merged nodes.
    """
    merged = Tree(tree.token_ids[0], task_id=tree.task_id, info=tree.info)
    place = [0]  # of each node in the merged tree
    known: dict[tuple[int, int, bytes, bytes], int] = {}
    for node in range(1, len(tree)):
        parent, version = place[tree.parent[node]], tree.weight_version[node]
        key = (parent, version, tree.token_ids[node].tobytes(), tree.agent[node].tobytes())
        at = known.get(key) if tree.correct[node] < 0 else None
        if at is None:
            arrays = (tree.token_ids, tree.agent, tree.logprob, tree.entropy)
            step = (array[node] for array in arrays)
            called = tree.tool_call[node]
            at = merged.add_step(parent, *step, tool_call=called, weight_version=version)
            if tree.correct[node] < 0:
                known[key] = at
        place.append(at)
    for leaf, end, reason in zip(tree.leaves, tree.ends, tree.reasons, strict=True):
        reward, correct = tree.reward[leaf], bool(tree.correct[leaf])
        merged.finish(place[leaf], reward=reward, correct=correct, end=end, reason=reason)
    for node, ordinal, localized in zip(
        tree.critical_node, tree.critical_leaf, tree.critical_localized, strict=True
    ):
        merged.mark_critical(place[node], ordinal, localized)
    return merged
