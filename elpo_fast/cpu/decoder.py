"""A decoder's forward on a CPU.

`FusedForward` is one call of `decoder_step.forward` a step, unless the processor multiplies
bfloat16 with instructions that only oneDNN uses here: then `Step` and `packed_product` go operation
by operation. `decoder` is a `rollout.local.decoder.Decoder`, `batch` a `NodeBatch` of it.

What the second way brings, on a Xeon with AMX beside other work: a step of 64 rows of SmolLM2 takes
78 ms, by `decoder_torch` 183, by `FusedForward` 720.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from torch.nn import functional as F

from elpo_fast.cpu import decoder_attention, decoder_elements
from elpo_fast.cpu.decoder_attention import head, query_heads
from elpo_fast.cpu.decoder_step import COUNTER, OPERATIONS, Buffers, PackedWeights, forward
from elpo_fast.cpu.vectors import PANEL, TILE_ROWS

_WORTH_MULTIPLYING = 10_000_000  # multiplications; waking a thread takes as long
_WORTH_WAKING = 150_000  # numbers; waking a thread takes as long as making some of them
_MATRICES = ("qkv", "out", "gate_up", "down")  # of a layer
_AMX_ROWS = 64


class FusedForward:
    """The weights of `decoder`, packed, and its steps."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._cos, self._sin = decoder.cos.numpy(), decoder.sin.numpy()
        self.release()

    def release(self) -> None:
        """Have no memory, until `load`."""
        self._weights: Any = None
        self._stores: tuple[np.ndarray, ...] = ()  # keys and values, also as heads
        self._buffers: dict[str, np.ndarray] = {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Pack all weights; `tensors` maps the model's parameter names, `lm_head.weight` too."""
        stores = as_numpy(self._decoder.keys), as_numpy(self._decoder.values)
        kind = head(stores[0].dtype, self._decoder.width)
        self._stores = *stores, *(elements(store, kind) for store in stores)
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
        last, bias = _projection(tensors, "lm_head", dtype)
        norm = tensors["model.norm.weight"].float().clone().numpy()
        self._weights = PackedWeights(
            **stacks,
            norm=norm,
            head=packed(last),
            head_bias=_filled(bias, PANEL).clone().numpy(),
        )
        # What is multiplied for every node, and for each whose logits are needed.
        size = sum(stacks[role].size for role in _MATRICES)
        words = 1 if dtype == torch.float32 else 2
        self._sizes = words * size, words * self._weights.head.size

    def __call__(self, batch: Any, ends: np.ndarray) -> torch.Tensor:
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
            heads=elements(queries, query_heads(group, d.width)),
            mixed=self._buffer("mixed", rows, d.heads * d.width),
            inner=self._buffer("inner", rows, w.gate_up.shape[1] * PANEL // 2),
            last=self._buffer("last", len(ends), width),
            logits=np.empty((len(ends), d.vocab_size), np.float32),
        )
        available = numba.get_num_threads()
        work = rows * self._sizes[0] + len(ends) * self._sizes[1]
        threads = available if work > _WORTH_MULTIPLYING else 1
        numba.set_num_threads(threads)
        forward(
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


class Step:
    """The operations between the products of one step, where those are not `FusedForward`'s.

    Results have `padded` rows, zeros at the end, and are overwritten by later ones of their shape:
    each is read by one product, before the next operation.
    """

    def __init__(self, decoder: Any, batch: Any) -> None:
        self.decoder, self.batch = decoder, batch
        self.tokens = torch.from_numpy(batch.tokens)
        self.eps = np.float32(decoder.eps)
        shape = (len(batch.tokens), decoder.heads, decoder.width)
        self.queries = np.empty(shape, np.float32)
        self.heads = elements(
            self.queries, query_heads(decoder.heads // decoder.kv_heads, decoder.width)
        )
        self.cos, self.sin = decoder.cos.numpy(), decoder.sin.numpy()
        self.threads = numba.get_num_threads()
        self.results: dict[tuple[int, int], tuple[torch.Tensor, np.ndarray]] = {}

    def _result(self, rows: int, width: int) -> tuple[torch.Tensor, np.ndarray]:
        """`[padded(rows), width]`, and a view of its first `rows`."""
        if (rows, width) not in self.results:
            out = torch.zeros(padded(rows), width, dtype=self.decoder.products)
            self.results[rows, width] = out, as_numpy(out[:rows])
        return self.results[rows, width]

    def _run(self, work: int, kernel: Callable[..., None], *arguments: Any) -> None:
        """Call `kernel`, which makes `work` numbers, alone where waking others takes longer."""
        if work < _WORTH_WAKING:
            numba.set_num_threads(1)
        kernel(*arguments)
        numba.set_num_threads(self.threads)

    def add_norm(
        self, residual: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        out, view = self._result(*residual.shape)
        arrays = residual.numpy(), as_numpy(delta), weight.numpy()
        self._run(view.size, decoder_elements.add_norm, *arrays, self.eps, view)
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        out, view = self._result(len(self.queries), gate_up.shape[1] // 2)
        self._run(view.size, decoder_elements.silu_mul, as_numpy(gate_up), view)
        return out

    def attend(self, qkv: torch.Tensor, index: int) -> torch.Tensor:
        d, b = self.decoder, self.batch
        norm = d.layers[index].norm
        keys, values, key_heads, value_heads = d.cache_views[index]
        self._run(
            self.queries.size,
            decoder_elements.rope_store,
            as_numpy(qkv),
            norm["query_norm"].numpy(),
            norm["key_norm"].numpy(),
            self.eps,
            self.cos,
            self.sin,
            b.positions,
            b.slots,
            self.queries,
            keys,
            values,
        )
        out, view = self._result(len(self.queries), d.heads * d.width)
        decoder_attention.attend(
            self.heads,
            key_heads,
            value_heads,
            b.table,
            b.first,
            b.positions,
            view,
        )
        return out


def packed_product(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`x @ weight.T + bias`, by oneDNN with a packed weight where it is there."""
    packs = torch.backends.mkldnn.is_available()
    if weight.dtype == torch.bfloat16:
        packs = packs and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if packs:
        # A plain weight would be repacked in every call: 1.2 times slower at 64 rows.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        linear = torch.ops.mkldnn._linear_pointwise.default

        def product(x: torch.Tensor) -> torch.Tensor:
            return linear(x, packed, bias, "none", [], "")

        if weight.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
            return partial(_in_equal_parts, product)
        return product
    return lambda x: F.linear(x, weight, bias)


def _in_equal_parts(
    product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """`product` of always as many rows. With AMX, oneDNN has other kernels for few rows, which add
    up in another order: a row's result would depend on how many are computed together."""
    rows = len(x)
    if rows == _AMX_ROWS:
        return product(x)
    full = F.pad(x, (0, 0, 0, -rows % _AMX_ROWS))
    return torch.cat([product(part) for part in full.split(_AMX_ROWS)])[:rows]


def padded(rows: int) -> int:
    """`rows` rounded up by at most an eighth, to few different numbers, and to two at least.

    oneDNN compiles and keeps a kernel for every number of rows it meets. A row's result is the same
    in all of them but in that for one row; and a run that resumes must not depend on what is
    computed together.
    """
    step = 1 << max(0, rows.bit_length() - 4)
    return max(2, -(-rows // step) * step)


def cache_views(decoder: Any) -> list[tuple[np.ndarray, ...]]:
    """Keys and values of every layer, as arrays of numbers and again of heads."""
    views = []
    for layer in zip(decoder.keys, decoder.values, strict=True):
        numbers = [as_numpy(store) for store in layer]
        kind = head(numbers[0].dtype, decoder.width)
        views.append((*numbers, *(elements(store, kind) for store in numbers)))
    return views


def packed(weight: torch.Tensor) -> np.ndarray:
    """`weight` `[N, K]`, bfloat16 or float32, as `decoder_step.PackedWeights` describes it."""
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
