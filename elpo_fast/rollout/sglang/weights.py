"""The weights that every server must hold, and the three ways to give them to one.

`disk`: a safetensors file in a folder that the server reads too. `tensor`: handles of tensors in
shared or GPU memory (CUDA IPC), for a server of the same machine. `distributed`: broadcasts in a
process group of the two. Each is the request sequence of SGLang 0.5.21, which answers success to
names it does not know: whoever updates compares log-probs afterwards.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.multiprocessing  # teaches ForkingPickler tensors
from safetensors.torch import save_file
from torch import distributed
from torch.distributed import distributed_c10d
from transformers import PreTrainedModel

from elpo_fast.rollout.sglang.server import SGLangServer
from elpo_fast.types import whole

Way = Literal["disk", "tensor", "distributed"]

_BUCKET_BYTES = 512 << 20
_GROUP_TIMEOUT = timedelta(minutes=5)


class ServedWeights:
    """The policy's weights in the servers' dtype: the trainer's own tensors, from which servers get
    them on their device, and a copy on the host.

    The trainer's own change while it trains; a server that is started again in the meantime must
    get those that the others have: that is what the copy is for.
    """

    def __init__(
        self, model: PreTrainedModel, dtype: torch.dtype, weights: Iterable[tuple[str, Any]]
    ) -> None:
        self.device, self._dtype = model.device, dtype
        self._tied = "lm_head.weight" if model.config.tie_word_embeddings else None
        given = dict(weights)
        self._tensors: dict[str, torch.Tensor] = {
            name: torch.empty(weight.shape, dtype=dtype, pin_memory=self.device.type == "cuda")
            for name, weight in given.items()
        }
        self._live: dict[str, torch.Tensor] = {}
        self._lock = threading.RLock()  # of the copy on the host
        self.take(given.items())
        self.keep()

    def take(self, named_tensors: Iterable[tuple[str, Any]]) -> None:
        """New values of all of them, which must not change before `keep`. Raises `ValueError`,
        changing nothing, for unknown, missing or wrongly shaped ones."""
        given = {name: tensor for name, tensor in named_tensors if name != self._tied}
        for problem, names in (
            ("unknown", given.keys() - self._tensors.keys()),
            ("missing", self._tensors.keys() - given.keys()),
        ):
            if names:
                raise ValueError(f"weight update with {problem} parameter {min(names)}")
        for name, held in self._tensors.items():
            if given[name].shape != held.shape:
                raise ValueError(
                    f"weight update gives {name} the shape {tuple(given[name].shape)}, "
                    f"the model has {tuple(held.shape)}"
                )
        self._live = given
        if any(hasattr(tensor, "full_tensor") for tensor in given.values()):
            self.keep()  # others put them together too, in the same order

    @torch.no_grad()
    def keep(self) -> None:
        """Copy to the host what was taken. Nobody waits for a GPU."""
        with self._lock:
            live, self._live = self._live, {}
            for name, held in self._tensors.items() if live else ():
                held.copy_(whole(live[name]), non_blocking=True)

    def _kept(self) -> Mapping[str, torch.Tensor]:
        """The copy on the host, when it is complete."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._tensors

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def save(self, folder: Path) -> None:
        """Write `model.safetensors`, at once or not at all: a server may be reading the old one."""
        temporary = folder / "model.safetensors.new"
        with self._lock:
            self.keep()
            save_file(dict(self._kept()), temporary, metadata={"format": "pt"})
            os.replace(temporary, folder / "model.safetensors")

    def buckets(self, limit: int = _BUCKET_BYTES) -> Iterator[Bucket]:
        """All tensors in turn, about `limit` bytes at a time, on the trainer's device: cast there,
        if the trainer's own are those that were taken, or else from the host."""
        with self._lock:
            source = self._live or self._kept()
        chosen: dict[str, torch.Tensor] = {}
        size = 0
        for name, held in self._tensors.items():
            if chosen and size + held.nbytes > limit:
                yield Bucket(chosen, self._dtype, self.device)
                chosen, size = {}, 0
            chosen[name] = source[name]
            size += held.nbytes
        yield Bucket(chosen, self._dtype, self.device)


class Bucket:
    """Some tensors in the servers' `dtype`, laid end to end as bytes."""

    @torch.no_grad()
    def __init__(
        self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype = dtype
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        sizes = [tensor.numel() for tensor in tensors.values()]
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        for part, tensor in zip(flat.split(sizes), tensors.values(), strict=True):
            part.view(tensor.shape).copy_(tensor, non_blocking=True)
        self.flat = flat.view(torch.uint8)

    def handles(self, ranks: int) -> list[str]:
        """What each of a server's ranks deserialises to these tensors while `flat` lives. The
        memory of a handle is free again when it was opened once and let go: one for each."""
        return [self._handle() for _ in range(ranks)]

    def _handle(self) -> str:
        """Where the memory is, and which bytes are whose. Buffers, devices and names alone; no
        class of SGLang is needed."""
        metadata, start = [], 0
        for name, shape in self.shapes.items():
            stop = start + shape.numel() * self.dtype.itemsize
            metadata.append(
                SimpleNamespace(
                    name=name,
                    shape=tuple(shape),
                    dtype=self.dtype,
                    start_idx=start,
                    end_idx=stop,
                    numel=stop - start,
                )
            )
            start = stop
        buffer = io.BytesIO()
        strategy = torch.multiprocessing.get_sharing_strategy()
        # The server is no child of ours and cannot inherit file descriptors.
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            ForkingPickler(buffer).dump({"flattened_tensor": self.flat, "metadata": metadata})
        finally:
            torch.multiprocessing.set_sharing_strategy(strategy)
        return base64.b64encode(buffer.getvalue()).decode()


async def sync_disk(server: SGLangServer, folder: Path, version: int) -> None:
    """The server reads `folder/model.safetensors`."""
    await server.control(
        "/update_weights_from_disk", model_path=str(folder), weight_version=str(version)
    )


async def sync_tensors(server: SGLangServer, weights: ServedWeights, version: int) -> None:
    """The server maps the memory of one bucket after another. On a GPU both processes must see the
    same devices, and ranks on other ones read it over NVLink or PCIe. Tested on a CPU, where memory
    is shared through files."""
    await server.control("/begin_weight_update")
    for bucket in weights.buckets():
        await server.control(
            "/update_weights_from_tensor",
            serialized_named_tensors=bucket.handles(server.tp_size),
            load_format="flattened_bucket",
            weight_version=str(version),
        )
    await server.control("/end_weight_update")


class Broadcasts:
    """`distributed`: a process group of the trainer (rank 0) and one server's ranks.

    NCCL on a GPU, gloo elsewhere; only gloo is tested.
    """

    def __init__(self) -> None:
        self._group: distributed.ProcessGroup | None = None

    async def sync(self, server: SGLangServer, weights: ServedWeights, version: int) -> None:
        if self._group is None:
            await self._join(server, weights.device)
        await server.control("/begin_weight_update")
        for bucket in weights.buckets():
            await asyncio.gather(
                server.control(
                    "/update_weights_from_distributed",
                    names=list(bucket.shapes),
                    dtypes=[str(bucket.dtype).removeprefix("torch.")] * len(bucket.shapes),
                    shapes=[list(shape) for shape in bucket.shapes.values()],
                    group_name=self._name,
                    load_format="flattened_bucket",
                    weight_version=str(version),
                ),
                asyncio.to_thread(distributed.broadcast, bucket.flat, 0, group=self._group),
            )
        await server.control("/end_weight_update")

    async def _join(self, server: SGLangServer, device: torch.device) -> None:
        host = socket.gethostbyname(socket.gethostname())
        # Rank 0 keeps the store, so the port is bound before anyone is told of it.
        store = distributed.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=_GROUP_TIMEOUT
        )
        size = 1 + server.tp_size
        self._name = f"elpo-{store.port}"
        backend = "nccl" if device.type == "cuda" else "gloo"
        _, self._group = await asyncio.gather(
            server.control(
                "/init_weights_update_group",
                master_address=host,
                master_port=store.port,
                rank_offset=1,
                world_size=size,
                group_name=self._name,
                backend=backend,
            ),
            asyncio.to_thread(_make_group, store, size, self._name, backend),
        )


def _make_group(
    store: distributed.Store, size: int, name: str, backend: str
) -> distributed.ProcessGroup:
    """Rank 0 of a group beside the default one, if there is any. PyTorch has no public way to make
    one with strangers; this is what SGLang does on its side."""
    group, _ = distributed_c10d._new_process_group_helper(
        size,
        0,
        [],
        distributed.Backend(backend),
        distributed.PrefixStore(name, store),
        group_name=distributed_c10d.GroupName(name),
        timeout=_GROUP_TIMEOUT,
    )
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
