"""The prefix cache: sharing, pins, and eviction from the leaves by last use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elpo_fast.rollout.local.kv import ROOT, CacheFull, PrefixCache


def walk(cache: PrefixCache, tokens: list[int]) -> tuple[np.ndarray, int]:
    """Pin the whole path, adding what is missing; slots, and how many were known."""
    found = cache.match(ROOT, np.array(tokens))
    rest = np.array(tokens[len(found) :])
    if not len(rest):
        return found, len(found)
    node = int(found[-1]) if len(found) else ROOT
    try:
        return np.concatenate([found, cache.add(node, rest)]), len(found)
    except CacheFull:
        cache.release(found)
        raise


def test_a_shared_prefix_shares_slots() -> None:
    cache = PrefixCache(20, vocab_size=10)
    first, _ = walk(cache, [1, 2, 3, 4])
    second, known = walk(cache, [1, 2, 5])
    assert known == 2 and first[:2].tolist() == second[:2].tolist()
    assert len(set(first) | set(second)) == len(cache) == 5


def test_paths_get_consecutive_slots_while_runs_are_empty_and_every_slot_in_the_end() -> None:
    cache = PrefixCache(40, vocab_size=10)
    paths = [[branch] for branch in range(2)]
    slots: list[list[int]] = [[], []]
    for token in range(16):
        for path, own in zip(paths, slots, strict=True):
            own.extend(walk(cache, path)[0][len(own) :].tolist())
            path.append(token % 10)
    assert [np.diff(own).tolist() for own in slots] == [[1] * 15] * 2
    rest, _ = walk(cache, [9] * 8)
    assert sorted([*slots[0], *slots[1], *rest]) == list(range(40))


def test_equal_tokens_after_different_prefixes_are_different_nodes() -> None:
    cache = PrefixCache(20, vocab_size=10)
    first, _ = walk(cache, [1, 9])
    second, known = walk(cache, [2, 9])
    assert known == 0 and first[1] != second[1]


def test_least_recently_used_leaves_go_first() -> None:
    cache = PrefixCache(6, vocab_size=10)
    for tokens in ([1, 2, 3], [1, 4, 5]):
        cache.release(walk(cache, tokens)[0])
    cache.release(walk(cache, [1, 2])[0])  # 1 and 2 are recent, 3 is not
    walk(cache, [7, 8])
    assert walk(cache, [1, 2, 3])[1] == 2 or len(cache.match(ROOT, np.array([1, 4, 5]))) == 3
    assert len(cache.match(ROOT, np.array([1, 2]))) == 2


def test_pinned_paths_stay_and_a_full_cache_says_so_without_harm() -> None:
    cache = PrefixCache(5, vocab_size=10)
    pinned, _ = walk(cache, [1, 2, 3])
    with pytest.raises(CacheFull):
        walk(cache, [4, 5, 6])
    assert len(cache) == 3
    assert walk(cache, [4, 5])[1] == 0
    assert cache.match(ROOT, np.array([1, 2, 3])).tolist() == pinned.tolist()


def test_clear_forgets_everything() -> None:
    cache = PrefixCache(4, vocab_size=10)
    walk(cache, [1, 2, 3])
    cache.clear()
    assert len(cache) == 0 and walk(cache, [1, 2, 3, 4])[1] == 0


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.booleans()), max_size=40
    )
)
def test_paths_are_what_they_were_whatever_happens(
    requests: list[tuple[list[int], bool]],
) -> None:
    """A slot handed out for a path means that path until evicted; running paths stay."""
    cache = PrefixCache(14, vocab_size=3)
    meaning: dict[int, tuple[int, ...]] = {}
    running: list[tuple[list[int], np.ndarray]] = []
    for tokens, keep in requests:
        try:
            slots, known = walk(cache, tokens)
        except CacheFull:
            assert len({s for _, path in running for s in path.tolist()}) + len(tokens) > 14
            continue
        for depth, slot in enumerate(slots.tolist()):
            path = tuple(tokens[: depth + 1])
            if depth < known:
                assert meaning[slot] == path
            meaning[slot] = path
        assert len(set(slots.tolist())) == len(tokens)
        if keep and len(running) < 2:
            running.append((tokens, slots))
        else:
            cache.release(slots)
        for active, path in running:
            found = cache.match(ROOT, np.array(active))
            assert found.tolist() == path.tolist()
            cache.release(found)
        assert len(cache) <= 14
