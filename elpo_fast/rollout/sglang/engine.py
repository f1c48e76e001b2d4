"""`Engine` over HTTP, on an SGLang server of our own or on several that are already running.

Invariants
- Token ids in, token ids out: nothing is retokenised; stop tokens, and the token that completes a
  stop string, are kept.
- Requests made before a weight update finish with the old weights, requests made after it see the
  new ones and none of the old cache. No server is asked anything before it holds the current
  weights; a completion made with others is never handed out.
- A request is answered by one server as a whole. If that fails, all of it is asked again, of
  another server or of ours when it is back; statistics count what reached a caller.

Log-probs are those of softmax(logits / temperature), whatever top-p, top-k and min-p cut off (the
configuration demands recomputed ones then). Seeds are not honoured: sampling depends on what else
is in the batch, so a run is reproducible in its tasks and updates, not in its tokens.
"""

from __future__ import annotations

import asyncio
import copy
import math
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np
import torch
from transformers import PreTrainedModel

from elpo_fast.config import ConfigError, RolloutConfig
from elpo_fast.regions import region
from elpo_fast.rollout.request import check_request, check_tokens
from elpo_fast.rollout.sglang.process import ServerProcess, find_python
from elpo_fast.rollout.sglang.server import ServerFault, SGLangServer
from elpo_fast.rollout.sglang.stems import Stems
from elpo_fast.rollout.sglang.weights import Broadcasts, ServedWeights, Way, sync_disk, sync_tensors
from elpo_fast.types import Completion, EngineStats, RunError, Sampling

_ATTEMPTS = 3
_FLUSH_TIMEOUT_S = 20.0
# SGLang takes all but a few GiB of what is free otherwise. Weights and key-value memory together,
# as a share of what is free at the server's start, before the trainer has gradients and moments.
_COLOCATED_MEMORY = 0.5

_Answer = TypeVar("_Answer")


class SGLangEngine:
    """`Engine` on SGLang servers that hold copies of `weights` (`None`: `model`'s own), in `dtype`.

    Servers start, or are looked for, with the first request. One engine serves one event loop.
    Raises `ConfigError` where there is no SGLang to start.
    """

    def __init__(
        self,
        config: RolloutConfig,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        dtype: torch.dtype,
        log: Path,
        seed: int = 0,
        weights: Iterable[tuple[str, Any]] | None = None,
    ) -> None:
        self.weight_version = 0
        self._config, self._sglang = config, config.sglang
        self._vocab_size: int = model.config.vocab_size
        self._tokenizer = tokenizer
        self._weights = ServedWeights(model, dtype, weights or model.named_parameters())
        on_cpu = model.device.type == "cpu"
        own = not self._sglang.urls
        gpu = model.device.index or 0
        # A server beside the trainer on its GPU lends it its memory while it trains.
        self._colocated = own and not on_cpu
        if (
            self._colocated
            and self._sglang.weight_sync == "distributed"
            and self._sglang.args.get("base_gpu_id", gpu) == gpu
        ):
            raise ConfigError(
                "rollout.sglang.weight_sync: distributed cannot reach our own server on the "
                f"trainer's GPU {gpu}, since NCCL refuses two processes on one GPU; use auto, or "
                "put the server on another GPU by rollout.sglang.args.base_gpu_id"
            )
        python = find_python(self._sglang.python) if own else ""
        self._folder = _folder(self._sglang.folder, self._weights.bytes)
        self._way: Way
        if self._sglang.weight_sync == "auto":
            self._way = "tensor" if own and not on_cpu else "disk"
        else:
            self._way = self._sglang.weight_sync
        self._asleep = False
        if own:
            described = copy.deepcopy(model.config)
            described.architectures = [type(model).__name__]  # a new model's does not say it
            described.save_pretrained(self._folder)
            args: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "random_seed": seed}
            if on_cpu:
                sizes = config.sizes()
                args |= {
                    "max_total_tokens": sizes.cache_tokens,
                    "max_running_requests": sizes.max_batch,
                }
            else:
                args |= {
                    "enable_memory_saver": True,
                    "base_gpu_id": gpu,
                    "mem_fraction_static": _COLOCATED_MEMORY,
                }
            if tokenizer is None:
                args["skip_tokenizer_init"] = True
            else:
                tokenizer.save_pretrained(self._folder)
            process = ServerProcess(
                python, self._folder, log, args | self._sglang.args, on_cpu=on_cpu
            )
            self._servers = [SGLangServer(self._sglang, process)]
        else:
            self._servers = [SGLangServer(self._sglang, url) for url in self._sglang.urls]
        self._broadcasts: dict[SGLangServer, Broadcasts] = {}
        self._stats = EngineStats()
        self._http: aiohttp.ClientSession | None = None
        self._closed = False
        self._door = asyncio.Lock()  # a weight update holds it: nobody enters
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    async def generate(
        self, prefix_ids: np.ndarray, n: int, sampling: Sampling
    ) -> list[Completion]:
        """`n` completions of `prefix_ids` `int [N]`; see `types.Engine`. Raises `ValueError` for
        input the servers cannot serve, `RunError` when none of them can be made to answer.
        Cancelling the task aborts the request on the server."""
        async with self._entered():
            prefix = check_request(
                prefix_ids,
                n,
                sampling,
                vocab_size=self._vocab_size,
                room=min(server.room for server in self._servers if server.room),
                because="the servers' context and key-value memory",
            )
            if sampling.stop and self._tokenizer is None:
                raise ValueError(
                    f"stop strings {sampling.stop} need a tokenizer; the engine was given none"
                )

            async def ask(server: SGLangServer) -> list[Completion]:
                return await self._complete(server, prefix, n, sampling)

            with region("decode") as span:  # the server does not tell prefill apart
                made = await self._try(ask, lambda: self._nearest(prefix))
                span.counts["tokens"] = sum(len(each.token_ids) for each in made)
            return made

    async def score(self, token_ids: np.ndarray) -> np.ndarray:
        """See `types.Engine`; a row for every server."""
        tokens = check_tokens(token_ids, self._vocab_size)
        sampling = {"max_new_tokens": 0, "temperature": 1.0}

        async def ask(server: SGLangServer) -> list[float]:
            (answer,) = await server.generate(
                [tokens.tolist()], sampling, return_logprob=True, logprob_start_len=0
            )
            return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]

        async with self._entered():
            up = [server for server in self._servers if server.up]
            rows = await asyncio.gather(*(self._try(ask, server) for server in up))
        return np.array(rows, np.float32).reshape(len(up), len(tokens) - 1)

    async def update_weights(self, named_tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Give every server these weights, by the model's parameter names, all of them, when what
        runs has finished. Raises `ValueError`, changing nothing, for unknown, missing or wrongly
        shaped tensors."""
        async with self._door:
            await self._empty.wait()
            self._weights.take(named_tensors)
            self.weight_version = version
            try:
                if self._http is not None:
                    await self._everyone()
            finally:
                self._weights.keep()

    async def release(self) -> None:
        """See `types.Engine`. On the trainer's GPU the server gives its memory back until the next
        update. The requests are tested, their effect on a GPU is not."""
        (server, *_) = self._servers
        if self._colocated and server.up and not self._asleep:
            async with self._door:
                await self._empty.wait()
                await self._flush(server)
                await server.control("/release_memory_occupation")
                self._asleep = True

    def stats(self) -> EngineStats:
        """Token counts of what was handed out. A prompt that siblings share is computed once and
        its last token, whose logits each of them needs, once more for each."""
        return replace(self._stats)

    async def close(self) -> None:
        """Fail what still runs and end our server; closing twice is harmless."""
        self._closed = True
        await asyncio.gather(*(server.close() for server in self._servers))
        if self._http is not None:
            await self._http.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @asynccontextmanager
    async def _entered(self) -> AsyncIterator[None]:
        """Between two weight updates, with servers to ask."""
        async with self._door:
            self._check_open()
            if self._http is None:
                # Every request has a connection of its own: one that the server has just closed
                # for idleness looks like a dead server.
                connector = aiohttp.TCPConnector(limit=0, force_close=True)
                self._http = aiohttp.ClientSession(connector=connector)
            if not any(server.up for server in self._servers):
                await self._everyone()
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")

    async def _try(
        self,
        ask: Callable[[SGLangServer], Awaitable[_Answer]],
        pick: SGLangServer | Callable[[], SGLangServer],
    ) -> _Answer:
        """What a server answers, after a few faults at most."""
        for attempt in range(_ATTEMPTS):
            server = pick() if callable(pick) else pick
            server.load += 1
            try:
                await self._ready(server)
                return await ask(server)
            except ServerFault as fault:
                self._check_open()
                if attempt == _ATTEMPTS - 1:
                    raise RunError(f"a request failed {_ATTEMPTS} times: {fault}") from None
            finally:
                server.load -= 1
        raise AssertionError

    async def _everyone(self) -> None:
        """Make all servers ready. Of several, those that cannot be are left out for now."""
        results = await asyncio.gather(
            *(self._try(self._ready, server) for server in self._servers), return_exceptions=True
        )
        faults = [result for result in results if isinstance(result, BaseException)]
        if len(faults) == len(results):
            raise faults[0]

    async def _ready(self, server: SGLangServer) -> None:
        """It is up and holds the current weights."""
        async with server.lock:
            if self._colocated and (self._asleep or not server.up):
                torch.cuda.empty_cache()  # what the trainer has freed is the server's again
            if not server.up:
                assert self._http is not None
                if server.process:
                    await asyncio.to_thread(self._weights.save, self._folder)
                self._broadcasts.pop(server, None)
                self._asleep = False
                await server.open(self._http, self.weight_version)
                if server.room < self._config.max_tokens:
                    raise ConfigError(
                        f"rollout.max_tokens={self._config.max_tokens} exceeds the {server.room} "
                        f"tokens of {server.name}; lower it or raise the model's context"
                    )
            if server.version != self.weight_version:
                await self._sync(server)
                server.version = self.weight_version

    async def _sync(self, server: SGLangServer) -> None:
        version = self.weight_version
        if self._asleep:
            await server.control("/resume_memory_occupation")
            self._asleep = False
        # Nothing of ours runs; what was aborted may still be on its way out.
        await server.control("/pause_generation", mode="retract")
        await self._flush(server)
        if self._way == "disk":
            await asyncio.to_thread(self._weights.save, self._folder)
            await sync_disk(server, self._folder, version)
        elif self._way == "tensor":
            await sync_tensors(server, self._weights, version)
        else:
            await self._broadcasts.setdefault(server, Broadcasts()).sync(
                server, self._weights, version
            )
        await server.control("/continue_generation")
        server.stems = Stems()

    async def _flush(self, server: SGLangServer) -> None:
        await server.control(f"/flush_cache?timeout={_FLUSH_TIMEOUT_S:g}")

    def _nearest(self, prefix: np.ndarray) -> SGLangServer:
        """The server that knows most of the prefix, or for a new one the one with least to do."""
        up = [server for server in self._servers if server.up] or self._servers
        known, best = max(
            ((server.stems.known(prefix), server) for server in up), key=lambda pair: pair[0]
        )
        return best if 2 * known > len(prefix) else min(up, key=lambda server: server.load)

    async def _complete(
        self, server: SGLangServer, prefix: np.ndarray, n: int, sampling: Sampling
    ) -> list[Completion]:
        ids = prefix.tolist()
        computed = 0
        if server.shares and (n > 1 or 2 * server.stems.known(prefix) <= len(prefix)):
            # Others may want some of it at the same time: compute it once, before anyone samples.
            async with server.stems.compute(prefix):
                (prime,) = await server.generate([ids], {"max_new_tokens": 0})
            computed += len(ids) - prime["meta_info"]["cached_tokens"]
        answers = await server.generate(
            [ids] * n,
            _sampling_params(sampling),
            return_logprob=True,
            top_logprobs_num=self._sglang.top_logprobs if sampling.entropies else 0,
        )
        completions = [self._completion(answer, sampling) for answer in answers]
        if any(c.weight_version != self.weight_version for c in completions):
            server.version = None
            raise ServerFault(f"{server.name} answered with other weights than it was given")
        for completion in completions:
            server.stems.add(np.concatenate([prefix, completion.token_ids[:-1]]))
            computed += len(ids) - completion.cached_tokens
        stats = self._stats
        stats.prompt_tokens += n * len(ids)
        stats.computed_tokens += computed
        stats.cached_tokens += n * len(ids) - computed
        stats.generated_tokens += sum(len(c.token_ids) for c in completions)
        return completions

    def _completion(self, answer: Mapping[str, Any], sampling: Sampling) -> Completion:
        meta = answer["meta_info"]
        token_ids = np.array(answer["output_ids"], np.int32)
        logprobs = np.array([entry[0] for entry in meta["output_token_logprobs"]], np.float32)
        reason = meta["finish_reason"]
        if not np.isfinite(logprobs).all() or reason.get("matched") == "NaN happened":
            raise RunError(
                "the model's logits are not finite: its weights have diverged; "
                "go on from an earlier checkpoint with a lower learning rate"
            )
        full: dict[str, np.ndarray] = {}
        if sampling.temperature == 0:  # a certain choice, whatever the logits
            logprobs = np.zeros_like(logprobs)
            entropies, kind = logprobs, "exact"
        elif self._sglang.top_logprobs and sampling.entropies:
            entropies = np.array([_entropy(top) for top in meta["output_top_logprobs"]], np.float32)
            kind = "top_k"
        else:
            entropies, kind = -logprobs, "sampled"
        if sampling.temperature > 0:
            full = {"full_logprobs": logprobs, "full_entropies": entropies}
        if reason["type"] == "length":
            finish = "length"
        else:
            finish = "stop_string" if isinstance(reason["matched"], str) else "stop_token"
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            entropies=entropies,
            finish=finish,
            cached_tokens=meta["cached_tokens"],
            weight_version=int(meta["weight_version"]),
            entropy_kind=kind,
            **full,
        )


def _sampling_params(sampling: Sampling) -> dict[str, Any]:
    """In SGLang's names. With any stop token, the model's own end of text ends a completion too."""
    return {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": not sampling.stop_token_ids,
    }


def _entropy(top: list[list[Any]]) -> float:
    """A lower bound from the most likely outcomes, `[log-prob, token, text]` in falling order: what
    lies below them is at most as likely as the last of them. Exact where they are all there is."""
    entropy, rest = 0.0, 1.0
    for logprob, *_ in top:
        p = math.exp(logprob)
        entropy -= p * logprob
        rest -= p
    return entropy - max(rest, 0.0) * top[-1][0]


def _folder(configured: str | None, size: int) -> Path:
    """A new folder for `size` bytes of weights: in memory where there is room, else on disk."""
    memory = Path("/dev/shm")
    if configured is None and memory.is_dir() and shutil.disk_usage(memory).free > 2.5 * size:
        configured = str(memory)
    return Path(tempfile.mkdtemp(prefix="elpo-", dir=configured))
