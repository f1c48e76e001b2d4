"""A decoder's forward on a CPU: one call of `decoder_cpu.forward` a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from torch.nn import functional as F

from elpo_fast.rollout import decoder_cpu
from elpo_fast.rollout.decoder_cpu import COUNTER, OPERATIONS, PANEL, TILE_ROWS, Buffers, Weights

if TYPE_CHECKING:
    from elpo_fast.rollout.decoder import Decoder, NodeBatch

_WORTH_WAKING = 10_000_000  # multiplications; waking a thread takes as long
_MATRICES = ("qkv", "out", "gate_up", "down")  # of a layer


class FusedForward:
    """The weights of `decoder`, packed, and its steps."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._cos, self._sin = decoder.cos.numpy(), decoder.sin.numpy()
        stores = as_numpy(decoder.keys), as_numpy(decoder.values)
        head = decoder_cpu.head(stores[0].dtype, decoder.width)
        self._stores = *stores, *(elements(store, head) for store in stores)
        self._buffers: dict[str, np.ndarray] = {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Pack all weights; `tensors` maps the model's parameter names, `lm_head.weight` too."""
        dtype, layers = self._decoder.dtype, self._decoder.layers
        stacks: dict[str, np.ndarray] = {}

        def put(role: str, index: int, array: np.ndarray) -> None:
            if role not in stacks:
                stacks[role] = np.empty((len(layers), *array.shape), array.dtype)
            stacks[role][index] = array

        for index, layer in enumerate(layers):
            for role in _MATRICES:
                names = getattr(layer, role).names
                pairs = [_projection(tensors, name, dtype) for name in names]
                join = _interleaved if role == "gate_up" else torch.cat
                weight, bias = (join(list(x)) for x in zip(*pairs, strict=True))
                put(role, index, packed(weight))
                put(f"{role}_bias", index, _filled(bias, PANEL).numpy())
            for role, name in layer.norms.items():
                put(role, index, tensors.get(name, torch.empty(0)).float().numpy())
        head, bias = _projection(tensors, "lm_head", dtype)
        norm = tensors["model.norm.weight"].float().clone().numpy()
        self._weights = Weights(
            **stacks,
            norm=norm,
            head=packed(head),
            head_bias=_filled(bias, PANEL).clone().numpy(),
        )
        # What is multiplied for every node, and for each whose logits are needed.
        size = sum(stacks[role].size for role in _MATRICES)
        words = 1 if dtype == torch.float32 else 2
        self._sizes = words * size, words * self._weights.head.size

    def __call__(self, batch: NodeBatch, ends: np.ndarray) -> torch.Tensor:
        """Compute the batch's keys and values; logits `[F, V]` of the nodes `ends` `int64 [F]`."""
        d, w = self._decoder, self._weights
        rows, group = len(batch.tokens), d.heads // d.kv_heads
        residual = F.embedding(torch.from_numpy(batch.tokens), d.embedding).float().numpy()
        width = residual.shape[1]
        queries = np.empty((rows, d.heads, d.width), np.float32)
        buffers = Buffers(
            residual=residual,
            hidden=self._buffer("hidden", rows, width),
            qkv=np.empty((rows, (d.heads + 2 * d.kv_heads) * d.width), np.float32),
            queries=queries,
            heads=elements(queries, decoder_cpu.query_heads(group, d.width)),
            mixed=self._buffer("mixed", rows, d.heads * d.width),
            inner=self._buffer("inner", rows, w.gate_up.shape[1] * PANEL // 2),
            last=self._buffer("last", len(ends), width),
            logits=np.empty((len(ends), d.vocab_size), np.float32),
        )
        available = numba.get_num_threads()
        work = rows * self._sizes[0] + len(ends) * self._sizes[1]
        threads = available if work > _WORTH_WAKING else 1
        numba.set_num_threads(threads)
        decoder_cpu.forward(
            threads,
            np.zeros((OPERATIONS * len(d.layers) + 2) * COUNTER, np.int64),
            w,
            buffers,
            self._cos,
            self._sin,
            np.float32(d.eps),
            *self._stores,
            (batch.positions, batch.slots, batch.table, batch.first),
            ends,
        )
        numba.set_num_threads(available)
        return torch.from_numpy(buffers.logits)

    def _buffer(self, role: str, rows: int, width: int) -> np.ndarray:
        """At least `TILE_ROWS` rows more than `rows`, and `width` made even: zeros at first."""
        have = self._buffers.get(role)
        if have is None or len(have) < rows + TILE_ROWS:
            shape = rows + rows // 8 + TILE_ROWS, width + width % 2
            have = np.zeros(shape, "f4" if self._decoder.products == torch.float32 else "u2")
            self._buffers[role] = have
        return have


def packed(weight: torch.Tensor) -> np.ndarray:
    """`weight` `[N, K]`, bfloat16 or float32, as `decoder_cpu.Weights` describes it."""
    rows = _filled(weight, PANEL)
    if rows.shape[1] % 2:
        rows = F.pad(rows, (0, 1))
    narrow = rows.dtype == torch.bfloat16
    words = rows.view(torch.int32) if narrow else rows
    words = words.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    return words.numpy().view(np.uint32 if narrow else np.float32)


def _projection(
    tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias rounded to `dtype`, the bias then in fp32: zeros where there is none."""
    weight = tensors[f"{name}.weight"].to(dtype)
    if f"{name}.bias" not in tensors:
        return weight, torch.zeros(len(weight))
    return weight, tensors[f"{name}.bias"].to(dtype).float()


def _interleaved(pair: list[torch.Tensor]) -> torch.Tensor:
    """Half panels of the first and of the second tensor, in turns."""
    halves = [_filled(x, PANEL // 2).unflatten(0, (-1, PANEL // 2)) for x in pair]
    return torch.stack(halves, 1).flatten(0, 2)


def _filled(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """`x` with zeros added on its first axis up to a multiple."""
    missing = -len(x) % multiple
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def elements(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The heads of `[..., heads, D]` or their groups as elements of `dtype`, the same memory."""
    return array.reshape(*array.shape[:-2], -1).view(dtype)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A view of a CPU tensor, bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()
