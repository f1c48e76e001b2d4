"""TRL's side: `GRPOTrainer` with transformers' generation. Runs in an environment without ours.

python -m bench.peers.theirs JOB
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.peers.job import Job, reward, say, settled


class Timed(GRPOTrainer):
    """Knows how long it generated and what."""

    generated = 0.0
    last: Any = None

    def _generate(self, *arguments: Any) -> Any:
        began = settled(self.device, perf_counter)
        found = super()._generate(*arguments)
        self.generated = settled(self.device, perf_counter) - began
        return found

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.last = super()._generate_and_score_completions(inputs)
        return self.last


class Steps(TrainerCallback):
    """Times every step; the first one is short and its gradient is kept as the probe."""

    def __init__(self, job: Job) -> None:
        self.job, self.steps = job, []
        self.trainer: Timed
        self._began = self._cpu = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        job, generation = self.job, self.trainer.generation_config
        tokens = job.tokens if state.global_step else job.probe_tokens
        generation.max_new_tokens = generation.min_new_tokens = tokens
        # What generate() is given beside it, which has the last word.
        self.trainer.generation_kwargs.update(max_new_tokens=tokens, min_new_tokens=tokens)
        self._began, self._cpu = settled(job.device, perf_counter), process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = settled(self.job.device, perf_counter) - self._began
        cpu = process_time() - self._cpu
        shape = tuple(self.trainer.last["completion_ids"].shape)
        warm = state.global_step == 1
        tokens = self.job.probe_tokens if warm else self.job.tokens
        assert shape == (len(self.job.texts) * self.job.rollouts, tokens), shape
        assert self.trainer.last["completion_mask"].all() and self.trainer.last["prompt_mask"].all()
        if warm:
            return
        figures = {"seconds": seconds, "cpu": cpu, "rollout": self.trainer.generated}
        self.steps.append({**figures, "sampled": shape[0] * shape[1]})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        if state.global_step == 1 and "grad_norm" in logs:
            found = {name: self.trainer.last[f"{name}_ids"].tolist() for name in WHAT}
            probe = {"grad_norm": float(logs["grad_norm"]), **found}
            Path(self.job.probe).write_text(json.dumps(probe), encoding="utf-8")


WHAT = ("prompt", "completion")


def main() -> None:
    job = Job.read(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    for text in job.texts:
        assert len(tokenizer.encode(text)) == job.prompt, text
    watch = Steps(job)
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=1 + job.steps,
            per_device_train_batch_size=job.rollouts,
            gradient_accumulation_steps=len(job.texts),
            num_generations=job.rollouts,
            max_completion_length=job.tokens,
            generation_kwargs={"min_new_tokens": job.tokens},
            temperature=1.0,
            top_k=0,
            loss_type="grpo",
            scale_rewards="none",
            beta=0.0,
            epsilon=job.clip,
            optim="adamw_torch",
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=job.betas[0],
            adam_beta2=job.betas[1],
            weight_decay=job.weight_decay,
            max_grad_norm=job.grad_clip,
            gradient_checkpointing=False,
            bf16=job.dtype == "bfloat16",
            use_cpu=job.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
            reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": job.texts}),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.device, watch.trainer = job.device, trainer
        trainer.train()
    versions = {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")}
    say(job.device, watch.steps, versions=versions)


if __name__ == "__main__":
    main()
