"""Log-probs of the server beside an exact forward's: after its start, after new weights, and after
it has lent its memory. In bfloat16 none is exact: transformers' own error is the measure."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bench.gpu.part import GIB, Part
from bench.gpu_sglang.served import serving
from elpo_fast.rollout.sglang.engine import SGLangEngine
from elpo_fast.types import Sampling

MIB = 1 << 20
PROMPT, NEW, SAMPLES = 200, 64, 8
PEAKED = 5.0  # weight of the last norm: else all log-probs of a random model are about the same
# Mean errors in nats. The server's kernels round in other places than transformers'.
ALLOWED, TIMES_TRANSFORMERS = 1e-3, 2.0


def run(part: Part) -> None:
    for family in ("qwen2", "qwen3"):
        part.attempt(family, lambda family=family: asyncio.run(one_family(part, family)))


def make(part: Part, family: str) -> PreTrainedModel:
    """Random, of the shape of Qwen2.5-0.5B or Qwen3-0.6B."""
    hidden, intermediate, layers, heads, kv_heads = (
        (896, 4864, 24, 14, 2) if family == "qwen2" else (1024, 3072, 28, 16, 8)
    )
    vocabulary = 151_936
    if part.tiny:
        hidden, intermediate, layers, heads, kv_heads, vocabulary = 64, 96, 2, 2, 1, 512
    kinds: dict[str, Any] = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32 if part.tiny else 128}),
    }
    make_config, make_model, more = kinds[family]
    config = make_config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        **more,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = make_model(config)
    with torch.no_grad():
        model.model.norm.weight.fill_(PEAKED)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.5)
    return model.to(part.device, part.dtype).eval()


async def one_family(part: Part, family: str) -> None:
    model = make(part, family)
    generator = torch.Generator(part.device).manual_seed(1)
    before = used_mib(part)
    async with serving(part, model) as engine:
        began = time.perf_counter()
        await compare(part, f"{family} as started", engine, model)
        seconds = time.perf_counter() - began
        part.row(f"{family} started, and that compared, in {seconds:.1f} s", seconds=seconds)
        # Masters, as a trainer has them.
        masters = {name: p.detach().float() for name, p in model.named_parameters()}
        for version in (1, 2):
            with torch.no_grad():
                for name, master in masters.items():
                    if master.ndim == 2 and "embed" not in name:
                        noise = torch.randn(master.shape, generator=generator, device=part.device)
                        master.add_(0.01 * noise)
                model.load_state_dict(masters, strict=False)
            synchronize(part)
            began = time.perf_counter()
            await engine.update_weights(masters.items(), version)
            seconds = time.perf_counter() - began
            size = sum(p.nbytes for p in model.parameters())
            line = f"{family} update {version}: {size / MIB:.0f} MiB in {1e3 * seconds:.0f} ms"
            part.row(line, seconds=seconds, bytes=size)
        await compare(part, f"{family} updated", engine, model)
        await lend(part, family, engine, masters, before)
        await compare(part, f"{family} woken", engine, model)
    part.row(f"{family}: {before} MiB used before, {used_mib(part)} after the server")


async def compare(part: Part, what: str, engine: SGLangEngine, model: PreTrainedModel) -> None:
    """Of sampled tokens, as decoded and as the server scores them."""
    prompt_tokens, new = (20, 8) if part.tiny else (PROMPT, NEW)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, model.config.vocab_size, prompt_tokens).astype(np.int32)
    completions = await engine.generate(prompt, SAMPLES, Sampling(max_tokens=new))
    errors: dict[str, list[Tensor]] = {"decoded": [], "scored": [], "transformers": []}
    exact_model = copy.deepcopy(model).float()
    for completion in completions:
        tokens = np.concatenate([prompt, completion.token_ids])
        exact = log_probs(exact_model, tokens)
        scored = torch.from_numpy((await engine.score(tokens))[0])
        decoded = torch.from_numpy(completion.logprobs)
        errors["decoded"].append(decoded - exact[len(prompt) - 1 :])
        errors["scored"].append(scored - exact)
        errors["transformers"].append(log_probs(model, tokens) - exact)
    mean = {name: torch.cat(found).abs().mean().item() for name, found in errors.items()}
    most = {name: torch.cat(found).abs().max().item() for name, found in errors.items()}
    text = ", ".join(f"{name} {mean[name]:.2e} (max {most[name]:.1e})" for name in errors)
    part.row(f"{what}, log-prob errors: {text}", what=what, mean=mean, most=most)
    allowed = ALLOWED + TIMES_TRANSFORMERS * mean["transformers"]
    for name in ("decoded", "scored"):
        if not mean[name] <= allowed:
            part.fault(f"{what}: {name} log-probs are off by {mean[name]:.3g} > {allowed:.3g}")


@torch.no_grad()
def log_probs(model: PreTrainedModel, tokens: np.ndarray) -> Tensor:
    """Of all tokens but the first, `[N - 1]`, on the CPU."""
    ids = torch.from_numpy(tokens).long().to(model.device)
    logits = model(ids[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].cpu()


async def lend(
    part: Part, family: str, engine: SGLangEngine, masters: dict[str, Tensor], before: int
) -> None:
    """Release, and wake by an update, with the card's memory at each point. A trainer must be able
    to use what was lent."""
    held = used_mib(part)
    began = time.perf_counter()
    await engine.release()
    released, lent = time.perf_counter() - began, used_mib(part)
    room = torch.empty((held - lent) * MIB // 2, dtype=torch.uint8, device=part.device)
    del room
    used_mib(part)
    began = time.perf_counter()
    await engine.update_weights(masters.items(), 3)
    woken, again = time.perf_counter() - began, used_mib(part)
    part.row(
        f"{family} memory in MiB: {before} without server, {held} with it, {lent} lent in "
        f"{released:.2f} s, {again} taken back in {woken:.2f} s",
        mib=[before, held, lent, again],
        seconds=[released, woken],
    )
    if not part.tiny and held - lent < (held - before) // 2:
        part.fault(f"{family}: only {held - lent} of {held - before} MiB were lent")
    if not part.tiny and abs(again - held) > GIB // MIB:
        part.fault(f"{family}: {held} MiB before lending, {again} after")


def synchronize(part: Part) -> None:
    if not part.tiny:
        torch.cuda.synchronize()


def used_mib(part: Part) -> int:
    """Of the whole card, without what our allocator keeps in reserve; 0 on a CPU."""
    if part.tiny:
        return 0
    torch.cuda.empty_cache()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
