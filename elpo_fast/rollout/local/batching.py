"""Continuous batching over the prefix tree.

A *row* is one completion being made. In every step each row walks down the prefix tree as far as
its tokens are known there, and gets new nodes for the rest: its last sampled token, or the next
chunk of its prompt. All new nodes of all rows are one forward; rows whose last token is computed
then sample. So decoding and prefill, siblings of one prompt, branches from the middle of an old
trajectory and rows that return after preemption are one mechanism, and rows that come while others
decode join the next step.

Invariants:
- after a step every node in the tree has its keys and values, computed with the current weights;
- rows are served oldest first and only the youngest is preempted, so the oldest row advances in
  every step and each row ends;
- a prompt token is counted once, as served from the cache or as computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from elpo_fast.regions import region
from elpo_fast.rollout.local.decoder import Decoder, NodeBatch
from elpo_fast.rollout.local.kv import ROOT, CacheFull, PrefixCache
from elpo_fast.rollout.local.sampling import (
    Drawn,
    SamplingBatch,
    row_keys,
    sample,
    sample_on_cpu,
    uniforms,
)
from elpo_fast.rollout.local.stopping import StopStrings
from elpo_fast.types import Completion, EngineStats, RunError, Sampling


@dataclass(eq=False, slots=True)
class Generation:
    """`n` completions of one prefix, `settle`d together, or with the error that prevents them.

    They come in the order of their keys, whichever ends first.
    """

    prefix: np.ndarray
    n: int
    sampling: Sampling
    seed: int
    stop_strings: StopStrings | None
    settle: Callable[[list[Completion] | Exception], None]
    cancelled: Callable[[], bool]
    completions: dict[int, Completion] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        return [Row(self, number, key) for number, key in enumerate(row_keys(self.seed, self.n))]


class Row:
    """One completion being made."""

    def __init__(self, request: Generation, number: int, key: np.uint64) -> None:
        self.request = request
        self.number = number
        self.key = key  # of its stream of uniform numbers
        self.prompt = self.length = len(request.prefix)
        capacity = self.prompt + request.sampling.max_tokens
        self.tokens = np.empty(capacity, np.int32)  # of which `length` are there
        self.tokens[: self.prompt] = request.prefix
        self.path = np.empty(capacity, np.int32)  # their slots, of which `known` are there
        self.known = 0
        # Log-prob and entropy of the sampling and of the full distribution, token by token.
        self.figures: list[list[float]] = []
        self._computed = 0

    @property
    def computed(self) -> int:
        """Prompt tokens this row computed itself; after a preemption some came up twice."""
        return min(self._computed, self.prompt)

    @computed.setter
    def computed(self, value: int) -> None:
        self._computed = value


class Batcher:
    """Rows waiting and running on one decoder; `step` until `idle`. Not thread-safe."""

    def __init__(self, decoder: Decoder, max_batch: int, prefill_chunk: int) -> None:
        self.weight_version = 0
        self.stats = EngineStats()
        self._decoder = decoder
        self._max_batch, self._prefill_chunk = max_batch, prefill_chunk
        self._cache = PrefixCache(decoder.slots, decoder.vocab_size)
        self._active: list[Row] = []  # oldest first
        self._waiting: deque[Row] = deque()
        self._crowded = False  # a row was preempted: admit nobody until one leaves
        # In which step, and as which node of it, a slot was last computed.
        self._step = 0
        self._step_of = np.zeros(decoder.slots, np.int64)
        self._node_of = np.zeros(decoder.slots, np.int64)

    @property
    def idle(self) -> bool:
        return not (self._active or self._waiting)

    def add(self, row: Row) -> None:
        self._waiting.append(row)

    def forget(self) -> None:
        """Drop every cached node, because the weights changed; only while idle."""
        assert self.idle
        self._cache.clear()

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probs `float32 [N - 1]` of `tokens[1:]`, each given all before; only while idle."""
        assert self.idle
        found = self._cache.match(ROOT, tokens)
        node = int(found[-1]) if len(found) else ROOT
        rest = tokens[len(found) :]
        path = np.concatenate([found, self._cache.add(node, rest)]) if len(rest) else found
        plan = _Plan()
        plan.add(tokens, path, 0, len(tokens))
        logits = self._decoder.forward(plan.batch(), np.arange(len(tokens) - 1))
        self._cache.release(path)
        targets = torch.from_numpy(tokens[1:].astype(np.int64)).to(logits.device)
        return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu().numpy()

    def fail(self, error: Exception) -> None:
        """Give `error` to everyone and start afresh: a step may have left nodes uncomputed."""
        for row in (*self._active, *self._waiting):
            row.request.settle(error)
        self._active.clear()
        self._waiting.clear()
        self._crowded = False
        self._cache.clear()

    def step(self) -> None:
        """Admit rows, extend every row's path, compute the new nodes, sample."""
        with region("batching"):
            self._advance()

    def _advance(self) -> None:
        self._admit()
        self._step += 1
        plan = _Plan()
        budget = self._prefill_chunk
        ready: list[Row] = []
        prompt = pairs = position = 0
        while position < len(self._active):  # preemption shortens it from its end
            row = self._active[position]
            position += 1
            decoding = row.known == row.length - 1
            fresh = self._extend(row, 1 if decoding else budget)
            if not decoding:
                budget -= fresh
                prompt += fresh
                pairs += fresh * (2 * row.known - fresh + 1) // 2
            if fresh:
                self._schedule(plan, row, row.known - fresh)
            if row.known == row.length:
                if self._step_of[row.path[row.length - 1]] != self._step:
                    # Computed in an earlier step; its logits are needed all the same.
                    self._schedule(plan, row, row.length - 1)
                    fresh = 1
                ready.append(row)
            if not row.figures:
                row.computed += fresh
            elif not decoding:
                self.stats.recomputed_tokens += fresh
        if plan.size:
            ends = np.array([row.path[row.length - 1] for row in ready], np.int64)
            nodes, which = np.unique(self._node_of[ends], return_inverse=True)
            batch, decoded = plan.batch(), plan.size - prompt
            counts = {
                "tokens": decoded,
                "pairs": int(batch.positions.sum()) + plan.size - pairs,
                "rows": len(nodes),
                "passes": decoded / plan.size,
            }
            with region("decode", **counts) as span:
                if prompt:
                    span.shares("prefill", tokens=prompt, pairs=pairs)
                logits = self._decoder.forward(batch, nodes)
            if ready:
                with region("sampling", rows=len(ready)):
                    drawn = self._sample(logits, ready, which)
                self._append(ready, drawn)

    def _admit(self) -> None:
        for row in [r for r in self._active if r.request.cancelled()]:
            self._drop(row)
        while self._waiting:
            if self._waiting[0].request.cancelled():
                self._waiting.popleft()
            elif len(self._active) == self._max_batch or (self._crowded and self._active):
                return
            else:
                self._active.append(self._waiting.popleft())

    def _extend(self, row: Row, limit: int) -> int:
        """Walk down known nodes, then add at most `limit` new ones; returns how many. Preempts
        younger rows, in the end this one, where memory is short."""
        known, length = row.known, row.length
        node = int(row.path[known - 1]) if known else ROOT
        found = self._cache.match(node, row.tokens[known:length])
        row.path[known : known + len(found)] = found
        row.known = known = known + len(found)
        count = min(limit, length - known)
        if count == 0:
            return 0
        node = int(row.path[known - 1]) if known else ROOT
        while True:
            try:
                slots = self._cache.add(node, row.tokens[known : known + count])
            except CacheFull:
                youngest = self._active[-1]
                self._drop(youngest)
                self._crowded = True
                self._waiting.appendleft(youngest)
                if youngest is row:
                    return 0
            else:
                row.path[known : known + count] = slots
                row.known = known + count
                return count

    def _drop(self, row: Row) -> None:
        """The row runs no more; what it computed stays cached until the room is needed."""
        self._cache.release(row.path[: row.known])
        row.known = 0
        self._active.remove(row)
        self._crowded = False

    def _schedule(self, plan: _Plan, row: Row, start: int) -> None:
        """Compute the nodes `start ... known - 1` of the row's path in this step."""
        slots = row.path[start : row.known]
        self._step_of[slots] = self._step
        self._node_of[slots] = plan.add(row.tokens, row.path, start, row.known)

    def _sample(self, logits: torch.Tensor, rows: list[Row], which: np.ndarray) -> Drawn:
        s = [row.request.sampling for row in rows]
        keys = np.array([row.key for row in rows])
        batch = SamplingBatch(
            which=which,
            temperature=np.array([x.temperature for x in s], np.float32),
            top_k=np.array([x.top_k for x in s], np.int64),
            top_p=np.array([x.top_p for x in s], np.float32),
            min_p=np.array([x.min_p for x in s], np.float32),
            uniform=uniforms(keys, np.array([len(row.figures) for row in rows])),
        )
        run = sample_on_cpu if logits.device.type == "cpu" else sample
        drawn = run(logits, batch)
        if not np.isfinite(drawn.logprobs).all():
            raise RunError(
                "the model's logits are not finite: its weights have diverged; "
                "go on from an earlier checkpoint with a lower learning rate"
            )
        return drawn

    def _append(self, rows: list[Row], drawn: Drawn) -> None:
        """Give every row its token; hand over the rows that end with it."""
        self.stats.generated_tokens += len(rows)
        columns = zip(rows, *(column.tolist() for column in drawn), strict=True)
        for row, token, *figures in columns:
            if not row.figures:
                self.stats.prompt_tokens += row.prompt
                self.stats.computed_tokens += row.computed
                self.stats.cached_tokens += row.prompt - row.computed
            row.tokens[row.length] = token
            row.length += 1
            row.figures.append(figures)
            request = row.request
            stops = request.stop_strings
            if token in request.sampling.stop_token_ids:
                self._finish(row, "stop_token")
            elif stops is not None and stops.completed(row.tokens[row.prompt : row.length]):
                self._finish(row, "stop_string")
            elif row.length == len(row.tokens):
                self._finish(row, "length")

    def _finish(self, row: Row, reason: str) -> None:
        self._drop(row)
        request = row.request
        logprobs, entropies, full_logprobs, full_entropies = np.array(
            row.figures, np.float32, order="F"
        ).T
        request.completions[row.number] = Completion(
            token_ids=row.tokens[row.prompt : row.length].copy(),
            logprobs=logprobs,
            entropies=entropies,
            full_logprobs=full_logprobs,
            full_entropies=full_entropies,
            finish=reason,
            cached_tokens=row.prompt - row.computed,
            weight_version=self.weight_version,
        )
        if len(request.completions) == request.n:
            request.settle([request.completions[number] for number in range(request.n)])


class _Plan:
    """The nodes of one step, collected row by row."""

    def __init__(self) -> None:
        self.size = self._table_size = 0
        self._tokens: list[np.ndarray] = []
        self._slots: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._paths: list[np.ndarray] = []
        self._first: list[int] = []

    def add(self, tokens: np.ndarray, path: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Add the nodes `start ... stop - 1` of a path; returns their numbers in the step."""
        self._tokens.append(tokens[start:stop])
        self._slots.append(path[start:stop])
        self._positions.append(np.arange(start, stop))
        self._paths.append(path[:stop])
        self._first.append(self._table_size)
        self._table_size += stop
        self.size += stop - start
        return np.arange(self.size - (stop - start), self.size)

    def batch(self) -> NodeBatch:
        counts = [len(slots) for slots in self._slots]
        return NodeBatch(
            tokens=np.concatenate(self._tokens).astype(np.int64),
            positions=np.concatenate(self._positions),
            slots=np.concatenate(self._slots).astype(np.int64),
            table=np.concatenate(self._paths).astype(np.int64),
            first=np.repeat(self._first, counts),
            segments=np.cumsum([0, *counts]),
        )
