"""The SGLang engine on the real SGLang: what it adds to the promises of every engine."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch

from elpo_fast.config import ConfigError, RolloutConfig
from elpo_fast.rollout.sglang import process
from elpo_fast.rollout.sglang.engine import SGLangEngine
from elpo_fast.train.probe import check_engine
from elpo_fast.types import RunError, Sampling


@pytest.fixture
def changed(qwen3: Any) -> Any:
    """The same model with other weights."""
    new = type(qwen3)(qwen3.config).eval()
    new.load_state_dict(qwen3.state_dict())
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1)
    return new


@pytest.mark.parametrize("way", ["disk", "tensor", "distributed"])
def test_weights_arrive_every_way(
    qwen3: Any, changed: Any, server: Any, use_sglang: Any, prompt: Any, check: Any, way: str
) -> None:
    async def work(engine: SGLangEngine) -> Any:
        done = []
        for version, model in enumerate((changed, qwen3, changed), start=1):
            await engine.update_weights(model.named_parameters(), version)
            await check_engine(engine, model, torch.float32)
            done.append((model, *await engine.generate(prompt(40), 1, Sampling(max_tokens=6))))
        return done

    for version, (model, completion) in enumerate(
        use_sglang(qwen3, work, [server[1]], weight_sync=way), start=1
    ):
        assert completion.weight_version == version
        assert completion.cached_tokens < 40
        check(model, prompt(40), completion)


@pytest.mark.parametrize("way", ["disk", "tensor", "distributed"])
def test_a_wrong_name_is_found_by_the_probe(
    qwen3: Any, changed: Any, server: Any, use_sglang: Any, way: str
) -> None:
    async def work(engine: SGLangEngine) -> None:
        await engine.update_weights(qwen3.named_parameters(), 1)
        await check_engine(engine, qwen3, torch.float32)
        held = engine._weights._tensors
        held["model.norm.wait"] = held.pop("model.norm.weight")
        given = {**dict(changed.named_parameters()), "model.norm.wait": changed.model.norm.weight}
        del given["model.norm.weight"]
        with pytest.raises(RunError, match="differ from the trainer's by"):
            await engine.update_weights(given.items(), 2)
            await check_engine(engine, changed, torch.float32)

    use_sglang(qwen3, work, [server[1]], weight_sync=way)


def test_many_buckets_carry_the_same_weights_as_one(
    qwen3: Any, changed: Any, server: Any, use_sglang: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "elpo_fast.rollout.sglang.weights.ServedWeights.buckets.__defaults__",
        (100_000,),
        raising=True,
    )

    async def work(engine: SGLangEngine) -> int:
        await engine.update_weights(changed.named_parameters(), 1)
        await check_engine(engine, changed, torch.float32)
        return len(list(engine._weights.buckets()))

    assert use_sglang(qwen3, work, [server[1]], weight_sync="tensor") > 3


def test_entropy_estimates_say_what_they_are(
    qwen3: Any, server: Any, use_sglang: Any, prompt: Any
) -> None:
    cases = ((16, True, "top_k"), (16, False, "sampled"), (0, True, "sampled"))
    for top, read, kind in cases:
        sampling = Sampling(max_tokens=30, entropies=read)
        (c,) = use_sglang(
            qwen3,
            lambda e, sampling=sampling: e.generate(prompt(20), 1, sampling),
            [server[1]],
            top_logprobs=top,
        )
        assert c.entropy_kind == kind
        if kind == "sampled":
            assert (c.entropies == -c.logprobs).all()
            continue
        ids = torch.tensor(np.concatenate([prompt(20), c.token_ids]))
        with torch.no_grad():
            logprobs = qwen3(ids[None]).logits[0, 19:-1].log_softmax(-1)
        exact = -(logprobs.exp() * logprobs).sum(-1).numpy()
        assert (c.entropies <= exact + 1e-4).all()
        assert (c.entropies > 0.6 * exact).all()


def test_cancelling_aborts_on_the_server(
    qwen3: Any, server: Any, use_sglang: Any, prompt: Any
) -> None:
    async def running() -> int:
        async with aiohttp.ClientSession() as http, http.get(f"{server[1]}/v1/loads") as answer:
            loads = (await answer.json())["loads"]
            return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)

    async def until(wanted: bool) -> None:
        for _ in range(200):
            if (await running() > 0) == wanted:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{await running()} requests run")

    async def work(engine: SGLangEngine) -> None:
        await engine.generate(prompt(10), 1, Sampling(max_tokens=1))
        task = asyncio.create_task(engine.generate(prompt(10), 3, Sampling(max_tokens=480)))
        await until(True)
        task.cancel()
        await until(False)
        assert engine.stats().generated_tokens == 1

    use_sglang(qwen3, work, [server[1]])


def test_memory_is_lent_to_the_trainer_between_collecting_and_the_update(
    qwen3: Any, server: Any, use_sglang: Any, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: SGLangEngine) -> list[str]:
        await engine.generate(prompt(10), 1, Sampling(max_tokens=1))
        engine._colocated = True
        (server,) = engine._servers
        control, asked = server.control, []

        async def record(path: str, **body: Any) -> None:
            asked.append(path.partition("?")[0])
            await control(path, **body)

        monkeypatch.setattr(server, "control", record)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty_cache"))
        await engine.release()
        await engine.update_weights(qwen3.named_parameters(), 1)
        await engine.generate(prompt(10), 1, Sampling(max_tokens=1))
        return asked

    assert use_sglang(qwen3, work, [server[1]]) == [
        "/flush_cache",
        "/release_memory_occupation",
        "empty_cache",
        "/resume_memory_occupation",
        "/pause_generation",
        "/flush_cache",
        "/update_weights_from_disk",
        "/continue_generation",
    ]


def beside_the_trainer(model: Any, sglang: dict[str, Any], log: Path) -> dict[str, Any]:
    """Arguments of a server on the trainer's accelerator; "meta" stands in for one."""
    config = RolloutConfig.model_validate({"sglang": sglang})
    held = type(model)(model.config).to("meta")
    engine = SGLangEngine(
        config, held, None, dtype=torch.float32, log=log, weights=model.named_parameters()
    )
    asyncio.run(engine.close())
    (server,) = engine._servers
    assert server.process is not None
    return server.process._args


def test_a_server_beside_the_trainer_leaves_it_memory(
    qwen3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elpo_fast.rollout.sglang.engine.find_python", lambda _: "python")
    for given, expected in (({}, 0.5), ({"mem_fraction_static": 0.7}, 0.7)):
        args = beside_the_trainer(qwen3, {"args": given}, tmp_path / "log")
        assert args["mem_fraction_static"] == expected
        assert args["enable_memory_saver"]


def test_broadcasts_to_a_server_on_the_trainers_gpu_are_refused(
    qwen3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elpo_fast.rollout.sglang.engine.find_python", lambda _: "python")
    sglang = {"weight_sync": "distributed", "args": {"base_gpu_id": 0}}
    for refused in (sglang, {"weight_sync": "distributed"}):
        with pytest.raises(ConfigError, match="NCCL refuses two processes on one GPU"):
            beside_the_trainer(qwen3, refused, tmp_path / "log")
    elsewhere = sglang | {"args": {"base_gpu_id": 1}}
    assert beside_the_trainer(qwen3, elsewhere, tmp_path / "log")["base_gpu_id"] == 1


def test_too_long_trajectories_are_refused_at_once(
    qwen3: Any, server: Any, tokenizer: Any, tmp_path: Path, prompt: Any
) -> None:
    config = RolloutConfig.model_validate({"max_tokens": 512, "sglang": {"urls": [server[1]]}})

    async def work() -> None:
        engine = SGLangEngine(config, qwen3, tokenizer, dtype=torch.float32, log=tmp_path / "log")
        with pytest.raises(ConfigError, match=r"rollout.max_tokens=512 exceeds the 50\d tokens"):
            await engine.generate(prompt(4), 1, Sampling(max_tokens=1))
        await engine.close()

    asyncio.run(work())


def test_a_server_that_is_not_there_is_named(qwen3: Any, use_sglang: Any, prompt: Any) -> None:
    url = "http://127.0.0.1:9"
    with pytest.raises(RunError, match=f"{url} did not answer in 0.5 s while starting"):
        use_sglang(
            qwen3,
            lambda e: e.generate(prompt(4), 1, Sampling(max_tokens=1)),
            [url],
            start_timeout_s=0.5,
        )


def test_an_interpreter_without_sglang_is_refused(
    qwen3: Any, tokenizer: Any, tmp_path: Path
) -> None:
    for python, said in (("/nowhere", "cannot be run"), ("/usr/bin/python3", "make sglang-cpu")):
        if said == "make sglang-cpu" and not Path(python).exists():
            continue
        config = RolloutConfig.model_validate({"sglang": {"python": python}})
        with pytest.raises(ConfigError, match=said):
            SGLangEngine(config, qwen3, tokenizer, dtype=torch.float32, log=tmp_path / "log")


def test_placeholders_import_and_raise_when_called(sglang_python: str) -> None:
    code = (
        "import sgl_kernel, torchvision.transforms.functional as f\n"
        "from torchvision.io import ImageReadMode\n"
        "try:\n    sgl_kernel.rmsnorm(1)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(process.__file__).parent / "cpu")}
    said = subprocess.run(
        [sglang_python, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said == "sgl_kernel.rmsnorm is not installed; this model or option needs a GPU build\n"
