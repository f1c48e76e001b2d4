"""`torch.compile` of decoder blocks, for packed trees.

Every block's `forward` is compiled, and what stands around it is not: hooks of FSDP, full
checkpointing and the loss. Blocks of one class share compiled code, which takes any number of
tokens from two on; trees are tensors to it (`path_attention`), so that neither their number nor
their shape compiles anything again. Calls without trees run as they were.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._triton import has_triton
from transformers import PreTrainedModel

from elpo_fast.config import ConfigError
from elpo_fast.model.forward import wrap_blocks

BACKENDS = ("auto", "path", "triton")
"""The attentions that are one operator to the compiler."""


def has_compiler() -> bool:
    """Whether there is what compiles for a GPU: Triton, and the C compiler that it calls."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return has_triton() and any(map(shutil.which, compilers))


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile the blocks of a model in place, at their first calls. Parameters keep their names,
    and it may be sharded before or after."""
    wrap_blocks(model, _forward)


@cache
def _forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, dynamic=True, fullgraph=True)

    def forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if options.get("tree") is None:
            return plain(self, *arguments, **options)
        try:
            return compiled(self, *arguments, **options)
        except TorchDynamoException as error:
            reason = " ".join(str(error).partition("\n\n")[0].split())  # after it: advice
            raise ConfigError(
                f"model.compile: {type(self).__name__} cannot be compiled here ({reason}); "
                "set model.compile=false"
            ) from error

    return forward
