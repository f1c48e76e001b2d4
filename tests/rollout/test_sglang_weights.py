"""What servers are given, without a server: buckets, handles, and where SGLang is found."""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from elpo_fast.config import ConfigError
from elpo_fast.rollout.sglang import process
from elpo_fast.rollout.sglang.process import ServerProcess, find_python
from elpo_fast.rollout.sglang.weights import Bucket, ServedWeights, sync_tensors


def arrived(weights: ServedWeights, limit: int = 30_000) -> dict[str, torch.Tensor]:
    """What a server makes of the buckets."""
    found = {}
    for bucket in weights.buckets(limit):
        (handle,) = bucket.handles(1)
        given = pickle.loads(base64.b64decode(handle))
        for part in given["metadata"]:
            assert part.numel == part.end_idx - part.start_idx
            flat = given["flattened_tensor"][part.start_idx : part.end_idx]
            found[part.name] = flat.view(part.dtype).view(part.shape).clone()
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(value, expected[name].to(torch.bfloat16)) for name, value in found.items()
    )


def test_servers_get_what_was_taken_and_later_what_was_kept_of_it(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = ServedWeights(model, torch.bfloat16, first.items())
    assert same(arrived(weights), first)
    second = {name: tensor + 1 for name, tensor in first.items()}
    weights.take(second.items())
    for tensor in second.values():  # from the trainer's own tensors, not from a copy of them
        tensor.add_(1)
    assert same(arrived(weights), second)
    weights.keep()
    kept = {name: tensor.clone() for name, tensor in second.items()}
    for tensor in second.values():
        tensor.zero_()
    assert same(arrived(weights), kept)
    weights.save(tmp_path)
    assert same(load_file(tmp_path / "model.safetensors"), kept)


def test_weights_that_are_put_together_are_so_once_and_at_once(model: PreTrainedModel) -> None:
    class Merged:
        asked = 0

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor, self.shape = tensor, tensor.shape

        def full_tensor(self) -> torch.Tensor:
            Merged.asked += 1
            return self.tensor

    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = ServedWeights(model, torch.bfloat16, own.items())
    new = {name: tensor - 1 for name, tensor in own.items()}
    name = next(iter(new))
    weights.take({**new, name: Merged(new[name])}.items())
    assert Merged.asked == 1
    assert same(arrived(weights), new)
    weights.keep()
    assert same(arrived(weights), new)
    assert Merged.asked == 1


def test_every_rank_of_a_server_gets_a_handle_of_its_own(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    class Server:
        tp_size = 2

        async def control(self, path: str, **body: Any) -> None:
            if path == "/update_weights_from_tensor":
                sent.append(body["serialized_named_tensors"])

    made = iter(range(100))
    monkeypatch.setattr(Bucket, "_handle", lambda _: str(next(made)))
    weights = ServedWeights(model, torch.float32, model.named_parameters())
    asyncio.run(sync_tensors(Server(), weights, 1))  # type: ignore[arg-type]
    assert sent == [["0", "1"]]


def test_sglang_on_the_path_is_found_and_in_the_working_directory_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "named" / "sglang").mkdir(parents=True)
    (tmp_path / "named" / "sglang" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / "named")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ConfigError, match="no package sglang"):
        find_python(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "named")
    assert find_python(sys.executable) == sys.executable


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_server_has_our_path_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["named", "", "/other"]))
    server = ServerProcess("python", tmp_path, tmp_path / "log", {}, on_cpu=on_cpu)
    folders = server._environment["PYTHONPATH"].split(os.pathsep)
    ours = [str(Path(process.__file__).parent / "cpu")] if on_cpu else []
    assert folders == [*ours, str(tmp_path / "named"), "/other"]
