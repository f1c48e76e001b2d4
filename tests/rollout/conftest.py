"""Small random models for the local engine, and what a plain forward says about a completion."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any

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

from elpo_fast.rollout.local import LocalEngine
from elpo_fast.types import Completion

VOCAB_SIZE = 320
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
                return await asyncio.wait_for(work(engine), 60)
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
