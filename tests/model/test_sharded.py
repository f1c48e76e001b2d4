"""Models without weights, and weights read in part; `train/test_parallel` has them on ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3Config, Qwen3ForCausalLM

from elpo_fast.model.sharded import StoredWeights, empty_model, fill, holds, put
from elpo_fast.train.parallel import Sharded


@pytest.fixture(params=["1GB", "10KB"], ids=["one file", "several files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.max_length = 77
    model.save_pretrained(tmp_path, max_shard_size=request.param)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (request.param == "10KB")
    return tmp_path


def test_a_model_without_weights_has_all_the_rest(folder: Path) -> None:
    expected, empty = Qwen3ForCausalLM.from_pretrained(folder), empty_model(folder)
    assert all(parameter.is_meta for parameter in empty.parameters())
    names = dict(expected.named_parameters())
    assert dict(empty.named_parameters()).keys() == names.keys()  # the tied head among them
    buffers = dict(empty.named_buffers())
    assert buffers
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer)
    assert empty.generation_config.max_length == 77
    assert not any(p.is_meta for p in Qwen3ForCausalLM(expected.config).parameters())


def test_rows_are_those_of_the_whole_tensor(folder: Path) -> None:
    stored = StoredWeights(folder)
    assert holds(stored, empty_model(folder))
    for name, parameter in Qwen3ForCausalLM.from_pretrained(folder).named_parameters():
        assert torch.equal(stored.rows(name, slice(3, 7)), parameter[3:7])
        target = torch.nn.Parameter(torch.zeros(parameter.shape))
        put(target, lambda rows, name=name: stored.rows(name, rows))
        assert torch.equal(target, parameter)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_process_reads_and_holds_its_rows_alone(
    folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, rows = [], StoredWeights.rows

    def record(self: StoredWeights, name: str, chosen: slice) -> torch.Tensor:
        read.append(rows(self, name, chosen))
        return read[-1]

    monkeypatch.setattr(StoredWeights, "rows", record)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
    try:
        mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("shard",))
        model = empty_model(folder)
        fill(model, Sharded(model, mesh, torch.float32), torch.device("cpu"), StoredWeights(folder))
        held = {name: parameter.to_local() for name, parameter in model.named_parameters()}
        buffers = dict(model.named_buffers())
    finally:
        dist.destroy_process_group()
    whole = Qwen3ForCausalLM.from_pretrained(folder)
    assert held.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        parts = parameter.detach().chunk(3)
        expected = parts[rank] if rank < len(parts) else parameter[:0]
        assert torch.equal(held[name], expected)
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer)
    size = sum(parameter.numel() for parameter in whole.parameters())
    assert sum(tensor.numel() for tensor in read) < 0.36 * size
    assert sum(tensor.untyped_storage().nbytes() for tensor in held.values()) < 0.36 * 4 * size


def test_files_of_other_names_or_shapes_do_not_hold_a_model(folder: Path) -> None:
    model = empty_model(folder)
    assert not holds(StoredWeights(folder / "nowhere"), model)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = max(tensors)
    save_file(tensors | {name: tensors[name][:-1].clone()}, file)
    assert not holds(StoredWeights(folder), model)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    assert not holds(StoredWeights(folder), model)
