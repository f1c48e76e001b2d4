"""Whole models: trees against rows without sharing, and the local engine against transformers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import torch

from bench.forests import as_rows, as_trees, grow
from bench.gpu.cases import error
from bench.gpu.part import Part
from bench.gpu.shapes import make_model, shape
from elpo_fast.model.attention import attention_name
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.tree.pack import PackedBatch
from elpo_fast.types import Sampling


def run(part: Part) -> None:
    for name in ("0.5b", "1.5b"):
        part.attempt(f"trees {name}", partial(trees_and_rows, part, name))
    for dtype in (torch.float32,) if part.tiny else (torch.float32, torch.bfloat16):
        part.attempt(f"engine {dtype}", partial(engine, part, dtype))


def trees_and_rows(part: Part, name: str) -> None:
    """How far loss and a gradient of trees are from those of rows, with four layers."""
    model = make_model(part, name, torch.float32, layers=2 if part.tiny else 4)
    policy = PolicyOptimizer(model, lr=0.0, dtype=part.dtype)
    rng, size = np.random.default_rng(0), model.config.vocab_size
    grown = [grow(rng, shape(part), size)]
    layouts = {"rows": as_rows(grown, 8192), "trees": as_trees(grown, 8192)}
    backends = ["sdpa", "path"] if part.tiny else ["sdpa", "varlen", "triton"]
    truth = None
    for layout, backend in [("rows", backends[0])] + [("trees", b) for b in backends]:
        what = f"{name} {layout} {backend}"
        out = part.attempt(what, partial(gradient, policy, backend, layouts[layout]))
        if out is None:
            continue
        truth = truth or out
        apart = abs(out[0] - truth[0]) / abs(truth[0]), error(out[1], truth[1])
        part.row(f"{what}: loss {apart[0]:.1e}, gradient {apart[1]:.1e} from rows", apart=apart)
        if not apart[1] <= (1e-4 if part.tiny else 0.05):
            part.fault(f"{what}: gradient differs from rows' by {apart[1]:.1e}")


def gradient(
    policy: PolicyOptimizer, backend: str, batches: list[PackedBatch]
) -> tuple[float, torch.Tensor]:
    """Loss, and the gradient of one weight of the first block.

    Clip bounds are out of reach: rounding would move ratios across them, and with them gradients.
    """
    policy.compute.set_attn_implementation(attention_name(backend))
    policy.model.zero_grad(set_to_none=True)
    loss = 0.0
    for batch in batches:
        low, high = np.ones_like(batch.eps_low), np.full_like(batch.eps_high, 1e6)
        part = policy.policy_backward(replace(batch, eps_low=low, eps_high=high))
        assert part is not None
        loss += float(part.loss)
    weight = policy.model.base_model.layers[0].mlp.down_proj.weight
    assert weight.grad is not None
    return loss, weight.grad.float().clone()


def engine(part: Part, dtype: torch.dtype) -> None:
    """Log-probs of what the engine sampled, branches of a common prefix included, against
    transformers in float32."""
    model = make_model(part, "0.5b", torch.float32, layers=2 if part.tiny else 4)
    prompt = np.arange(7, 7 + (20 if part.tiny else 200), dtype=np.int32)
    new = 8 if part.tiny else 32

    async def sample() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        local, found = LocalEngine(model, None, dtype=dtype), []
        try:
            prefix = prompt
            for _ in range(2):
                drawn = await local.generate(prefix, 3, Sampling(max_tokens=new))
                found += [(prefix, c.token_ids, c.logprobs) for c in drawn]
                prefix = np.concatenate([prefix, drawn[0].token_ids[: new // 2]])
        finally:
            await local.close()
        return found

    worst, means, seen = 0.0, [], count()
    for prefix, tokens, logprobs in asyncio.run(sample()):
        ids = torch.from_numpy(np.concatenate([prefix, tokens])).long().to(part.device)[None]
        with torch.no_grad():
            logits = model(ids).logits[0, len(prefix) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, ids[0, len(prefix) :, None])[:, 0]
        apart = (expected.cpu() - torch.from_numpy(logprobs)).abs()
        worst = max(worst, float(apart.max()))
        means.append(float(apart.mean()))
        next(seen)
    line = f"engine {dtype}: log-probs within {worst:.1e}, {np.mean(means):.1e} on average"
    part.row(line, worst=worst, mean=float(np.mean(means)), completions=next(seen))
    limit = 1e-3 if dtype == torch.float32 else 0.1
    if not worst <= limit:
        part.fault(f"{line}; allowed {limit}")
