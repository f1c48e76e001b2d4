"""Does the engine sample from the policy that is trained?

An engine may take an update without a word and compute something else: servers answer success to
weights whose names they do not know. So after every update the log-probs of a fixed short sequence
are compared with the trainer's own forward.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from elpo_fast.types import Engine, RunError

_TOKENS = 32
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Mean absolute difference, nats. Two correct bfloat16 evaluations of tokens as unlikely as these
differ by up to a third of it."""


Score = Callable[[np.ndarray], np.ndarray]
"""Tokens `[N]` to the log-probs `[N - 1]` of all but the first."""


async def check_engine(
    engine: Engine, model: PreTrainedModel, dtype: torch.dtype, score: Score | None = None
) -> None:
    """Compare `engine` with `model`, or with what `score` computes for a model that is sharded;
    `dtype` is the coarser of theirs. Raises `RunError`."""
    vocab_size = model.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, _TOKENS)
    theirs = await engine.score(tokens)
    ours = score(tokens) if score else _score(model, tokens)
    apart = np.abs(theirs - ours).mean(1).max()
    exact = dtype == model.dtype == torch.float32
    tolerance = _TOLERANCE[torch.float32 if exact else torch.bfloat16]
    if not apart <= tolerance:
        raise RunError(
            f"after the weight update the engine's log-probs differ from the trainer's by "
            f"{apart:.3g} on average, more than {tolerance:g}: it lacks some of the weights or "
            "computes this model differently; use another rollout.engine or weight_sync"
        )


@torch.no_grad()
def _score(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(tokens).to(model.device)
    logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[1:, None])[:, 0].cpu().numpy()
