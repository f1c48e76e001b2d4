"""Two gloo ranks equal one process. As a program, this file is what torchrun starts for it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3Config, Qwen3ForCausalLM

from elpo_fast.config import ConfigError, parse_config
from elpo_fast.model.attention import ATTENTION
from elpo_fast.train.parallel import ALONE, Ranks, joined
from elpo_fast.train.step import NonFiniteError, PolicyOptimizer, micro_batches
from elpo_fast.tree.pack import PackedBatch, Scored
from elpo_fast.tree.store import Forest, Tree

VOCABULARY = 61
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, checkpointed": {"dtype": torch.bfloat16, "gradient_checkpointing": True},
    "three micro-batches": {"budget": 45},
    "one micro-batch": {"budget": 500},
    "untied head": {"tied": False},
}
MESHES = ["shard", "replicate"]


def forest() -> Forest:
    rng = np.random.default_rng(0)
    trees = []
    for lengths in [(3, 4), (2, 9, 5), (6,), (1, 30), (8, 8)]:
        tree = Tree(rng.integers(0, VOCABULARY, 5))
        for size in lengths:
            ids, logprobs = rng.integers(0, VOCABULARY, size), rng.normal(-4.1, 0.1, size)
            leaf = tree.add_step(0, ids, np.ones(size), logprobs, np.zeros(size), tool_call=False)
            tree.finish(leaf, reward=0.0, correct=False, end="answer")
        trees.append(tree)
    return Forest.from_trees(trees)


def batches(budget: int = 25) -> list[PackedBatch]:
    trees = forest()
    value = np.random.default_rng(1).normal(size=len(trees.parent))
    scored = Scored(
        *(value for _ in range(4)),
        pos=np.maximum(value, 0),
        neg=np.minimum(value, 0),
        eps_low=0.2 + 0 * value,
        eps_high=0.3,
    )
    return micro_batches(trees, scored, range(len(trees)), budget, scale=0.2)


def make_policy(ranks: Ranks, *, tied: bool = True, **options: Any) -> PolicyOptimizer:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = ATTENTION
    return PolicyOptimizer(Qwen3ForCausalLM(config), lr=1e-3, ranks=ranks, **options)


def weights(policy: PolicyOptimizer) -> dict[str, torch.Tensor]:
    named = policy.model.named_parameters()
    return {name: policy.ranks.whole(tensor).detach().clone() for name, tensor in named}


def three_updates(ranks: Ranks, *, budget: int = 25, **options: Any) -> dict[str, Any]:
    """Figures of a demonstration update and two of the policy against recomputed log-probs."""
    policy, work = make_policy(ranks, **options), batches(budget)
    stats = [policy.nll_update([replace(batch, neg_coef=0 * batch.neg_coef) for batch in work])]
    current = policy.logprobs(work)
    work = [replace(batch, old_logprob=old) for batch, old in zip(work, current, strict=True)]
    stats += [policy.update(work) for _ in range(2)]
    row = policy.score(np.arange(20))
    return {
        "stats": [astuple(replace(one, gap=np.sort(one.gap))) for one in stats],
        "logprobs": current,
        "row": row,
        "weights": weights(policy),
    }


def resumed(ranks: Ranks) -> dict[str, Any]:
    """An update of one process, and the next one on `ranks` from its weights and moments."""
    first, after = make_policy(ALONE), make_policy(ranks)
    first.update(batches())
    with torch.no_grad():
        pairs = zip(after.model.parameters(), first.model.parameters(), strict=True)
        for target, source in pairs:
            target.copy_(ranks.part(source, target))
    after.load_state_dict(copy.deepcopy(first.state_dict()))
    after.update(batches())
    state = after.state_dict()
    return {"weights": weights(after), "moments": state["optimizer"]["state"]}


def poisoned(ranks: Ranks) -> dict[str, Any]:
    """What every rank sees of an update with one NaN, which only one of them computes."""
    policy, work = make_policy(ranks), batches()
    policy.update(work)
    before = weights(policy)
    bad = [replace(batch, old_logprob=batch.old_logprob.copy()) for batch in work]
    bad[1].old_logprob[bad[1].agent == 1] = np.nan
    with pytest.raises(NonFiniteError) as raised:
        policy.update(bad)
    same = all(torch.equal(before[name], now) for name, now in weights(policy).items())
    policy.update(work)
    return {
        "errors": ranks.gather((str(raised.value), raised.value.trees)),
        "same": same,
        "weights": weights(policy),
    }


def main(out: str) -> None:
    """All of the above on two ranks and both meshes, into a file."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with joined(parse_config({"parallel": {"shard": 2}})) as ranks:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        for name, among in (("shard", ranks), ("replicate", replace(ranks, mesh=mesh))):
            for case, options in CASES.items():
                results[name, case] = three_updates(among, **options)
            results[name, "resumed"] = resumed(among)
            results[name, "poisoned"] = poisoned(among)
        if ranks.leads:
            torch.save(results, out)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*start, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    out = tmp_path_factory.mktemp("ranks") / "results.pt"
    done = torchrun(__file__, str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    loaded: dict[Any, Any] = torch.load(out, weights_only=False)
    return loaded


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process(results: dict[Any, Any], mesh: str, case: str) -> None:
    ours, alone = results[mesh, case], three_updates(ALONE, **CASES[case])
    for mine, expected in zip(ours["stats"], alone["stats"], strict=True):
        assert mine[:5] == pytest.approx(expected[:5], rel=1e-5)
        assert mine[5:-1] == pytest.approx(expected[5:-1], rel=1e-4, abs=1e-6)
        assert_close(mine[-1], expected[-1])
    assert_close(ours["logprobs"], alone["logprobs"])
    assert_close(ours["row"], alone["row"])
    assert_close(ours["weights"], alone["weights"])


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_go_on_from_the_moments_of_one_process(results: dict[Any, Any], mesh: str) -> None:
    assert_close(results[mesh, "resumed"], resumed(ALONE))


@pytest.mark.parametrize("mesh", MESHES)
def test_nan_on_one_rank_stops_all_with_parameters_untouched(
    results: dict[Any, Any], mesh: str
) -> None:
    ours, alone = results[mesh, "poisoned"], poisoned(ALONE)
    assert ours["errors"] == 2 * alone["errors"]
    assert ours["same"]
    assert_close(ours["weights"], alone["weights"])


def test_a_mesh_of_another_size_is_refused() -> None:
    config = parse_config({"parallel": {"replicate": 2, "shard": 4}})
    with (
        pytest.raises(ConfigError, match=r"replicate=2 times shard=4 is not .* processes, 1"),
        joined(config),
    ):
        pass


if __name__ == "__main__":
    main(sys.argv[1])
