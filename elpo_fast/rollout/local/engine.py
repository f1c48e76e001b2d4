"""The local engine: a transformers model in this process, as `types.Engine`.

`batching` decides what is computed in a step, `decoder` computes it; this module is their asyncio
side. All model work happens in one worker thread, which runs while there is something to do and
leaves the event loop free for tools (PyTorch and the kernels release the GIL).

Invariant: weight updates wait in the same queue as requests. Requests made before an update finish
with the old weights, requests made after it see the new ones and none of the old cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import torch
from transformers import PreTrainedModel

from elpo_fast.faults import enough_memory
from elpo_fast.rollout.local.batching import Batcher, Generation
from elpo_fast.rollout.local.decoder import Decoder
from elpo_fast.rollout.local.stopping import StopStrings, TokenTexts
from elpo_fast.rollout.request import check_request, check_tokens
from elpo_fast.types import Completion, EngineStats, Sampling, whole

_NUMBA_THREADS = numba.get_num_threads()  # before anyone lowers it: the most there can be


@dataclass(frozen=True, slots=True)
class _Exclusive:
    """Work that needs the decoder for itself: done when no row runs."""

    work: Callable[[], Any]
    settle: Callable[[Any], None]

    def run(self) -> None:
        try:
            result = self.work()
        except Exception as error:
            result = error
        self.settle(result)


class LocalEngine:
    """`Engine` on a transformers model in this process; CPU or one GPU, fp32 or bfloat16.

    The engine copies `weights` (default: the model's own) into its own layout and into `dtype`
    (default: the model's); `update_weights` takes new ones by name. `cache_tokens` bounds the
    key/value store, `max_batch` the rows decoded together, `prefill_chunk` the prompt tokens
    computed in one step. `tokenizer` serves stop strings alone. On CPUs that multiply no faster in
    bfloat16, weights of that dtype take the memory of float32. `release` gives the memory of
    weights and store to the trainer, until `update_weights`.
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
        weights: Iterable[tuple[str, Any]] | None = None,
    ) -> None:
        for name, value in (
            ("max_batch", max_batch),
            ("cache_tokens", cache_tokens),
            ("prefill_chunk", prefill_chunk),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.weight_version = 0
        given = dict(weights or model.named_parameters())
        self._shapes = {name: weight.shape for name, weight in given.items()}
        self._decoder = Decoder(model, cache_tokens, dtype or model.dtype)
        self._decoder.load(_Whole(self._checked(given.items())))
        self._max_batch = max_batch
        self._batcher = Batcher(self._decoder, max_batch, prefill_chunk)
        self._tokenizer = tokenizer
        self._texts: TokenTexts | None = None
        self._stop_strings: dict[tuple[str, ...], StopStrings] = {}
        self._seeds = np.random.default_rng(seed)
        self._lock = threading.Lock()  # guards the three below
        self._queue: deque[Generation | _Exclusive] = deque()
        self._running = False
        self._closed = False
        self._released = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="local-engine")

    @property
    def context(self) -> int:
        """Tokens of the longest trajectory."""
        return self._decoder.context

    async def generate(
        self, prefix_ids: np.ndarray, n: int, sampling: Sampling
    ) -> list[Completion]:
        """`n` completions of `prefix_ids` `int [N]`; see `types.Engine`. Raises `ValueError` for
        input the engine cannot serve. Cancelling the task frees its rows."""
        prefix = check_request(
            prefix_ids,
            n,
            sampling,
            vocab_size=self._decoder.vocab_size,
            room=self._decoder.context,
            because=f"the model's context and cache_tokens={self._decoder.slots}",
        )
        self._check_weights()
        seed = sampling.seed
        if seed is None:
            seed = int(self._seeds.integers(2**63))
        stops = self._stops(sampling.stop) if sampling.stop else None
        future, settle = _future()
        self._submit(Generation(prefix, n, sampling, seed, stops, settle, future.done))
        return await future

    async def update_weights(self, named_tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Copy new weights by the model's parameter names, all of them, and forget the cache.

        Requests made before finish with the old weights, requests made after see the new ones. Once
        queued an update is made, even if the waiting task is cancelled. Raises `ValueError`,
        changing nothing, for unknown, missing or wrongly shaped tensors.
        """
        tensors = self._checked(named_tensors)
        self._released = False

        def work() -> None:
            self._batcher.forget()
            self._decoder.load(_Whole(tensors))
            self.weight_version = self._batcher.weight_version = version

        await self._alone(work)

    async def score(self, token_ids: np.ndarray) -> np.ndarray:
        """See `types.Engine`; waits for running requests."""
        tokens = check_tokens(token_ids, self._decoder.vocab_size)
        self._check_weights()
        return (await self._alone(lambda: self._batcher.score(tokens)))[None]

    async def release(self) -> None:
        """See `types.Engine`: what runs is finished, then weights, keys and values go."""
        self._released = True

        def work() -> None:
            self._batcher.forget()
            self._decoder.release()

        await self._alone(work)

    def stats(self) -> EngineStats:
        """Token counts since the engine started; a prompt counts once its logits are there."""
        return replace(self._batcher.stats)

    async def close(self) -> None:
        """Fail what is still running and stop the worker thread; closing twice is harmless."""
        with self._lock:
            self._closed = True
        await asyncio.to_thread(self._executor.shutdown)

    def _stops(self, strings: tuple[str, ...]) -> StopStrings:
        if self._tokenizer is None:
            raise ValueError(f"stop strings {strings} need a tokenizer; the engine was given none")
        if strings not in self._stop_strings:
            if self._texts is None:
                self._texts = TokenTexts(self._tokenizer, self._decoder.vocab_size)
            self._stop_strings[strings] = StopStrings(self._texts, strings)
        return self._stop_strings[strings]

    def _check_weights(self) -> None:
        if self._released:
            raise RuntimeError(
                "the engine has released its memory; give it weights by update_weights first"
            )

    def _checked(self, named_tensors: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """All parameters by name, the tied head included."""
        tensors = {name: tensor.detach() for name, tensor in named_tensors}
        tied = {"lm_head.weight"} - self._shapes.keys()
        unknown = sorted(tensors.keys() - self._shapes.keys() - tied)
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
        for name in tied:
            embedding = tensors["model.embed_tokens.weight"]
            head = tensors.setdefault(name, embedding)
            if head is not embedding and not torch.equal(head, embedding):
                raise ValueError(f"{name} is tied to the embedding but the update differs from it")
        return tensors

    async def _alone(self, work: Callable[[], Any]) -> Any:
        future, settle = _future()

        def guarded() -> Any:
            with self._enough_memory():
                return work()

        self._submit(_Exclusive(guarded, settle))
        return await future

    def _enough_memory(self) -> AbstractContextManager[None]:
        batch, slots = self._max_batch, self._decoder.slots
        return enough_memory(
            "computing in the engine",
            f"lower rollout.max_batch={batch} or rollout.cache_tokens={slots}",
        )

    def _submit(self, item: Generation | _Exclusive) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._queue.append(item)
            if not self._running:
                self._running = True
                self._executor.submit(self._run)

    def _run(self) -> None:
        """Step until nothing is left to do; runs in the worker thread."""
        numba.set_num_threads(min(torch.get_num_threads(), _NUMBA_THREADS))
        while self._take():
            try:
                with self._enough_memory():
                    self._batcher.step()
            except Exception as error:
                self._batcher.fail(error)

    def _take(self) -> bool:
        """Hand requests to the batcher up to the next exclusive work, which waits till it is idle.
        False, and the worker counts as stopped, when nothing is left."""
        while True:
            alone = None
            with self._lock:
                if self._closed:
                    error = RuntimeError("the engine was closed")
                    self._batcher.fail(error)
                    while self._queue:
                        self._queue.popleft().settle(error)
                while self._queue and alone is None:
                    item = self._queue[0]
                    if isinstance(item, _Exclusive):
                        if not self._batcher.idle:
                            return True
                        alone = item
                    else:
                        for row in item.rows():
                            self._batcher.add(row)
                    self._queue.popleft()
                if alone is None:
                    self._running = not self._batcher.idle
                    return self._running
            alone.run()


class _Whole(Mapping[str, torch.Tensor]):
    """Parameters by name. What has a `full_tensor` is put together when it is read, so that not
    more than a layer's is whole at any time."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = whole(self._tensors[name])
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _future() -> tuple[asyncio.Future[Any], Callable[[Any], None]]:
    """A future of the running event loop, and how another thread gives it a result or an error."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def resolve(result: Any) -> None:
        if future.done():  # its task was cancelled
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    def settle(result: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(resolve, result)

    return future, settle
