"""The local engine: continuous batching over a prefix tree, in one worker thread.

A *row* is one completion being made. In every step each row walks down the prefix tree as far as
its tokens are known there, and gets new nodes for the rest: its last sampled token, or the next
chunk of its prompt. All new nodes of all rows are one forward; rows whose last token is computed
then sample. So decoding and prefill, siblings of one prompt, branches from the middle of an old
trajectory and rows that return after preemption are one mechanism, and a request that arrives while
others decode joins the next step.

Invariants:
- after a step every node in the tree has its keys and values, computed with the current weights;
- rows are served oldest first and only the youngest is preempted, so the oldest row advances in
  every step and each request ends;
- weight updates wait in the same queue as rows: earlier requests finish first, later ones queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numba
import numpy as np
import torch
from transformers import PreTrainedModel

from elpo_fast.rollout.decoder import Decoder, NodeBatch
from elpo_fast.rollout.kv import ROOT, CacheFull, PrefixCache
from elpo_fast.rollout.sampling import SamplingBatch, row_keys, sample, sample_fused, uniforms
from elpo_fast.rollout.stopping import StopStrings, TokenTexts
from elpo_fast.types import Completion, EngineStats, Sampling

_NUMBA_THREADS = numba.get_num_threads()  # before anyone lowers it: the most there can be


@dataclass(eq=False, slots=True)
class _Request:
    sampling: Sampling
    stop_ids: frozenset[int]
    stop_strings: StopStrings | None
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Completion]]
    n: int
    completions: list[Completion] = field(default_factory=list)

    def settle(self, result: list[Completion] | Exception) -> None:
        _settle(self.loop, self.future, result)


@dataclass(eq=False, slots=True)
class _Row:
    request: _Request
    key: np.uint64  # of its stream of uniform numbers
    tokens: np.ndarray  # int32 [prompt + max_tokens], of which `length` are there
    path: np.ndarray  # int32, same shape: their slots, of which `known` are there
    length: int
    prompt: int
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    known: int = 0
    computed: int = 0  # prompt tokens this row had to compute


@dataclass(eq=False, slots=True)
class _Update:
    """Work that needs the weights for itself: starts when no row runs."""

    work: Callable[[], None]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]


class LocalEngine:
    """`Engine` on a transformers model in this process; CPU or one GPU, fp32 or bfloat16.

    The engine copies the model's weights into its own layout and dtype. `update_weights` takes new
    ones by name; where trainer and engine share `model`, `weights_changed` takes them from it.
    `cache_tokens` bounds the key/value store, `max_batch` the rows decoded together,
    `prefill_chunk` the prompt tokens computed in one step. `tokenizer` serves stop strings alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_batch: int = 64,
        cache_tokens: int = 65536,
        prefill_chunk: int = 512,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (
            ("max_batch", max_batch),
            ("cache_tokens", cache_tokens),
            ("prefill_chunk", prefill_chunk),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.weight_version = 0
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk
        self._model = model
        self._shapes = {n: p.shape for n, p in model.named_parameters()}
        self._aliases = {"lm_head.weight"} - self._shapes.keys()  # tied to the embedding
        self._decoder = Decoder(model, cache_tokens, dtype or model.dtype)
        self._decoder.load(self._checked(model.named_parameters()))
        self._cache = PrefixCache(cache_tokens, self._decoder.vocab_size)
        self._limit = len(self._decoder.cos)  # tokens of the longest trajectory
        self._tokenizer = tokenizer
        self._texts: TokenTexts | None = None
        self._stop_strings: dict[tuple[str, ...], StopStrings] = {}
        self._seeds = np.random.default_rng(seed)
        self._stats = EngineStats()
        self._active: list[_Row] = []  # oldest first
        self._waiting: deque[_Row | _Update] = deque()
        self._crowded = False  # a row was preempted: admit nobody until one finishes
        # In which step, and as which node of it, a slot was last computed.
        self._step = 0
        self._step_of = np.zeros(cache_tokens, np.int64)
        self._node_of = np.zeros(cache_tokens, np.int64)
        self._lock = threading.Lock()  # guards the three below
        self._inbox: list[_Row | _Update] = []
        self._running = False
        self._closed = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="local-engine")

    async def generate(
        self, prefix_ids: np.ndarray, n: int, sampling: Sampling
    ) -> list[Completion]:
        """`n` completions of `prefix_ids` `int [N]`; see `types.Engine`. Raises `ValueError` for
        input the engine cannot serve. Cancelling the task frees its rows."""
        prefix = self._check(prefix_ids, n, sampling)
        seed = sampling.seed
        if seed is None:
            seed = int(self._seeds.integers(2**63))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Completion]] = loop.create_future()
        stop_strings = self._stops(sampling.stop) if sampling.stop else None
        stop_ids = frozenset(int(i) for i in sampling.stop_token_ids)
        request = _Request(sampling, stop_ids, stop_strings, loop, future, n)
        capacity = len(prefix) + sampling.max_tokens
        rows: list[_Row | _Update] = []
        for key in row_keys(seed, n):
            tokens = np.empty(capacity, np.int32)
            tokens[: len(prefix)] = prefix
            path = np.empty(capacity, np.int32)
            rows.append(_Row(request, key, tokens, path, len(prefix), len(prefix)))
        self._submit(rows)
        return await future

    async def update_weights(self, named_tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Copy new weights by the model's parameter names, all of them, and forget the cache.

        Requests made before finish with the old weights, requests made after see the new ones.
        Raises `ValueError`, changing nothing, for unknown, missing or wrongly shaped tensors.
        """
        tensors = self._checked(named_tensors)

        def work() -> None:
            self._decoder.load(tensors)
            self._cache.clear()
            self.weight_version = version

        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._submit([_Update(work, loop, future)])
        await future

    async def weights_changed(self, version: int) -> None:
        """The model given to the constructor has new weights: take them from it."""
        await self.update_weights(self._model.named_parameters(), version)

    def stats(self) -> EngineStats:
        """Token counts of rows whose prompt was computed, since the engine started."""
        return replace(self._stats)

    async def close(self) -> None:
        """Fail what is still running and stop the worker thread; closing twice is harmless."""
        with self._lock:
            self._closed = True
        await asyncio.to_thread(self._executor.shutdown)

    # ---- the caller's side

    def _check(self, prefix_ids: np.ndarray, n: int, sampling: Sampling) -> np.ndarray:
        prefix = np.asarray(prefix_ids)
        if prefix.ndim != 1 or len(prefix) == 0:
            raise ValueError(
                f"a prefix needs at least one token in one dimension, got shape {prefix.shape}"
            )
        if not np.issubdtype(prefix.dtype, np.integer):
            raise ValueError(f"a prefix is made of token ids, got an array of {prefix.dtype}")
        vocab_size = self._decoder.vocab_size
        outside = prefix[(prefix < 0) | (prefix >= vocab_size)]
        if len(outside):
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        s = sampling
        for wrong, name, value, wanted in (
            (s.max_tokens < 1, "max_tokens", s.max_tokens, "at least 1"),
            (not 0 <= s.temperature < np.inf, "temperature", s.temperature, "at least 0"),
            (not 0 < s.top_p <= 1, "top_p", s.top_p, "in (0, 1]"),
            (s.top_k < 0, "top_k", s.top_k, "at least 0 (0: off)"),
            (not 0 <= s.min_p <= 1, "min_p", s.min_p, "in [0, 1]"),
        ):
            if wrong:
                raise ValueError(f"sampling.{name} must be {wanted}, got {value}")
        total = len(prefix) + s.max_tokens
        if total > self._limit:
            raise ValueError(
                f"{len(prefix)} prefix tokens and {s.max_tokens} new ones exceed the "
                f"{self._limit} tokens that model and cache_tokens={self._cache.capacity} allow"
            )
        return prefix

    def _stops(self, strings: tuple[str, ...]) -> StopStrings:
        if not all(strings):
            raise ValueError("a stop string must not be empty")
        if self._tokenizer is None:
            raise ValueError(f"stop strings {strings} need a tokenizer; the engine was given none")
        if strings not in self._stop_strings:
            if self._texts is None:
                self._texts = TokenTexts(self._tokenizer, self._decoder.vocab_size)
            self._stop_strings[strings] = StopStrings(self._texts, strings)
        return self._stop_strings[strings]

    def _checked(self, named_tensors: Iterable[tuple[str, Any]]) -> dict[str, torch.Tensor]:
        """All parameters by name, the tied head included."""
        tensors = {name: tensor.detach() for name, tensor in named_tensors}
        unknown = sorted(tensors.keys() - self._shapes.keys() - self._aliases)
        missing = sorted(self._shapes.keys() - tensors.keys())
        for problem, names in (("unknown", unknown), ("missing", missing)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(f"weight update with {problem} parameter {names[0]}{more}")
        for name, shape in self._shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(
                    f"weight update gives {name} the shape {tuple(tensors[name].shape)}, "
                    f"the model has {tuple(shape)}"
                )
        for name in self._aliases:
            embedding = tensors["model.embed_tokens.weight"]
            if not torch.equal(tensors.setdefault(name, embedding), embedding):
                raise ValueError(f"{name} is tied to the embedding but the update differs from it")
        return tensors

    def _submit(self, items: list[_Row | _Update]) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._inbox += items
            if not self._running:
                self._running = True
                self._executor.submit(self._run)

    # ---- the worker's side

    def _run(self) -> None:
        """Step until nothing is left to do; runs in the worker thread."""
        numba.set_num_threads(min(torch.get_num_threads(), _NUMBA_THREADS))
        while True:
            with self._lock:
                self._waiting += self._inbox
                self._inbox.clear()
                closed = self._closed
                if not (self._active or self._waiting):
                    self._running = False
                    return
            if closed:
                self._fail(RuntimeError("the engine was closed"))
                continue
            try:
                self._admit()
                if self._active:
                    self._advance()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Give `error` to everyone and start afresh: the step may have left nodes uncomputed."""
        requests = {row.request: None for row in self._active}
        for item in self._waiting:
            if isinstance(item, _Row):
                requests[item.request] = None
            else:
                _settle(item.loop, item.future, error)
        for request in requests:
            request.settle(error)
        self._active.clear()
        self._waiting.clear()
        self._cache.clear()
        self._crowded = False

    def _admit(self) -> None:
        for row in [r for r in self._active if r.request.future.done()]:  # cancelled
            self._drop(row)
        while self._waiting:
            item = self._waiting[0]
            if isinstance(item, _Update):
                if self._active:
                    return
                self._waiting.popleft()
                try:
                    item.work()
                except Exception as error:
                    _settle(item.loop, item.future, error)
                else:
                    _settle(item.loop, item.future, None)
                continue
            if item.request.future.done():
                self._waiting.popleft()
                continue
            if len(self._active) == self.max_batch or (self._crowded and self._active):
                return
            self._active.append(self._waiting.popleft())  # type: ignore[arg-type]

    def _advance(self) -> None:
        """One step: extend every row's path, compute the new nodes, sample."""
        self._step += 1
        plan = _Plan()
        budget = self.prefill_chunk
        ready: list[_Row] = []
        position = 0
        while position < len(self._active):  # preemption shortens it from its end
            row = self._active[position]
            position += 1
            decoding = row.known == row.length - 1
            fresh = self._extend(row, 1 if decoding else budget)
            if not decoding:
                budget -= fresh
            if fresh:
                self._schedule(plan, row, row.known - fresh)
            if row.known == row.length:
                if self._step_of[row.path[row.length - 1]] != self._step:
                    # Computed in an earlier step; its logits are needed all the same.
                    self._schedule(plan, row, row.length - 1)
                    fresh = 1
                ready.append(row)
            if not row.logprobs:
                row.computed += fresh
            elif not decoding:
                self._stats.recomputed_tokens += fresh
        if not plan.slots:
            return
        ends = np.array([row.path[row.length - 1] for row in ready], np.int64)
        nodes, which = np.unique(self._node_of[ends], return_inverse=True)
        logits = self._decoder.forward(plan.batch(), nodes)
        if ready:
            self._append(ready, *self._sample(logits, ready, which))

    def _extend(self, row: _Row, limit: int) -> int:
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
                self._waiting.appendleft(youngest)
                self._crowded = True
                if youngest is row:
                    return 0
            else:
                row.path[known : known + count] = slots
                row.known = known + count
                return count

    def _drop(self, row: _Row) -> None:
        """The row runs no more; what it computed stays cached until the room is needed."""
        self._cache.release(row.path[: row.known])
        row.known = 0
        self._active.remove(row)

    def _schedule(self, plan: _Plan, row: _Row, start: int) -> None:
        """Compute the nodes `start ... known - 1` of the row's path in this step."""
        slots = row.path[start : row.known]
        self._step_of[slots] = self._step
        self._node_of[slots] = plan.add(row.tokens, row.path, start, row.known)

    def _sample(
        self, logits: torch.Tensor, rows: list[_Row], which: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        s = [row.request.sampling for row in rows]
        keys = np.array([row.key for row in rows])
        batch = SamplingBatch(
            which=which,
            temperature=np.array([x.temperature for x in s], np.float32),
            top_k=np.array([x.top_k for x in s], np.int64),
            top_p=np.array([x.top_p for x in s], np.float32),
            min_p=np.array([x.min_p for x in s], np.float32),
            uniform=uniforms(keys, np.array([len(row.logprobs) for row in rows])),
        )
        run = sample_fused if logits.device.type == "cpu" else sample
        tokens, logprobs, entropies = run(logits, batch)
        if not np.isfinite(logprobs).all():
            raise RuntimeError("the model's logits are not finite: its weights have diverged")
        return tokens, logprobs, entropies

    def _append(
        self, rows: list[_Row], tokens: np.ndarray, logprobs: np.ndarray, entropies: np.ndarray
    ) -> None:
        """Give every row its token; hand over the rows that end with it."""
        stats = self._stats
        stats.generated_tokens += len(rows)
        columns = zip(rows, tokens.tolist(), logprobs.tolist(), entropies.tolist(), strict=True)
        for row, token, logprob, entropy in columns:
            if not row.logprobs:
                computed = min(row.computed, row.prompt)  # more after a preemption
                stats.prompt_tokens += row.prompt
                stats.computed_tokens += computed
                stats.cached_tokens += row.prompt - computed
            row.tokens[row.length] = token
            row.length += 1
            row.logprobs.append(logprob)
            row.entropies.append(entropy)
            request = row.request
            stops = request.stop_strings
            if token in request.stop_ids:
                self._finish(row, "stop_token")
            elif stops is not None and stops.completed(row.tokens[row.prompt : row.length]):
                self._finish(row, "stop_string")
            elif row.length == len(row.tokens):
                self._finish(row, "length")

    def _finish(self, row: _Row, reason: str) -> None:
        self._drop(row)
        self._crowded = False
        request = row.request
        request.completions.append(
            Completion(
                token_ids=row.tokens[row.prompt : row.length].copy(),
                logprobs=np.array(row.logprobs, np.float32),
                entropies=np.array(row.entropies, np.float32),
                finish=reason,
                cached_tokens=row.prompt - min(row.computed, row.prompt),
                weight_version=self.weight_version,
            )
        )
        if len(request.completions) == request.n:
            request.settle(request.completions)


class _Plan:
    """The nodes of one step, collected row by row."""

    def __init__(self) -> None:
        self.size = self.table_size = 0
        self.tokens: list[np.ndarray] = []
        self.slots: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.paths: list[np.ndarray] = []
        self.first: list[int] = []

    def add(self, tokens: np.ndarray, path: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Add the nodes `start ... stop - 1` of a path; returns their numbers in the step."""
        self.tokens.append(tokens[start:stop])
        self.slots.append(path[start:stop])
        self.positions.append(np.arange(start, stop))
        self.paths.append(path[:stop])
        self.first.append(self.table_size)
        self.table_size += stop
        self.size += stop - start
        return np.arange(self.size - (stop - start), self.size)

    def batch(self) -> NodeBatch:
        counts = [len(slots) for slots in self.slots]
        return NodeBatch(
            tokens=np.concatenate(self.tokens).astype(np.int64),
            positions=np.concatenate(self.positions),
            slots=np.concatenate(self.slots).astype(np.int64),
            table=np.concatenate(self.paths).astype(np.int64),
            first=np.repeat(self.first, counts),
            segments=np.cumsum([0, *counts]),
        )


def _settle(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: Any) -> None:
    """Resolve a future of another thread's event loop, unless its task was cancelled."""

    def resolve() -> None:
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is waiting any more
        loop.call_soon_threadsafe(resolve)
