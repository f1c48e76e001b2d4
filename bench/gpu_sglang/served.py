"""A server of our own for a model, with what a machine without SGLang's binaries needs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bench.gpu.part import Part
from elpo_fast.config import RolloutConfig
from elpo_fast.rollout.sglang.engine import SGLangEngine

STANDINS = Path(__file__).parent / "standins"
ARGS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "cuda_graph_max_bs_decode": 256,
    "cuda_graph_backend_prefill": "disabled",
}


def sglang(part: Part) -> dict[str, Any]:
    """`rollout.sglang` for servers that this process starts from now on."""
    if part.tiny:
        return {}
    os.environ |= {
        "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
        "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
        # The server's interpreter alone must see it: ours has started.
        "PYTHONPATH": os.pathsep.join([str(STANDINS), os.environ.get("PYTHONPATH", "")]),
    }
    return {"args": ARGS, "start_timeout_s": max(1.0, part.left)}


@asynccontextmanager
async def serving(part: Part, model: PreTrainedModel) -> AsyncIterator[SGLangEngine]:
    config = RolloutConfig.model_validate({"max_tokens": 2048, "sglang": sglang(part)})
    log = part.out.with_suffix(".server.log")
    engine = SGLangEngine(config, model, None, dtype=part.dtype, log=log)
    try:
        yield engine
    finally:
        await engine.close()
