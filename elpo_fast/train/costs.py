"""What the regions of a step have to compute and to move, in floating point operations and bytes.

The operations are those of the model: 2 a weight and token, 4 a head's dimension and attended pair,
twice as many again backward. What is computed twice to save memory counts once. The bytes are those
that have to be moved at least: weights once a pass of the decoder, keys and values once a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from elpo_fast.regions import COMPUTED, Total

DEFINED: Mapping[str, tuple[str, ...]] = {
    "tokens": ("prefill", "decode", "forward", "backward"),
    "flops": ("prefill", "decode", "forward", "loss", "backward"),
    "bytes": ("decode", "sampling", "optimizer", "weight_sync", "checkpoint"),
}
"""Of which regions something is counted."""

COPY = "bfloat16 copy"
_FLOAT = 4  # bytes
_MOMENTS = {"adamw": 2.0 * _FLOAT, "adamw8bit": 2 * (1 + _FLOAT / 256)}  # bytes of a weight


@dataclass(frozen=True, slots=True)
class Costs:
    """A model's sizes."""

    weights: int  # of the blocks and norms
    head_weights: int
    pair: int  # operations that one token's attending to another takes, in all layers
    cached: int  # numbers that are kept of a token: keys and values
    vocabulary: int
    trained: float  # weights, those of the head or embedding included
    share: float  # of the blocks' weights that are trained

    @staticmethod
    def of(model: PreTrainedModel) -> Costs:
        config = model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        embedding = model.get_input_embeddings().weight
        blocks = [p for p in model.base_model.parameters() if p is not embedding]
        weights = sum(p.numel() for p in blocks)
        return Costs(
            weights=weights,
            head_weights=model.get_output_embeddings().weight.numel(),
            pair=4 * layers * heads * dim,
            cached=2 * layers * config.num_key_value_heads * dim,
            vocabulary=config.vocab_size,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            share=sum(p.numel() for p in blocks if p.requires_grad) / weights,
        )

    def forward(self, tokens: float, pairs: float) -> float:
        """Operations of the blocks."""
        return 2.0 * self.weights * tokens + self.pair * pairs

    def head(self, rows: float) -> float:
        """Operations of the products of `rows` rows with the head."""
        return 2.0 * self.head_weights * rows

    def flops(self, name: str, total: Total) -> float:
        """Of what a region did; 0 where that is not said in operations."""
        blocks, head = self.forward(total.tokens, total.pairs), self.head(total.rows)
        match name:
            case "prefill" | "decode":
                return blocks + head
            case "forward":
                return blocks
            case "loss":
                return head
            case "backward":
                own = 2.0 * self.weights * self.share * total.tokens
                return self.forward(total.tokens, 2 * total.pairs) + own + head
        return 0.0

    def bytes(self, name: str, total: Total, engine: int) -> float:
        """That a region moves at least, with an engine of `engine` bytes a number; 0 where that is
        not known."""
        match name:
            case "decode":
                weights = self.weights + self.head_weights
                return engine * (total.passes * weights + total.pairs * self.cached)
            case "sampling":
                return _FLOAT * total.rows * self.vocabulary
            case "optimizer":  # weight, gradient and two moments there, all but the gradient back
                return 7.0 * _FLOAT * self.trained * total.passes
            case "weight_sync":
                return (_FLOAT + engine) * float(self.weights + self.head_weights) * total.passes
            case "checkpoint":  # copied: weights and two moments
                return 2.0 * 3 * _FLOAT * self.trained * total.passes
        return 0.0

    def held(self, optimizer: str, number: int, frozen: float = 0) -> dict[str, float]:
        """Bytes that training keeps of its weights, by what holds them; `number`: those of a number
        in which it computes, `frozen`: weights that are not trained."""
        found = {
            "float32 masters": _FLOAT * self.trained,
            "AdamW's moments": _MOMENTS[optimizer] * self.trained,
            "gradients": _FLOAT * self.trained,
            "frozen weights": number * frozen,
            COPY: number * self.trained if number != _FLOAT else 0,
        }
        return {name: float(size) for name, size in found.items() if size}

    def engine(self, number: int, weight: int, tokens: int) -> dict[str, float]:
        """Bytes of the local engine, whose embedding and head are two: `weight` those of one of its
        weights, `number` those of a number of the `tokens` in its cache."""
        weights = float(weight * (self.weights + 2 * self.head_weights))
        return {"engine's weights": weights, "cache": float(number * self.cached * tokens)}

    def trained_flops(self, totals: Mapping[str, Total]) -> float:
        """Operations of an update's regions."""
        return sum(self.flops(name, totals[name]) for name in COMPUTED if name in totals)
