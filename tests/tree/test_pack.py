"""Packed batches against the twin, the attention interval, and the plain per-trajectory sum."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elpo_fast.tree.pack import (
    PackedBatch,
    Scored,
    active,
    balance,
    concatenate,
    cut,
    pack,
    section,
)
from elpo_fast.tree.store import Forest, Tree

from . import twin

seeds = st.integers(0, 2**32 - 1)
EPS_HIGH = 0.315
COLUMNS = [field.name for field in dataclasses.fields(PackedBatch) if field.name != "entropy_coef"]


def scored(forest: Forest, **choices: object) -> tuple[Scored, dict[str, list[float]]]:
    """The twin's scores, as both sides take them."""
    slow = twin.scores(forest, **choices)  # type: ignore[arg-type]
    return Scored(**{k: np.array(v) for k, v in slow.items()}, eps_high=EPS_HIGH), slow


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(["hierarchical", "group"]), st.data())
def test_equals_the_twin(seed, advantage, data):
    forest = twin.random_forest(seed)
    fast, slow = scored(forest, advantage=advantage)
    trees = data.draw(st.lists(st.integers(0, len(forest) - 1), max_size=4))
    batch = pack(forest, trees, fast, scale=0.25)
    expected = twin.pack(forest, trees, slow, eps_high=EPS_HIGH, scale=0.25)
    assert batch.trees.tolist() == trees
    for name in COLUMNS:
        if name != "trees":
            values = getattr(batch, name)
            want = np.array(expected[name], values.dtype)
            np.testing.assert_array_equal(values, want, err_msg=name)


def test_array_types():
    forest = twin.random_forest(0)
    batch = pack(forest, [0, 1], scored(forest)[0])
    floats = {"pos_coef", "neg_coef", "old_logprob", "eps_low", "eps_high"}
    for name in COLUMNS:
        array = getattr(batch, name)
        wide = name in ("trees", "tree_start")
        small = np.float32 if name in floats else np.int32
        expected = np.uint8 if name == "agent" else np.int64 if wide else small
        assert array.dtype == expected, name
        assert array.flags.writeable and array.flags.c_contiguous
    assert batch.entropy_coef is None, "for the trainer to add"
    assert len(batch) == batch.tree_start[-1]


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_interval_mask_is_the_ancestor_relation(seed):
    """A token sees itself and exactly the tokens before it on its path, across several trees."""
    forest = twin.random_forest(seed)
    batch = pack(forest, range(len(forest)), scored(forest)[0])
    nodes = batch.node.tolist()
    where = {(node, index - nodes.index(node)): index for index, node in enumerate(nodes)}
    mask = np.zeros((len(batch), len(batch)), bool)
    for (node, offset), query in where.items():
        line = [
            where[up, i]
            for up in twin.path(forest, node)
            for i in range(len(twin.node_tokens(forest, up)) if up != node else offset + 1)
        ]
        mask[query, line] = True
        assert batch.position[query] == len(line) - 1
        assert batch.pred[query] == (line[-2] if len(line) > 1 else -1)
    q, k = np.indices(mask.shape)
    np.testing.assert_array_equal((k <= q) & (q < batch.end[k]), mask)


@settings(max_examples=40, deadline=None)
@given(seeds, st.booleans(), st.sampled_from(["localized", "tree"]))
def test_collapsed_sum_equals_one_row_per_trajectory(seed, group, scope):
    """`sum_i w_i min(r A_i, clip(r) A_i) = pos min(r, clip r) + neg max(r, clip r)`: the packed
    objective over unique tokens is Eq. 1 over rows, for ratios far from 1 too."""
    forest = twin.random_forest(seed)
    fast, slow = scored(forest, advantage="group" if group else "hierarchical", scope=scope)
    batch = pack(forest, [1], fast)
    rng = np.random.default_rng(seed)
    ratio = np.exp(rng.normal(0, 1, len(forest.token_ids)))  # by token of the forest

    order = source_tokens(forest, batch)
    here = ratio[order]
    clipped = np.clip(here, 1 - batch.eps_low, 1 + batch.eps_high)
    packed = batch.pos_coef * np.minimum(here, clipped) + batch.neg_coef * np.maximum(here, clipped)

    plain = np.zeros(len(forest.token_ids))
    leaves = twin.leaves_of(forest, 1)
    of_leaf = twin.normalise([float(forest.reward[leaf]) for leaf in leaves], 1e-6)
    for row, own in zip(twin.unroll(forest, 1, slow), of_leaf, strict=True):
        for token, agent, low, a in zip(
            row["tokens"], row["agent"], row["eps_low"], row["advantage"], strict=True
        ):
            a = own if group else a
            r = ratio[token]
            surrogate = min(r * a, min(max(r, 1 - low), 1 + EPS_HIGH) * a)
            plain[token] += row["weight"] * agent * surrogate
    assert packed.sum() == pytest.approx(plain.sum(), rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(packed, plain[order], rtol=1e-5, atol=1e-7)


def source_tokens(forest: Forest, batch: PackedBatch) -> list[int]:
    """Token of the forest at each packed index: a node's tokens keep their order."""
    unused = {node: twin.node_tokens(forest, node) for node in set(batch.node.tolist())}
    return [unused[node].pop(0) for node in batch.node.tolist()]


def test_weights_of_a_tree_sum_to_one():
    """Every trajectory with an agent token carries 1 / G, however its tokens are shared."""
    tree = Tree([1, 2])
    a = tree.add_step(0, [3, 4], [1, 0], [-1, 0], [1, 0], tool_call=True)
    for reward in (1.0, 0.0):
        node = tree.add_step(a, [5, 6, 7], [1, 1, 1], [-1] * 3, [1] * 3, tool_call=False)
        tree.finish(node, reward=reward, correct=reward > 0, end="answer")
    forest = Forest.from_trees([tree])
    ones = np.ones(4)
    weights = twin.scores(forest, eps=0.0)
    mass = np.array(weights["pos"]) - np.array(weights["neg"])
    assert mass == pytest.approx([0, 0, 0.5 / 4, 0.5 / 4])  # |A| is 0 above, 1 on the leaves
    fast = Scored(ones, ones, ones, ones, np.array([1, 0.25, 0.125, 0.125]), 0 * ones, ones, 0.0)
    batch = pack(forest, [0], fast)
    assert batch.pos_coef.tolist() == [0, 0, 0.25, 0, *[0.125] * 6]


def test_inactive_trees_are_known_but_not_dropped():
    rng = np.random.default_rng(0)
    trees = [twin.random_tree(rng) for _ in range(3)]
    trees[1].reward = [0.0 if c >= 0 else np.nan for c in trees[1].correct]
    silent = Tree([1])
    for reward in (0.0, 1.0):
        node = silent.add_step(0, [2], [0], [0], [0], tool_call=False)
        silent.finish(node, reward=reward, correct=False, end="answer")
    forest = Forest.from_trees([*trees, silent])
    fast, slow = scored(forest)
    expected = []
    for t in range(4):
        coefficients = twin.pack(forest, [t], slow)
        expected.append(any(coefficients["pos_coef"]) or any(coefficients["neg_coef"]))
    assert active(forest, fast).tolist() == expected == [True, False, True, False]
    assert len(pack(forest, [1], fast)) == len(twin.pack(forest, [1], slow)["node"]) > 0


def test_no_trees_make_an_empty_batch():
    forest = twin.random_forest(0)
    batch = pack(forest, [], scored(forest)[0])
    assert len(batch) == 0
    assert batch.tree_start.tolist() == [0]


def test_misuse_is_refused():
    forest = twin.random_forest(0)
    fast, _ = scored(forest)
    for trees in ([3], [0, -1]):
        with pytest.raises(ValueError, match="not all in a forest of 3 trees"):
            pack(forest, trees, fast)
    with pytest.raises(ValueError, match="score this forest"):
        pack(twin.random_forest(1, trees=2), [0], fast)
    tree = Tree([], task_id="bare")
    node = tree.add_step(0, [1], [1], [-1], [1], tool_call=False)
    tree.finish(node, reward=1.0, correct=True, end="answer")
    bare = Forest.from_trees([tree])
    with pytest.raises(ValueError, match="'bare' starts with an agent token"):
        pack(bare, [0], scored(bare)[0])


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 60))
@example(1371, 25)  # siblings of the part\'s trie stand in another order than in the whole one
def test_parts_own_every_token_once_and_see_its_path(seed, budget):
    forest = twin.random_forest(seed)
    batch = pack(forest, range(3), scored(forest)[0])
    columns = ("token_ids", "old_logprob", "eps_low", "pos_coef", "neg_coef", "agent")

    def identity(one: PackedBatch, at: int) -> tuple[int, int]:
        return int(one.node[at]), int(one.position[at])

    place = {identity(batch, at): at for at in range(len(batch))}
    seen: set[tuple[int, int]] = set()
    for index in range(3):
        for part in cut(batch, index, budget):
            names = [identity(part, at) for at in range(len(part))]
            repeated = np.array([name in seen for name in names])
            assert not repeated.all()
            above, own = (np.unique(part.trie.row[which]) for which in (repeated, ~repeated))
            assert not np.intersect1d(above, own).size
            assert part.trie.position[above].tolist() == list(range(len(above)))  # one path
            assert len(part.trie) <= budget or part.trie.position[-1] == len(part.trie) - 1
            seen.update(names)
            for at, (name, again) in enumerate(zip(names, repeated, strict=True)):
                origin = place[name]
                assert part.agent[at] == (0 if again else batch.agent[origin])
                for column in columns[: 3 if again else None]:
                    assert getattr(part, column)[at] == getattr(batch, column)[origin]
                if batch.pred[origin] < 0:
                    assert part.pred[at] == -1
                else:
                    assert names[part.pred[at]] == identity(batch, batch.pred[origin])
            q, k = np.indices((len(part), len(part)))
            visible = (k <= q) & (q < part.end[k])
            np.testing.assert_array_equal(visible.sum(1) - 1, part.position)
    assert seen == set(place)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(5, 60))
def test_cuts_repeat_as_few_rows_as_possible(seed, budget):
    forest = twin.random_forest(seed)
    batch = pack(forest, [0], scored(forest)[0])
    starts = (np.flatnonzero(np.diff(batch.trie.position) != 1) + 1).tolist()
    stop = starts[9] if len(starts) > 9 else len(batch.trie)
    starts = starts[:9]
    batch = section(batch, 0, batch.trie.row < stop)
    assert len(batch.trie) == stop
    totals = []
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(starts, count) for count in range(len(starts) + 1)
    ):
        bounds = [0, *chosen, stop]
        sizes = [b - a + int(batch.trie.position[a]) for a, b in itertools.pairwise(bounds)]
        single = [not set(starts) & set(range(a + 1, b)) for a, b in itertools.pairwise(bounds)]
        if all(size <= budget or one for size, one in zip(sizes, single, strict=True)):
            totals.append(sum(sizes))
    assert sum(len(part.trie) for part in cut(batch, 0, budget)) == min(totals)


def repeating_forest(seed: int, alphabet: int) -> Forest:
    """Trees whose tokens are few, so that siblings and trees begin alike."""
    forest = twin.random_forest(seed)
    return dataclasses.replace(forest, token_ids=forest.token_ids % np.int32(alphabet))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 4))
def test_equal_tokens_are_one_row_of_the_loss(seed, alphabet):
    forest = repeating_forest(seed, alphabet)
    batch = pack(forest, range(3), scored(forest)[0])
    batch = dataclasses.replace(batch, old_logprob=np.round(batch.old_logprob))
    sums: dict[tuple[float, ...], list[float]] = {}
    columns = (batch.trie.row, batch.old_logprob, batch.eps_low, batch.eps_high)
    for token in np.flatnonzero((batch.pos_coef != 0) | (batch.neg_coef != 0)):
        both = sums.setdefault(tuple(float(column[token]) for column in columns), [0.0, 0.0])
        both[0] += float(batch.pos_coef[token])
        both[1] += float(batch.neg_coef[token])
    rows = batch.loss_rows
    found = [tuple(float(column[token]) for column in columns) for token in rows.index]
    assert found == list(sums), "in the order of their first tokens"
    assert np.array_equal(
        np.stack([rows.pos, rows.neg], 1).reshape(-1, 2), [*sums.values()] or np.empty((0, 2))
    )


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 4))
def test_a_trie_has_every_prefix_once_in_preorder(seed, alphabet):
    forest = repeating_forest(seed, alphabet)
    batch = pack(forest, range(3), scored(forest)[0])
    trie = batch.trie
    paths: list[tuple[int, ...]] = []
    for token, before in zip(batch.token_ids.tolist(), batch.pred.tolist(), strict=True):
        paths.append((*(paths[before] if before >= 0 else ()), token))
    assert len(trie) == len(set(paths))
    prefix = dict(zip(trie.row.tolist(), paths, strict=True))
    assert [prefix[row] for row in trie.row.tolist()] == paths
    for row in range(len(trie)):
        path = prefix[row]
        assert trie.token_ids[row] == path[-1]
        assert trie.position[row] == len(path) - 1
        below = [other for other in prefix if prefix[other][: len(path)] == path]
        assert sorted(below) == list(range(row, trie.end[row]))
    for width in range(len(trie.trunk) + 1):
        assert len({path[:width] for path in paths if len(path) >= width}) == 1


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 30))
def test_parts_of_repeating_trees_own_every_token_once(seed, alphabet, budget):
    forest = repeating_forest(seed, alphabet)
    batch = pack(forest, range(3), scored(forest)[0])
    for index in range(3):
        first, last = batch.tree_start[index : index + 2]
        parts = cut(batch, index, budget)
        for name in ("pos_coef", "neg_coef", "agent"):
            total = sum(float(getattr(part, name).sum()) for part in parts)
            assert total == pytest.approx(float(getattr(batch, name)[first:last].sum()), rel=1e-5)
        for part in parts:
            assert len(part.trie) <= budget or part.trie.position[-1] == len(part.trie) - 1
            assert (part.agent[(part.pos_coef != 0) | (part.neg_coef != 0)] == 1).all()


def test_concatenated_trees_are_those_packed_together():
    forest = twin.random_forest(4)
    fast, _ = scored(forest)
    together = pack(forest, [2, 0, 1], fast)
    apart = concatenate([pack(forest, [2], fast), pack(forest, [0, 1], fast)])
    for name in COLUMNS:
        ours, theirs = getattr(apart, name), getattr(together, name)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_balance_gives_each_rank_about_as_much(ranks):
    costs = np.random.default_rng(0).exponential(size=40).tolist()
    shares = balance(costs, ranks)
    assert sorted(index for share in shares for index in share) == list(range(40))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
    assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * max(sum(costs) / ranks, max(costs))
    assert balance([], ranks) == [[]] * ranks
