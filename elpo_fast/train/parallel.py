"""Training on several processes: every rank runs the same program on the same values.

`torchrun ... elpo train` starts `parallel.replicate` x `parallel.shard` of them. Work is shared in
three places and its results are gathered at once, so that all other code is the same on any number
of ranks: the collector's tasks (`SharedCollector`), the micro-batches of an update (`Ranks.share`)
and the parameters with their moments (`Sharded`). Trees travel whole: they are small beside the
weights, and then any rank may train on any part of them.

Invariants
- The gradient is the sum over all micro-batches, whoever computed them; FSDP's mean is undone.
- Every rank makes the same collective calls in the same order: those with fewer micro-batches pass
  empty ones. What decides the order is known to all ranks before.
- A single process has no process group and runs none of this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from elpo_fast.algo.planners import Planner
from elpo_fast.config import Config, ConfigError
from elpo_fast.model.load import resolve_device
from elpo_fast.rollout.collector import Collector
from elpo_fast.tree.pack import balance
from elpo_fast.tree.store import Tree
from elpo_fast.types import Task, whole

_TIMEOUT = timedelta(hours=6)
"""Ranks wait for the slowest one's rollouts; torchrun notices the dead."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this is. `mesh`: [replicate, shard], or [shard]."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    # Apart, because trees are collected and checkpoints are written while others train.
    rollouts: dist.ProcessGroup | None = None
    checkpoints: dist.ProcessGroup | None = None

    def shard(self, dtype: torch.dtype) -> Callable[[PreTrainedModel], Sharded] | None:
        """How a model is spread over these ranks, to compute in `dtype`; `None`: not at all."""
        mesh = self.mesh
        return None if mesh is None else lambda model: Sharded(model, mesh, dtype)

    @property
    def leads(self) -> bool:
        """Whether this rank writes the run folder and talks to people."""
        return self.rank == 0

    def engine_of(self, config: Config) -> Config:
        """The configuration of this rank's engine: with its part of the servers."""
        if self.size == 1:
            return config
        sglang = config.rollout.sglang
        mine = sglang.model_copy(update={"urls": sglang.urls[self.rank :: self.size]})
        rollout = config.rollout.model_copy(update={"sglang": mine})
        return config.model_copy(update={"rollout": rollout})

    def gather(self, value: _T, group: dist.ProcessGroup | None = None) -> list[_T]:
        """Every rank's `value`, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def share(self, costs: Sequence[float]) -> tuple[list[int], int]:
        """Indices of the work that is this rank's, in order, and how many more the rank with most
        has. Costs are about even: the number of parts is, too, then."""
        shares = balance(costs, self.size)
        return sorted(shares[self.rank]), max(map(len, shares)) - len(shares[self.rank])

    def whole(self, weight: Any) -> torch.Tensor:
        """A named weight (see `Engine`) in main memory of the leading rank, in at least float32;
        others get an empty one, but have to ask for it as well."""
        full: torch.Tensor = whole(weight).detach()
        if not self.leads:
            return full.new_empty(0)
        return full.to("cpu", torch.promote_types(full.dtype, torch.float32))


ALONE = Ranks()


@contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """The processes that torchrun started, or `ALONE`.

    Raises `ConfigError` where the mesh does not fit their number, or a part cannot be shared.
    """
    size, wanted = int(os.environ.get("WORLD_SIZE", 1)), config.parallel
    if wanted.replicate * wanted.shard != size:
        raise ConfigError(
            f"parallel: replicate={wanted.replicate} times shard={wanted.shard} is not the number "
            f"of processes, {size}; set them, or start as many with torchrun --nproc-per-node"
        )
    if size == 1:
        yield ALONE
        return
    urls = config.rollout.sglang.urls
    if config.rollout.engine == "sglang" and 0 < len(urls) < size:
        raise ConfigError(
            f"rollout.sglang.urls: {len(urls)} servers are too few for {size} processes, each of "
            "which gives its weights to servers of its own; name as many, or none to start them"
        )
    kind = resolve_device(config.model.device).type
    if config.model.device not in ("auto", kind):
        raise ConfigError(
            f"model.device: {config.model.device!r} is one device for {size} processes; use auto"
        )
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} of this machine is taken by another process; "
            "give torchrun another one by --master-port, or --standalone"
        ) from error
    try:
        names, shape = ("replicate", "shard"), (wanted.replicate, wanted.shard)
        first = 0 if wanted.replicate > 1 else 1
        mesh = init_device_mesh(kind, shape[first:], mesh_dim_names=names[first:])
        apart = (dist.new_group(backend="gloo", timeout=_TIMEOUT) for _ in range(2))
        yield Ranks(dist.get_rank(), size, mesh, *apart)
    finally:
        dist.destroy_process_group()


def threads(ranks: Ranks) -> ThreadPoolExecutor | None:
    """Worker threads that use this rank's GPU; `None`: the default ones do."""
    options = on_own_gpu(ranks)
    return ThreadPoolExecutor(**options) if options else None


def on_own_gpu(ranks: Ranks) -> dict[str, Any]:
    """Options of a `ThreadPoolExecutor` whose threads use this rank's GPU; new ones use the first,
    and a rank that touches it takes hundreds of MiB there."""
    if ranks.mesh is None or ranks.mesh.device_type != "cuda":
        return {}
    return {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)}


class Sharded(nn.Module):
    """A model whose parameters are spread over the ranks; whole while `forward` computes.

    FSDP gathers parameters in the forward of the root, and the loss needs the head's: so whatever
    uses the model is called from there.
    """

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
        """Shard `model` in place: decoder blocks and final norm compute in `dtype`.

        Embedding and head are gathered in float32, unless they are frozen: a token's embedding
        gradient sums over all its occurrences. Gradients are summed over the ranks in float32.
        """
        super().__init__()
        self.model = model
        embedding = model.get_input_embeddings()
        for child in model.base_model.children():
            for part in child if isinstance(child, nn.ModuleList) else [child]:
                if part is not embedding and any(True for _ in part.parameters()):
                    _fully_shard(part, mesh, dtype)
        trained = embedding.weight.requires_grad
        _fully_shard(self, mesh, torch.float32 if trained else dtype)

    def forward(self, call: Callable[[], _T]) -> _T:
        return call()

    def __call__(self, call: Callable[[], _T]) -> _T:
        """`call()` with whole parameters; a backward through its result, if any, must follow."""
        result: _T = super().__call__(call)
        if not torch.is_grad_enabled():
            assert isinstance(self, FSDPModule)  # which `fully_shard` has made of it
            self.reshard()  # no backward will
        return result


def _fully_shard(module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


class SharedCollector(Collector):
    """A collector that works on its rank's part of the tasks and returns the trees of all."""

    def __init__(self, ranks: Ranks, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self._ranks = ranks

    async def collect(
        self,
        tasks: Sequence[Task],
        make_planner: Callable[[], Planner],
        *,
        on_tree: Callable[[Tree], None] | None = None,
        **options: Any,
    ) -> list[Tree]:
        mine = await super().collect(self._mine(tasks), make_planner, on_tree=on_tree, **options)
        trees = self._everyones(mine, len(tasks))
        for index, tree in enumerate(trees):
            if on_tree and index % self._ranks.size != self._ranks.rank:
                on_tree(tree)
        return trees

    async def demonstrations(self, tasks: Sequence[Task]) -> list[Tree | None]:
        return self._everyones(await super().demonstrations(self._mine(tasks)), len(tasks))

    def _mine(self, tasks: Sequence[Task]) -> Sequence[Task]:
        return tasks[self._ranks.rank :: self._ranks.size]

    def _everyones(self, mine: list[_T], count: int) -> list[_T]:
        gathered = self._ranks.gather(mine, self._ranks.rollouts)
        return [gathered[i % self._ranks.size][i // self._ranks.size] for i in range(count)]
