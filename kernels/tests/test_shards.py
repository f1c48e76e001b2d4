"""A vocabulary-sharded head on two processes gives what the whole head gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from elpo_kernels import LoRA, linear_logprob, linear_policy_loss, policy_loss
from elpo_kernels.linear import cpu
from kernel_cases import error, make_case, true_policy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

CUT = 130  # of 307: uneven


def run(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        for check in (plain_shards, sharded_lora, dtensors, unlike_processors):
            check(rank)
    finally:
        dist.destroy_process_group()


def plain_shards(rank: int) -> None:
    rows = slice(0, CUT) if rank == 0 else slice(CUT, 307)
    group = dist.group.WORLD
    for options in ({}, {"bias": True, "temperature": 0.8}, {"softcap": 6.0}, {"spread": 60.0}):
        case = make_case(dtype=torch.float64, **options)
        for entropy_coef in (0.0, 0.1):
            exact, loss, logprob = true_policy(case, entropy_coef)
            mine = case.leaves()
            local = dict(mine.options)
            if "bias" in local:
                local["bias"] = mine.options["bias"].detach()[rows].requires_grad_()
            mine = replace(mine, weight=mine.weight.detach()[rows].requires_grad_(), options=local)
            where: dict[str, Any] = {"vocab_group": group, "vocab_start": rows.start}
            for fused in (True, False):
                mine.hidden.grad = mine.weight.grad = None
                if fused:
                    out = linear_policy_loss(
                        *mine.linear, *case.policy, entropy_coef=entropy_coef, **local, **where
                    )
                else:
                    found, entropy = linear_logprob(
                        *mine.linear, return_entropy=True, **local, **where
                    )
                    out = policy_loss(
                        found, *case.policy, entropy=entropy, entropy_coef=entropy_coef
                    )
                    assert error(found.detach(), logprob) <= 1e-11
                out.loss.backward()
                assert error(out.loss.detach(), loss) <= 1e-10
                assert error(mine.hidden.grad, exact.hidden.grad) <= 1e-10
                assert error(mine.weight.grad, exact.weight.grad[rows]) <= 1e-10


def sharded_lora(rank: int) -> None:
    rows = slice(0, CUT) if rank == 0 else slice(CUT, 307)
    case = make_case(dtype=torch.float64)
    a, b = torch.randn(2, 24).double(), torch.randn(307, 2).double()
    dist.broadcast(a, 0)
    dist.broadcast(b, 0)
    whole = replace(case, weight=case.weight + 0.5 * b @ a)
    exact, loss, _ = true_policy(replace(whole, old_logprob=case.old_logprob))
    leaves = case.leaves()
    factor = b[rows].clone().requires_grad_()
    out = linear_policy_loss(
        leaves.hidden, case.weight[rows], case.targets, *case.policy,
        lora=LoRA(a, factor, 0.5), vocab_group=dist.group.WORLD, vocab_start=rows.start,
    )  # fmt: skip
    out.loss.backward()
    assert error(out.loss.detach(), loss) <= 1e-10
    assert error(leaves.hidden.grad, exact.hidden.grad) <= 1e-10
    assert error(factor.grad, 0.5 * exact.weight.grad[rows] @ a.t()) <= 1e-10


def dtensors(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    case = make_case(dtype=torch.float64)
    exact, loss, _ = true_policy(case)
    for placement in (Shard(0), Replicate()):
        weight = distribute_tensor(case.weight, mesh, [placement]).requires_grad_()
        hidden = distribute_tensor(case.hidden, mesh, [Replicate()]).requires_grad_()
        out = linear_policy_loss(hidden, weight, case.targets, *case.policy)
        out.loss.backward()
        assert error(out.loss.detach(), loss) <= 1e-11
        assert isinstance(weight.grad, DTensor) and weight.grad.placements == (placement,)
        assert error(weight.grad.full_tensor(), exact.weight.grad) <= 1e-11
        assert error(hidden.grad.full_tensor(), exact.hidden.grad) <= 1e-11
    columns = distribute_tensor(case.weight, mesh, [Shard(1)])
    replicated = distribute_tensor(case.hidden, mesh, [Replicate()])
    tokens = distribute_tensor(case.hidden, mesh, [Shard(0)])
    for hidden, weight, message in (
        (case.hidden, columns, "both be DTensors"),
        (replicated, columns, "redistribute it to"),
        (tokens, columns, "hidden replicated"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_policy_loss(hidden, weight, case.targets, *case.policy)


def unlike_processors(rank: int) -> None:
    """Of which one alone would multiply bfloat16 in float32: both do, or their anchors differ."""
    rows = slice(0, CUT) if rank == 0 else slice(CUT, 307)
    chosen = cpu.widens_bfloat16
    cpu.widens_bfloat16 = lambda: rank == 0
    for spread in (3.0, 60.0):
        case = make_case(dtype=torch.bfloat16, spread=spread)
        exact, _, logprob = true_policy(case)
        leaves = case.leaves()
        mine = leaves.weight.detach()[rows].requires_grad_()
        out = linear_policy_loss(
            leaves.hidden, mine, case.targets, *case.policy, logprob_for_all=True,
            vocab_group=dist.group.WORLD, vocab_start=rows.start,
        )  # fmt: skip
        out.loss.backward()
        assert error(out.logprob, logprob) <= 1e-5
        assert error(leaves.hidden.grad, exact.hidden.grad) <= 5e-3
        assert error(mine.grad, exact.weight.grad[rows]) <= 5e-3
    cpu.widens_bfloat16 = chosen


def test_two_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_shards

    # A file, not a port: one found free may be taken by another test by the time it is used.
    meeting = (tmp_path / "meeting").as_uri()
    mp.start_processes(test_shards.run, (meeting,), nprocs=2, start_method="spawn")
