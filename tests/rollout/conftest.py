"""Small random models, engines on them, and what a plain forward says about a completion.

`local` is the engine in this process. `sglang` is the real SGLang: one server for the whole test
session, which every test gives its own weights; without it these tests are skipped.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numba
import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from elpo_fast.config import RolloutConfig
from elpo_fast.model.tokenizer import train_tokenizer
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.rollout.sglang.engine import SGLangEngine
from elpo_fast.rollout.sglang.process import ServerProcess
from elpo_fast.types import Completion

VOCAB_SIZE = 320
CACHE_TOKENS = 16384
START_TIMEOUT_S = 240
_KINDS = {
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2-biased": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3-normed": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3-odd-heads": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),
}


@pytest.fixture(autouse=True)
def _threads() -> None:
    """The kernels use as many threads as PyTorch, also where a test calls them itself."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@cache
def _model(kind: str) -> PreTrainedModel:
    config, architecture, extra = _KINDS[kind]
    model = architecture(
        config(
            vocab_size=VOCAB_SIZE,
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            **{"tie_word_embeddings": False, **extra},
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough to make attention and logits uneven
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.12 if parameter.ndim > 1 else 1 + noise * 0.2)
    return model.eval()


@pytest.fixture(params=list(_KINDS))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return _model(request.param)


@pytest.fixture
def model() -> PreTrainedModel:
    return _model("llama-tied")


@pytest.fixture
def prompt() -> Callable[..., np.ndarray]:
    """Random token ids, the same for the same seed."""

    def make(length: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, VOCAB_SIZE, length)

    return make


@pytest.fixture
def use() -> Callable[..., Any]:
    """Run a coroutine function on a fresh engine, and close the engine."""

    def run(
        model: PreTrainedModel,
        work: Callable[[LocalEngine], Coroutine[Any, Any, Any]],
        tokenizer: Any = None,
        **options: Any,
    ) -> Any:
        async def whole() -> Any:
            engine = LocalEngine(model, tokenizer, **options)
            try:
                return await work(engine)
            finally:
                await engine.close()

        return asyncio.run(whole())

    return run


@pytest.fixture
def check() -> Callable[..., None]:
    """Log-probs and entropies of a completion equal those of a plain forward."""

    def compare(
        model: PreTrainedModel,
        prefix: np.ndarray,
        completion: Completion,
        temperature: float = 1.0,
        tolerance: float = 1e-4,
    ) -> None:
        ids = torch.tensor(np.concatenate([prefix, completion.token_ids])).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prefix) - 1 : -1]
        logprobs = (logits.double() / temperature).log_softmax(-1)
        expected = logprobs.gather(-1, ids[len(prefix) :, None])[:, 0]
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(completion.entropies, entropies, rtol=0, atol=tolerance)

    return compare


@pytest.fixture(scope="session")
def sglang_python() -> str:
    python = Path(sys.prefix).parent / ".venv-sglang" / "bin" / "python"
    if not python.exists():
        pytest.skip("the real SGLang is not installed; run `make sglang-cpu`")
    return str(python)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer(["carry the four to the total and take seven from the sum"] * 3)


@pytest.fixture(scope="session")
def start_server(
    sglang_python: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., tuple[ServerProcess, str]]]:
    """Start a server on the "qwen3-normed" model, without waiting for it; process and URL."""
    started: list[ServerProcess] = []

    def start(**args: Any) -> tuple[ServerProcess, str]:
        folder = tmp_path_factory.mktemp("sglang")
        _model("qwen3-normed").save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        args = {"dtype": "float32", "max_total_tokens": CACHE_TOKENS, "random_seed": 0, **args}
        process = ServerProcess(sglang_python, folder, folder / "log", args, on_cpu=True)
        started.append(process)
        return process, process.start(0)

    yield start
    for process in started:
        process.stop()


@pytest.fixture(scope="session")
def ready() -> Callable[[ServerProcess, str], str]:
    """Wait until a started server answers; its URL."""

    def wait(process: ServerProcess, url: str) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with urlopen(f"{url}/health", timeout=30):
                    return url
            except (URLError, OSError):
                assert process.alive and time.monotonic() < deadline, process.tail()
                time.sleep(0.2)

    return wait


TORCHRUN = {
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "9",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
}
"""What torchrun tells its second worker; a server told so would wait for torchrun's store."""


@pytest.fixture(scope="session")
def server(start_server: Any, ready: Any) -> tuple[ServerProcess, str]:
    """The server that all tests share, as users have it."""
    process, url = start_server()
    return process, ready(process, url)


@pytest.fixture(scope="session")
def others() -> list[tuple[ServerProcess, str]]:
    """What `servers` has started beside `server`."""
    return []


@pytest.fixture
def servers(server: Any, others: Any, start_server: Any, ready: Any) -> list[Any]:
    """`server` and one to maltreat, which shares no prefix, started as by torchrun's second
    worker."""
    if not others or not others[-1][0].alive:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in TORCHRUN.items():
                patch.setenv(name, value)
            others.append(start_server(disable_radix_cache=True))
        ready(*others[-1])
    return [server, others[-1]]


@pytest.fixture
def use_sglang(tmp_path: Path, tokenizer: Any) -> Callable[..., Any]:
    """Run a coroutine function on a fresh engine for these servers, and close the engine."""

    def run(
        model: PreTrainedModel,
        work: Callable[[SGLangEngine], Coroutine[Any, Any, Any]],
        urls: list[str],
        **options: Any,
    ) -> Any:
        options = {"top_logprobs": VOCAB_SIZE, "folder": str(tmp_path), **options}
        config = RolloutConfig.model_validate(
            {"max_tokens": 256, "sglang": {"urls": urls, **options}}
        )

        async def whole() -> Any:
            engine = SGLangEngine(
                config, model, tokenizer, dtype=torch.float32, log=tmp_path / "log"
            )
            try:
                return await work(engine)
            finally:
                await engine.close()

        return asyncio.run(whole())

    return run


@pytest.fixture(params=["local", "sglang"])
def with_engine(request: pytest.FixtureRequest, tokenizer: Any) -> Callable[..., Any]:
    """Run a coroutine function on a fresh engine of either kind on the "qwen3-normed" model."""
    if request.param == "local":
        use = request.getfixturevalue("use")
        return lambda work: use(_model("qwen3-normed"), work, tokenizer, cache_tokens=CACHE_TOKENS)
    use_sglang, (_, url) = (request.getfixturevalue(name) for name in ("use_sglang", "server"))
    return lambda work: use_sglang(_model("qwen3-normed"), work, [url])


@pytest.fixture
def qwen3() -> PreTrainedModel:
    """What `with_engine` computes."""
    return _model("qwen3-normed")
