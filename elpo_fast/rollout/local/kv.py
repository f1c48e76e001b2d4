"""The prefix cache: a tree of tokens whose nodes are the slots of the key/value store.

One node is one token after one exact prefix, and one slot of the store, so every branch that shares
a prefix shares its keys and values and nothing is ever copied. Invariants:

- a slot's parent is allocated as long as the slot is (paths are closed under ancestors);
- a pinned slot, i.e. one on the path of a running row, is never evicted; pins count rows;
- a node was last used no later than its parent, so evicting by (last use, deepest first) removes
  leaves before their parents;
- a path goes through consecutive slots as far as it can: it gets runs of `_RUN` slots while any run
  is empty. Attention reads a path's keys in order, and much faster where they lie side by side.
"""

from __future__ import annotations

import numpy as np

ROOT = -1
_DEPTH_BITS = 24  # deeper paths than 16.7 M tokens do not occur
_RUN = 16  # slots; longer ones are hardly faster


class CacheFull(Exception):
    """Every slot is pinned by a running row."""


class PrefixCache:
    """Bookkeeping of `capacity` slots; holds no keys or values itself.

    Callers walk down with `match`, extend with `add`; both pin what they return, and `release` of
    the whole path gives the pins back and makes the path the most recently used.
    """

    def __init__(self, capacity: int, vocab_size: int) -> None:
        self.capacity = capacity
        self.vocab_size = vocab_size
        self.clear()

    def clear(self) -> None:
        """Forget every node. Only valid while nothing is pinned, or when all pins are void."""
        self._children: dict[int, int] = {}  # (parent + 1) * vocabulary + token -> slot
        self._key = np.zeros(self.capacity, np.int64)  # the slot's own entry in `_children`
        self._depth = np.zeros(self.capacity, np.int64)
        self._pins = np.zeros(self.capacity, np.int32)
        self._used = np.zeros(self.capacity, np.int64)
        self._allocated = np.zeros(self.capacity, bool)
        self._clock = 0
        runs = -(-self.capacity // _RUN)
        self._in_use = np.zeros(runs, np.int64)  # slots of every run
        # Popped from the end: low slots first, so untouched memory stays untouched.
        self._empty = list(range(runs - 1, -1, -1))
        self._gaps: list[int] = []  # slots that were free between others when last looked for
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def match(self, node: int, tokens: np.ndarray) -> np.ndarray:
        """Slots `int32 [m]`, `m <= len(tokens)`, of the longest known path below `node`; pinned."""
        found = []
        children, vocab_size = self._children, self.vocab_size
        for token in tokens.tolist():
            child = children.get((node + 1) * vocab_size + token)
            if child is None:
                break
            found.append(child)
            node = child
        slots = np.array(found, np.int32)
        if found:
            self._pins[slots] += 1
        return slots

    def add(self, node: int, tokens: np.ndarray) -> np.ndarray:
        """New slots `int32 [len(tokens)]` for a chain of unknown tokens below `node`; pinned.

        Evicts what was used longest ago if need be; raises `CacheFull`, changing nothing, when
        pinned slots leave too little room.
        """
        count = len(tokens)
        if count > self.capacity - self._size:
            self._evict(count - (self.capacity - self._size))
        depth = 0 if node == ROOT else int(self._depth[node]) + 1
        if count == 1:  # what every decoding row does in every step: scalars are faster
            slot = self._follow(node)
            key = (node + 1) * self.vocab_size + int(tokens[0])
            self._children[key] = slot
            self._place(slot, key, depth)
            return np.array([slot], np.int32)
        slots = np.empty(count, np.int32)
        last = node
        for i in range(count):
            slots[i] = last = self._follow(last)
            self._allocated[last] = True
        parents = np.empty(count, np.int64)
        parents[0], parents[1:] = node, slots[:-1]
        keys = (parents + 1) * self.vocab_size + tokens
        self._children.update(zip(keys.tolist(), slots.tolist(), strict=True))
        self._place(slots, keys, np.arange(depth, depth + count))
        return slots

    def release(self, path: np.ndarray) -> None:
        """Give back one pin of every slot of a path that starts at the root."""
        self._clock += 1
        self._pins[path] -= 1
        self._used[path] = self._clock

    def _follow(self, node: int) -> int:
        """A free slot for a child of `node`, next to it if it can be."""
        slot = node + 1
        if slot % _RUN and slot < self.capacity and not self._allocated[slot]:
            return slot
        if self._empty:
            return self._empty.pop() * _RUN
        while True:
            while self._gaps:
                slot = self._gaps.pop()
                if not self._allocated[slot]:
                    return slot
            self._gaps = np.flatnonzero(~self._allocated)[::-1].tolist()

    def _place(
        self, slots: int | np.ndarray, keys: int | np.ndarray, depths: int | np.ndarray
    ) -> None:
        self._key[slots] = keys
        self._depth[slots] = depths
        self._pins[slots] = 1
        self._allocated[slots] = True
        if isinstance(slots, int):
            self._in_use[slots // _RUN] += 1
            self._size += 1
        else:
            np.add.at(self._in_use, slots // _RUN, 1)
            self._size += len(slots)

    def _evict(self, count: int) -> None:
        idle = np.flatnonzero(self._allocated & (self._pins == 0))
        if len(idle) < count:
            raise CacheFull
        # A few more than asked, so that a full cache is not searched for every token.
        count = min(len(idle), max(count, self.capacity // 64))
        order = (self._used[idle] << _DEPTH_BITS) - self._depth[idle]
        victims = idle[np.argpartition(order, count - 1)[:count]]
        for key in self._key[victims].tolist():
            del self._children[key]
        self._allocated[victims] = False
        self._size -= count
        runs = victims // _RUN
        np.subtract.at(self._in_use, runs, 1)
        self._empty.extend(np.unique(runs[self._in_use[runs] == 0])[::-1].tolist())
        self._gaps.clear()  # some of them may be in empty runs now
