"""Two gloo ranks equal one process. As a program, this file is what torchrun starts for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from elpo_fast import cli
from elpo_fast.config import ConfigError, LoraConfig, dump_config, parse_config
from elpo_fast.model.attention import ATTENTION
from elpo_fast.model.load import load_model
from elpo_fast.model.lora import add_adapters, initialise, named_weights
from elpo_fast.model.tokenizer import train_tokenizer
from elpo_fast.tasks import ledger
from elpo_fast.train import loop
from elpo_fast.train.checkpoint import Checkpoints, TrainState, checkpoint_of, load_checkpoint
from elpo_fast.train.export import export_adapters, export_model, export_run
from elpo_fast.train.parallel import ALONE, Ranks, joined
from elpo_fast.train.step import WEIGHTS, NonFiniteError, PolicyOptimizer
from elpo_fast.train.summary import read_metrics
from elpo_fast.tree.pack import PackedBatch, Scored, micro_batches
from elpo_fast.tree.store import Forest, Tree

VOCABULARY = 61
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, checkpointed": {"dtype": torch.bfloat16, "gradient_checkpointing": True},
    "three micro-batches": {"budget": 45},
    "one micro-batch": {"budget": 500},
    "siblings and tasks that begin alike": {"alphabet": 2},
    "untied head": {"tied": False},
    "adapters": {"tied": False, "lora": ["q_proj", "down_proj", "lm_head"]},
    "adapters, bf16": {"lora": "all-linear", "dtype": torch.bfloat16},
    "bf16, selective": {"dtype": torch.bfloat16, "gradient_checkpointing": "selective"},
    "compiled, checkpointed": {"compiled": True, "gradient_checkpointing": True},
}
EIGHT_BITS = {"optimizer": "adamw8bit", "width": 256}  # small shards are not quantised
MESHES = ["shard", "replicate"]


def forest(alphabet: int) -> Forest:
    rng = np.random.default_rng(0)
    trees = []
    for lengths in [(3, 4), (2, 9, 5), (6,), (1, 30), (8, 8)]:
        tree = Tree(rng.integers(0, VOCABULARY, 5) % alphabet)
        for size in lengths:
            ids, logprobs = rng.integers(0, VOCABULARY, size), rng.normal(-4.1, 0.1, size)
            ids %= alphabet
            leaf = tree.add_step(0, ids, np.ones(size), logprobs, np.zeros(size), tool_call=False)
            tree.finish(leaf, reward=0.0, correct=False, end="answer")
        trees.append(tree)
    return Forest.from_trees(trees)


def batches(budget: int = 25, alphabet: int = VOCABULARY) -> list[PackedBatch]:
    trees = forest(alphabet)
    value = np.random.default_rng(1).normal(size=len(trees.parent))
    scored = Scored(
        *(value for _ in range(4)),
        pos=np.maximum(value, 0),
        neg=np.minimum(value, 0),
        eps_low=0.2 + 0 * value,
        eps_high=0.3,
    )
    return micro_batches(trees, scored, range(len(trees)), budget, scale=0.2)


def make_policy(
    ranks: Ranks,
    *,
    tied: bool = True,
    lora: str | list[str] | None = None,
    width: int = 32,
    **options: Any,
) -> PolicyOptimizer:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = ATTENTION
    model = Qwen3ForCausalLM(config)
    if lora is not None:
        model = model.to(options.get("dtype", torch.float32))
        add_adapters(model, LoraConfig(rank=2, targets=lora))
        initialise(model, seed=0)
    policy = PolicyOptimizer(model, lr=1e-3, ranks=ranks, **options)
    # AdamW moves a weight by `lr` in the direction of its gradient, however small that is: where
    # rounding decides the direction, by twice `lr` at worst. With an epsilon as large as `lr` two
    # updates differ by no more than their gradients do.
    for group in policy._optimizer.param_groups:
        group["eps"] = 1e-3
    return policy


def weights(policy: PolicyOptimizer) -> dict[str, torch.Tensor]:
    """As engines are given them, merged where there are adapters."""
    given = named_weights(policy.model)
    return {name: whole(weight).detach().clone() for name, weight in given}


def whole(weight: Any) -> torch.Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def three_updates(
    ranks: Ranks, *, budget: int = 25, alphabet: int = VOCABULARY, **options: Any
) -> dict[str, Any]:
    """Figures of a demonstration update and two of the policy against recomputed log-probs."""
    policy, work = make_policy(ranks, **options), batches(budget, alphabet)
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


def saved(policy: PolicyOptimizer, ranks: Ranks, run: Path) -> Path:
    with closing(Checkpoints(run, keep=1, ranks=ranks)) as checkpoints:
        checkpoints.save(TrainState(1, weight_version=1, data_position=0), policy)
    return checkpoint_of(run)


def resumed(ranks: Ranks, run: Path, **options: Any) -> dict[str, Any]:
    """An update of one process, the next one on `ranks` from its checkpoint; then of that into
    `run`."""
    after = make_policy(ranks, **options)
    load_checkpoint(run / "first" / "checkpoints" / "step-00000001", after, ranks)
    after.update(batches())
    path = saved(after, ranks, run)
    if ranks.size > 1:
        # Every rank wrote its own half, or as much of it as the others' copies leave to write.
        parts = [file.stat().st_size for file in (path / "state").glob("__*.distcp")]
        assert len(parts) == 2 and max(parts) < 0.7 * sum(parts)
    kinds = {type(local(m["exp_avg"])).__name__ for m in after._optimizer.state.values()}
    return {"state": whole_state(after), "kinds": kinds}


def whole_state(policy: PolicyOptimizer) -> dict[str, torch.Tensor]:
    """Weights and moments."""
    return {name: whole(value).clone() for name, value in policy.state_dict().items()}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first(run: Path, **options: Any) -> None:
    policy = make_policy(ALONE, **options)
    policy.update(batches())
    saved(policy, ALONE, run / "first")


def poisoned(ranks: Ranks) -> dict[str, Any]:
    """What every rank sees of an update with one NaN, which only one of them computes, and the
    gradients that the optimizer was given in the whole course."""
    policy, work = make_policy(ranks), batches()
    given: list[dict[str, torch.Tensor]] = []

    def record(*_: Any) -> None:
        given.append({name: whole(weight.grad).clone() for name, weight in policy.trained()})

    policy._optimizer.register_step_pre_hook(record)
    policy.update(work)
    before = whole_state(policy)
    bad = [replace(batch, old_logprob=batch.old_logprob.copy()) for batch in work]
    bad[1].old_logprob[bad[1].agent == 1] = np.nan
    with pytest.raises(NonFiniteError) as raised:
        policy.update(bad)
    same = all(torch.equal(before[name], now) for name, now in whole_state(policy).items())
    policy.update(work)
    return {
        "errors": ranks.gather((str(raised.value), raised.value.trees)),
        "same": same,
        "gradients": given,
    }


def verdicts_by_length() -> None:
    """An untrained model never succeeds; verdicts by the answer's length give it gradients."""

    async def grade(self: Any, task: Any, messages: Any, end: Any) -> Any:
        return self.options.verdict(len(messages[-1]["content"]) % 2 == 0, end.value)

    async def no_cold_start(*_: Any, **__: Any) -> None:
        pass  # demonstrations would be judged wrong

    ledger.Ledger.grade, loop.cold_start = grade, no_cold_start  # type: ignore[assignment]


def loaded(ranks: Ranks, folder: Path, lora: bool) -> dict[str, torch.Tensor]:
    """Weights of a folder as every rank has loaded its part of them, and what they compute."""
    model = {"name": str(folder), "lora": {"rank": 2, "targets": ["up_proj"]} if lora else None}
    config = parse_config({"model": {**model, "dtype": "float32", "device": "cpu"}})
    found = load_model(config.model, seed=3, shard=ranks.shard(torch.float32))
    policy = PolicyOptimizer(found.model, lr=1e-3, ranks=ranks, root=found.root)
    return weights(policy) | {"row": torch.from_numpy(policy.score(np.arange(20)))}


def adapted_run(ranks: Ranks, folder: Path, run: Path) -> None:
    """A run folder with the checkpoint of a model with adapters, and what the run would export."""
    model = {"name": str(folder), "device": "cpu", "dtype": "bfloat16", "lora": {"rank": 2}}
    config = parse_config({"run": {"dir": str(run.parent), "name": run.name}, "model": model})
    found = load_model(config.model, seed=0, shard=ranks.shard(torch.bfloat16))
    policy = PolicyOptimizer(
        found.model, lr=0.1, dtype=torch.bfloat16, ranks=ranks, root=found.root
    )
    policy.update(batches())
    saved(policy, ranks, run)
    export_model(run / "model", found.model, found.tokenizer, ranks)
    export_adapters(run / "adapters", found.model, found.tokenizer, ranks)
    if ranks.leads:
        (run / "config.yaml").write_text(dump_config(config))
        found.tokenizer.save_pretrained(run / "tokenizer")


def fault(ranks: Ranks, used: Path) -> str:
    """What a rank says of a run folder that has something in it."""
    used.mkdir(exist_ok=True)
    (used / "something").touch()
    config = parse_config({"run": {"dir": str(used.parent), "name": used.name}})
    with pytest.raises(ConfigError) as raised:
        loop._folder(config, False, False, ranks)
    return str(raised.value)


def compare(out: str, folder: str) -> None:
    """Everything above on two ranks and both meshes, into a file."""
    results: dict[str, Any] = {}
    with joined(parse_config({"parallel": {"shard": 2}})) as ranks:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        for name, among in (("shard", ranks), ("replicate", replace(ranks, mesh=mesh))):
            for case, options in CASES.items():
                results[name, case] = three_updates(among, **options)
            run = Path(out).parent / name
            results[name, "resumed"] = resumed(among, run / "adamw")
            results[name, "8 bits"] = resumed(among, run / "adamw8bit", **EIGHT_BITS)
            results[name, "poisoned"] = poisoned(among)
            results[name, "loaded"] = [loaded(among, Path(folder), lora) for lora in (False, True)]
            adapted_run(among, Path(folder), run / "adapted")
        results["fault"] = ranks.gather(fault(ranks, Path(out).with_name("used")))
        if ranks.leads:
            torch.save(results, out)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def stored(folder: Path) -> Path:
    """A model in several files, its rows odd in number."""
    tokenizer = train_tokenizer(["Add 12 to it."])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=121,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model", max_shard_size="10KB")
    tokenizer.save_pretrained(folder / "model")
    assert len(list((folder / "model").glob("*.safetensors"))) > 1
    return folder / "model"


@pytest.fixture(scope="module")
def results(folder: Path, stored: Path) -> dict[Any, Any]:
    out = folder / "results.pt"
    for mesh in MESHES:
        first(out.parent / mesh / "adamw")
        first(out.parent / mesh / "adamw8bit", **EIGHT_BITS)
    done = torchrun(__file__, str(out), str(stored))
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[Any, Any] = torch.load(out, weights_only=False)
    return found


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process(results: dict[Any, Any], mesh: str, case: str) -> None:
    options = CASES[case] | {"compiled": False}
    ours, alone = results[mesh, case], three_updates(ALONE, **options)
    for mine, expected in zip(ours["stats"], alone["stats"], strict=True):
        assert mine[:5] == pytest.approx(expected[:5], rel=1e-5)
        assert mine[5:-1] == pytest.approx(expected[5:-1], rel=1e-4, abs=1e-6)
        assert_close(mine[-1], expected[-1])
    assert_close(ours["logprobs"], alone["logprobs"])
    assert_close(ours["row"], alone["row"])
    assert_close(ours["weights"], alone["weights"])


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_go_on_from_a_checkpoint_of_one_process_and_back(
    results: dict[Any, Any], folder: Path, tmp_path: Path, mesh: str
) -> None:
    first(tmp_path)
    ours, alone = results[mesh, "resumed"], resumed(ALONE, tmp_path)
    assert ours["kinds"] == alone["kinds"] == {"Tensor"}
    assert_close(ours["state"], alone["state"])
    back, expected = make_policy(ALONE), make_policy(ALONE)
    for policy, run in ((back, folder / mesh / "adamw"), (expected, tmp_path)):
        load_checkpoint(checkpoint_of(run), policy)
        policy.update(batches())
    assert_close(whole_state(back), whole_state(expected))


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_go_on_from_moments_in_8_bits(
    results: dict[Any, Any], tmp_path: Path, mesh: str
) -> None:
    first(tmp_path, **EIGHT_BITS)
    ours, alone = results[mesh, "8 bits"], resumed(ALONE, tmp_path, **EIGHT_BITS)
    assert ours["kinds"] == alone["kinds"] == {"Tensor", "OptimState8bit"}
    # Where a sum's rounding changes a code, a moment differs by a hundredth of itself or of its
    # block's; the two updates move a parameter by up to 2e-3.
    for name, expected in alone["state"].items():
        if name.startswith(WEIGHTS):
            torch.testing.assert_close(ours["state"][name], expected, rtol=0, atol=5e-5)
        else:
            assert (ours["state"][name] - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("mesh", MESHES)
def test_nan_on_one_rank_stops_all_with_parameters_untouched(
    results: dict[Any, Any], mesh: str
) -> None:
    ours, alone = results[mesh, "poisoned"], poisoned(ALONE)
    assert ours["errors"] == 2 * alone["errors"]
    assert ours["same"] and len(ours["gradients"]) == 2
    assert_close(ours["gradients"], alone["gradients"])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_ranks_read_what_one_process_loads(
    results: dict[Any, Any], stored: Path, mesh: str, lora: bool
) -> None:
    ours, alone = results[mesh, "loaded"][lora], loaded(ALONE, stored, lora)
    assert_close(ours.pop("row"), alone.pop("row"))
    assert ours.keys() == alone.keys()
    assert all(torch.equal(ours[name], alone[name]) for name in alone)


@pytest.mark.parametrize("mesh", MESHES)
def test_adapters_of_two_ranks_are_exported_merged_and_alone(
    results: dict[Any, Any], folder: Path, stored: Path, tmp_path: Path, mesh: str
) -> None:
    run = folder / mesh / "adapted"
    export_run(run, tmp_path / "model")
    export_run(run, tmp_path / "adapters", adapters_alone=True)
    for name, weights in (("model", "model"), ("adapters", "adapter_model")):
        at_end, later = (load_file(at / name / f"{weights}.safetensors") for at in (run, tmp_path))
        assert at_end.keys() == later.keys()
        assert all(torch.equal(at_end[name], later[name]) for name in later)
    merged = AutoModelForCausalLM.from_pretrained(run / "model")
    base = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.bfloat16).float()
    adapted = PeftModel.from_pretrained(deepcopy(base), run / "adapters")
    ids = torch.arange(1, 12)[None]
    logits, expected = merged(ids).logits, adapted(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits - base(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"parallel": {"shard": 4}}, "replicate=1 times shard=4 is not the number of processes, 2"),
        (
            {
                "parallel": {"shard": 2},
                "rollout": {"engine": "sglang", "sglang": {"urls": ["http://a"]}},
            },
            "1 servers are too few for 2 processes",
        ),
        ({"parallel": {"shard": 2}, "model": {"device": "cpu:0"}}, "one device for 2 processes"),
    ],
    ids=["mesh", "engine", "device"],
)
def test_what_ranks_cannot_share_is_refused(
    data: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=said), joined(parse_config(data)):
        pass


CONFIG = """
run: {name: run, threads: 1}
model:
  name: scratch
  dtype: float32
  scratch: {hidden_size: 32, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 64}
task: {options: {steps: 4, level: 1}, system: Go., seed: 0}
tools: {workers: 1}
rollout: {call_format: code, max_turn_tokens: 12, max_tokens: 300}
algo: {n_total: 6}
sft: {demonstrations: 3, batch: 2, lr: 1.0e-3}
train:
  steps: 2
  tasks_per_step: 3
  updates_per_step: 2
  lr: 1.0e-3
  overlap: 1
  old_logprob: recompute
  importance_sampling: sequence
eval: {tasks: 3}
"""


def command(folder: Path, *overrides: str) -> list[str]:
    (folder / "config.yaml").write_text(CONFIG)
    return ["train", str(folder / "config.yaml"), f"run.dir={folder}", *overrides]


@pytest.fixture
def lucky(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((ledger.Ledger, "grade"), (loop, "cold_start")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back what comes next replaces
    verdicts_by_length()


def assert_as_one(two: list[dict[str, Any]], one: list[dict[str, Any]]) -> None:
    for ours, alone in zip(two, one, strict=True):
        assert ours.keys() == alone.keys()
        for name in ("success", "trajectories", "loss", "grad_norm", "approx_kl", "mismatch_ess"):
            assert ours.get(name, 0) == pytest.approx(alone.get(name, 0), rel=1e-3, abs=1e-5)
    assert all(record["grad_norm"] > 0 for record in two if record["phase"] == "rl")


def test_a_run_of_two_ranks_is_a_run_of_one(tmp_path: Path, lucky: None) -> None:
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    done = torchrun(__file__, *command(tmp_path / "two", "parallel.shard=2"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("after ELPO") == 2  # one line and one row, of the leading rank

    assert cli.main(command(tmp_path / "one")) == 0
    # Another step of either, on one rank.
    assert cli.main([*command(tmp_path / "two", "train.steps=3"), "--resume"]) == 0
    assert cli.main([*command(tmp_path / "one", "train.steps=3"), "--resume"]) == 0

    two = read_metrics(tmp_path / "two" / "run")
    assert [record["phase"] for record in two] == ["eval", "eval", "rl", "rl", "eval", "rl", "eval"]
    assert_as_one(two, read_metrics(tmp_path / "one" / "run"))
    ours, alone = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "run" / "model").state_dict()
        for name in ("two", "one")
    )
    torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-4)
    assert cli.main(["tree", "show", str(tmp_path / "two" / "run"), "--step", "1"]) == 0


def test_a_killed_rank_ends_the_others_and_one_goes_on(tmp_path: Path, lucky: None) -> None:
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    longer = ("train.steps=4", "train.checkpoint_every=1")
    start = [*TORCHRUN, __file__, *command(tmp_path / "two", *longer, "parallel.shard=2")]
    run = subprocess.Popen(
        start, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: checkpoint_there(tmp_path / "two" / "run", step=1) or run.poll() is not None)
    ranks = psutil.Process(run.pid).children()
    everyone = psutil.Process(run.pid).children(recursive=True)
    (second,) = (process for process in ranks if process.environ()["RANK"] == "1")
    second.kill()
    assert run.wait(timeout=300) != 0
    _, alive = psutil.wait_procs(everyone, timeout=60)
    assert not alive
    assert len(read_metrics(tmp_path / "two" / "run")) < 7, "it was to be killed before its end"

    assert cli.main([*command(tmp_path / "two", *longer), "--resume"]) == 0
    assert cli.main(command(tmp_path / "one", *longer)) == 0
    assert_as_one(*(read_metrics(tmp_path / name / "run") for name in ("two", "one")))


def checkpoint_there(run: Path, step: int) -> bool:
    try:
        return checkpoint_of(run, step).is_dir()
    except LookupError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_fault_of_the_run_folder_stops_all_ranks(results: dict[Any, Any]) -> None:
    assert len(results["fault"]) == 2
    assert all("already exists; continue it with --resume" in fault for fault in results["fault"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "train":
        verdicts_by_length()
        sys.exit(cli.main(sys.argv[1:]))
    torch.compile = partial(torch.compile, backend="aot_eager")  # its code is tested elsewhere
    compare(*sys.argv[1:])
