"""Two training processes with a real SGLang server each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from elpo_fast.train.summary import read_metrics

CONFIG = """
run: {{name: run, dir: {dir}, threads: 1}}
model: {{name: {model}, dtype: float32, device: cpu}}
task: {{options: {{steps: 4, level: 1}}, system: Go., seed: 0}}
tools: {{workers: 1}}
rollout:
  engine: sglang
  sglang: {{urls: {urls}, weight_sync: disk}}
  call_format: code
  max_turn_tokens: 8
  max_tokens: 480
algo: {{n_total: 2}}
sft: {{demonstrations: 2, batch: 2, lr: 1.0e-3}}
train: {{steps: 1, tasks_per_step: 2}}
eval: {{tasks: 2}}
parallel: {{shard: 2}}
"""


def logprobs(url: str, tokens: list[int]) -> np.ndarray:
    """What a server makes of one row, at temperature 1."""
    body = {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{url}/generate", json.dumps(body).encode(), headers)) as answer:
        given = json.load(answer)["meta_info"]["input_token_logprobs"]
    return np.array([entry[0] for entry in given[1:]])


def test_every_rank_gives_its_servers_the_gathered_weights(
    qwen3: Any, tokenizer: Any, servers: Any, tmp_path: Path
) -> None:
    urls = [url for _, url in servers]
    qwen3.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(dir=tmp_path, model=tmp_path / "model", urls=urls))
    tokens = list(range(1, 40))
    before = [logprobs(url, tokens) for url in urls]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "elpo_fast.cli", "train", str(config)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    records = read_metrics(tmp_path / "run")
    assert [record["phase"] for record in records] == ["eval", "sft", "eval", "rl", "eval"]
    assert records[3]["trajectories"] == 4
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        logits = trained(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
    for url, old in zip(urls, before, strict=True):
        np.testing.assert_allclose(logprobs(url, tokens), expected, atol=1e-4)
        assert np.abs(old - expected).max() > 1e-3
