"""A compact decoder forward over nodes of the prefix tree, for Llama, Qwen2 and Qwen3.

The unit of work is one *node*: a token at the end of a path of cache slots. A node's ancestors are
cached or in the same step, and each layer stores all new keys and values before any node attends;
so prompts, branches and decoded tokens of any length go through one batch, without padding.

The decoder keeps its own copy of the weights, rounded to its own dtype whatever the model's, in the
layout it computes with: query, key and value fused, gate and up fused, on a CPU repacked for its
matrix products. Keys and values are kept in this dtype too. Residual stream, norms, rotary
embedding and softmax are fp32; so are the products of a bfloat16 decoder on CPUs that multiply
bfloat16 no faster (`products_dtype`).

On a CPU `cpu.decoder` computes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from elpo_kernels import widens_bfloat16
from torch.nn import functional as F
from transformers import PreTrainedModel

from elpo_fast.rollout.local import decoder_torch

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class NodeBatch:
    """`Q` nodes to compute. Node `q` attends `table[first[q] : first[q] + positions[q] + 1]`."""

    tokens: np.ndarray  # int64 [Q]
    positions: np.ndarray  # int64 [Q], depth in the tree
    slots: np.ndarray  # int64 [Q], where its key and value go
    table: np.ndarray  # int64 [T], paths laid end to end
    first: np.ndarray  # int64 [Q], where the node's path starts in `table`
    segments: np.ndarray  # int64 [S + 1], bounds of runs of nodes on one path


class _Linear:
    """One matrix product by several of the model's projections, stacked."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def load(
        self, tensors: Mapping[str, torch.Tensor], like: torch.Tensor, products: torch.dtype
    ) -> None:
        weight = torch.cat([tensors[f"{n}.weight"].to(like) for n in self.names])
        biases = [tensors[f"{n}.bias"].to(like) for n in self.names if f"{n}.bias" in tensors]
        assert len(biases) in (0, len(self.names))
        bias = torch.cat(biases).to(products) if biases else None
        weight = weight.to(products)
        self.apply: Callable[[torch.Tensor], torch.Tensor]
        if weight.device.type == "cpu":
            from elpo_fast.cpu.decoder import packed_product

            self.apply = packed_product(weight, bias)
        else:
            self.apply = partial(F.linear, weight=weight, bias=bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply(x)


def products_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In what to multiply for a decoder of `dtype`: float32 on CPUs that are faster in it."""
    widen = device.type == "cpu" and dtype == torch.bfloat16 and widens_bfloat16()
    return torch.float32 if widen else dtype


class _Layer:
    def __init__(self, prefix: str) -> None:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        self.qkv = _Linear(*(f"{attention}.{x}_proj" for x in "qkv"))
        self.out = _Linear(f"{attention}.o_proj")
        self.gate_up = _Linear(f"{mlp}.gate_proj", f"{mlp}.up_proj")
        self.down = _Linear(f"{mlp}.down_proj")
        self.linears = (self.qkv, self.out, self.gate_up, self.down)
        self.norms = {
            "before_attention": f"{prefix}.input_layernorm.weight",
            "before_mlp": f"{prefix}.post_attention_layernorm.weight",
            "query_norm": f"{attention}.q_norm.weight",
            "key_norm": f"{attention}.k_norm.weight",
        }
        self.norm: dict[str, torch.Tensor] = {}

    def load(
        self, tensors: Mapping[str, torch.Tensor], like: torch.Tensor, products: torch.dtype
    ) -> None:
        for linear in self.linears:
            linear.load(tensors, like, products)
        for role, name in self.norms.items():
            weight = tensors.get(name, torch.empty(0))
            self.norm[role] = weight.to(like.device, torch.float32, copy=True)


class Decoder:
    """Weights, key/value store and forward of one model.

    Raises `ValueError` for an architecture or a variant of one that it would compute wrongly.
    """

    def __init__(self, model: PreTrainedModel, slots: int, dtype: torch.dtype) -> None:
        config = model.config
        kind = type(model).__name__
        if kind not in SUPPORTED:
            raise ValueError(
                f"the local engine computes {', '.join(SUPPORTED)}, not {kind}; use one of these "
                "or another engine"
            )
        windows = set(getattr(config, "layer_types", None) or ["full_attention"])
        if windows != {"full_attention"} or config.hidden_act != "silu":
            raise ValueError(
                f"the local engine needs full attention and silu, but this {kind} has layer types "
                f"{sorted(windows)} and activation {config.hidden_act!r}"
            )
        rotary = model.model.rotary_emb
        if rotary.rope_type not in _STATIC_ROPE:
            raise ValueError(
                f"the local engine supports rotary embeddings {', '.join(_STATIC_ROPE)}, "
                f"not {rotary.rope_type!r}"
            )
        self.device, self.dtype, self.slots = model.device, dtype, slots
        self.products = products_dtype(model.device, dtype)
        self.context: int = min(slots, config.max_position_embeddings)
        self.vocab_size: int = config.vocab_size
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.width: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.eps: float = config.rms_norm_eps
        self._depth: int = config.num_hidden_layers
        angles = torch.outer(
            torch.arange(self.context, dtype=torch.float32),
            rotary.inv_freq.float().cpu(),
        )
        self.cos = (angles.cos() * rotary.attention_scaling).to(self.device)
        self.sin = (angles.sin() * rotary.attention_scaling).to(self.device)
        self._step: Callable[..., Any] = _TorchStep
        self._fused: Any = None
        if self.device.type == "cpu":
            from elpo_fast.cpu.decoder import FusedForward, Step
            from elpo_fast.cpu.decoder_products import multiplies

            self._step = Step
            self._fused = FusedForward(self) if multiplies(self.products) else None
        self.release()

    @cached_property
    def cache_views(self) -> list[tuple[np.ndarray, ...]]:
        """Keys and values of every layer, as arrays of numbers and again of heads; CPU only."""
        from elpo_fast.cpu.decoder import cache_views

        return cache_views(self)

    def release(self) -> None:
        """Have no memory for weights, keys and values, until `load`."""
        self.layers = [_Layer(f"model.layers.{i}") for i in range(self._depth)]
        self.head = _Linear("lm_head")
        self.embedding = self.keys = self.values = torch.empty(0)
        self.__dict__.pop("cache_views", None)
        if self._fused:
            self._fused.release()

    @torch.inference_mode()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy all weights; `tensors` maps the model's parameter names, `lm_head.weight` too. Makes
        room for keys and values where there is none."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        if not len(self.keys):
            shape = self._depth, self.slots, self.kv_heads, self.width
            self.keys, self.values = (like.new_empty(shape) for _ in range(2))
        self.embedding = tensors["model.embed_tokens.weight"].to(like, copy=True)
        if self._fused:
            self._fused.load(tensors)
            return
        for layer in self.layers:
            layer.load(tensors, like, self.products)
        self.norm = tensors["model.norm.weight"].to(self.device, torch.float32, copy=True)
        self.head.load(tensors, like, self.products)

    @torch.inference_mode()
    def forward(self, batch: NodeBatch, ends: np.ndarray) -> torch.Tensor:
        """Compute the batch's keys and values; logits `[F, V]` of the nodes `ends` `int64 [F]`."""
        if self._fused:
            logits: torch.Tensor = self._fused(batch, ends)
            return logits
        step = self._step(self, batch)
        residual = F.embedding(step.tokens, self.embedding).float()
        delta = torch.zeros_like(residual, dtype=self.products)
        for index, layer in enumerate(self.layers):
            hidden = step.add_norm(residual, delta, layer.norm["before_attention"])
            hidden = step.attend(layer.qkv(hidden), index)
            hidden = step.add_norm(residual, layer.out(hidden), layer.norm["before_mlp"])
            delta = layer.down(step.silu_mul(layer.gate_up(hidden)))
        chosen = torch.from_numpy(ends).to(self.device)
        logits = self.head(step.add_norm(residual[chosen], delta[chosen], self.norm))
        return logits[: len(chosen)]


class _TorchStep:
    """The operations between the products of one step, on any device."""

    def __init__(self, decoder: Decoder, batch: NodeBatch) -> None:
        self.decoder = decoder

        def move(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(decoder.device)

        self.tokens, self.slots = move(batch.tokens), move(batch.slots)
        positions = move(batch.positions)
        self.cos, self.sin = decoder.cos[positions], decoder.sin[positions]
        # Runs of several nodes go one by one, all single nodes as one padded batch.
        bounds = batch.segments
        self.runs = []
        single = bounds[:-1][np.diff(bounds) == 1]
        if len(single):
            lengths = batch.positions[single] + 1
            columns = np.arange(lengths.max())
            index = batch.first[single, None] + np.minimum(columns, lengths[:, None] - 1)
            nodes = move(single)
            self.runs.append((nodes, move(batch.table[index]), positions[nodes][:, None]))
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if stop - start > 1:
                first = batch.first[start]
                path = batch.table[first : first + batch.positions[stop - 1] + 1]
                self.runs.append(
                    (torch.arange(start, stop), move(path)[None], positions[None, start:stop])
                )

    def add_norm(
        self, residual: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        eps, dtype = self.decoder.eps, self.decoder.products
        return decoder_torch.add_norm(residual, delta, weight, eps, dtype)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return decoder_torch.silu_mul(gate_up)

    def attend(self, qkv: torch.Tensor, index: int) -> torch.Tensor:
        d = self.decoder
        norm = d.layers[index].norm
        heads = qkv.unflatten(-1, (-1, d.width)).float()
        query, key, value = heads.split((d.heads, d.kv_heads, d.kv_heads), 1)
        if norm["query_norm"].numel():
            query = F.rms_norm(query, (d.width,), norm["query_norm"], d.eps)
            key = F.rms_norm(key, (d.width,), norm["key_norm"], d.eps)
        query = decoder_torch.rotate(query, self.cos, self.sin).to(d.dtype)
        keys, values = d.keys[index], d.values[index]
        keys[self.slots] = decoder_torch.rotate(key, self.cos, self.sin).to(d.dtype)
        values[self.slots] = value.to(d.dtype)
        out = torch.empty(len(query), d.heads * d.width, dtype=d.products, device=d.device)
        for nodes, paths, positions in self.runs:
            batched = query[nodes].view(*positions.shape, d.heads, d.width)
            mean = decoder_torch.attend(batched, keys, values, paths, positions)
            out[nodes] = mean.flatten(0, 1).to(d.products)
        return out
