"""The training loop: collect, score, pack, update, push weights, evaluate.

Invariants
- Seeds, tasks and mini-batches of step `s` follow from `run.seed`, the run folder's secret (or
  `task.seed`) and `s` alone, so a resumed run does what the uninterrupted one would have done.
- A step either updates the policy with finite gradients or stops with its trees saved and the
  parameters untouched.
- The run folder is written in step order: trees, metrics, checkpoint.
- With `train.overlap`, the trees of step `s + 1` are collected while step `s` trains, all of them
  by the weights before step `s`: the engine gets new ones when both are done. A checkpoint holds
  the trees that wait for their step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from elpo_fast.algo import make_planner, score
from elpo_fast.config import Config, ConfigError
from elpo_fast.eval.run import evaluate, held_out_tasks
from elpo_fast.faults import enough_disk, enough_memory
from elpo_fast.model.lora import named_weights
from elpo_fast.regions import CLOCK, region
from elpo_fast.train.advice import advice
from elpo_fast.train.checkpoint import (
    RL,
    SFT,
    Checkpoints,
    TrainState,
    latest,
    load_checkpoint,
)
from elpo_fast.train.display import Display, Phase
from elpo_fast.train.export import export_adapters, export_model
from elpo_fast.train.metrics import (
    Counts,
    StepStats,
    sample_texts,
    staleness,
    totals,
    tree_metrics,
)
from elpo_fast.train.parallel import Ranks, joined, threads
from elpo_fast.train.parts import Parts, assembled, settled
from elpo_fast.train.probe import check_engine
from elpo_fast.train.run import Follower, RunFolder
from elpo_fast.train.sft import (
    Data,
    Examples,
    cold_start,
    held_out_loss,
    in_tokens,
    read_data,
)
from elpo_fast.train.step import (
    NonFiniteError,
    PolicyOptimizer,
    schedule_of,
)
from elpo_fast.train.summary import DURING, print_summary, read_metrics
from elpo_fast.train.times import StepTimes
from elpo_fast.train.update import make_reference, release_memory, update_policy
from elpo_fast.tree import io
from elpo_fast.tree.merge import merge_equal_steps
from elpo_fast.tree.pack import active
from elpo_fast.tree.store import Forest, Tree
from elpo_fast.types import Message, RunError, Task

_COLLECT, _EVALUATE, _SHUFFLE, _SFT = 1, 2, 3, 4  # independent random streams of a run


def train(
    config: Config,
    *,
    resume: bool = False,
    allow_change: bool = False,
    sft_only: bool = False,
    console: Console | None = None,
) -> Path:
    """Train as configured; the run folder. `resume` continues from its last checkpoint, with
    `allow_change` under a configuration that changes the mathematics. `sft_only` ends after
    supervised fine-tuning, without anything sampled.

    Raises `ConfigError` for faults of the configuration, `NonFiniteError` where a step met NaN or
    infinity (its trees are saved, the parameters are those before the step).
    """
    if sft_only and not config.sft.wanted:
        raise ConfigError(
            "sft.data: there is nothing to learn from; name a file of conversations (docs/sft.md), "
            "or set sft.demonstrations for a task source with a solver"
        )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with joined(config) as ranks:
        config = ranks.gather(settled(config, goes_on=resume))[0]
        folder = _folder(config, resume, allow_change, ranks)
        display = Display(console or Console(quiet=not ranks.leads))
        for change in folder.changes:
            display.say(f"changed: {change}")
        try:
            _complete(_main(config, folder, display, resume, ranks, sft_only))
        finally:
            folder.close()
    return folder.path


def _complete(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, in a thread of its own where a loop runs here already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _folder(config: Config, resume: bool, allow_change: bool, ranks: Ranks) -> RunFolder:
    """The run folder, made by the leading rank; what is wrong with it stops all ranks."""
    folder: RunFolder = Follower(config)
    fault = None
    if ranks.leads:
        try:
            if resume:
                folder = RunFolder.resume(config, allow_change=allow_change)
            else:
                folder = RunFolder.create(config)
        except ConfigError as error:
            fault = error
    if (fault := ranks.gather(fault)[0]) is not None:
        raise fault
    return folder


@dataclass(frozen=True)
class _Collected:
    """The trees of one step and what it took to collect them."""

    forest: Forest
    counts: dict[str, float]
    seconds: float


async def _main(
    config: Config,
    folder: RunFolder,
    display: Display,
    resume: bool,
    ranks: Ranks,
    sft_only: bool,
) -> None:
    found = ranks.gather(latest(folder.path) if resume and ranks.leads else None)[0]
    begins = found is None or found.name.startswith(SFT)
    data = read_data(config.sft) if begins else Data([], [])
    if (executor := threads(ranks)) is not None:
        asyncio.get_running_loop().set_default_executor(executor)
    secret = ranks.gather(folder.secret)[0]
    async with assembled(config, ranks, secret=secret, samples=not sft_only) as parts:
        with closing(Checkpoints(folder.path, config.train.keep_checkpoints, ranks)) as checkpoints:
            run = _Run(config, folder, display, parts, checkpoints)
            await run.learn(found, data, sft_only)


@dataclass
class _Run:
    """One run and its parts."""

    config: Config
    folder: RunFolder
    display: Display
    parts: Parts
    checkpoints: Checkpoints
    warned: Collection[str] = ()  # about the step before
    reference: PolicyOptimizer | None = None  # that `algo.kl_coef` keeps the policy near to

    async def learn(self, found: Path | None, data: Data, sft_only: bool = False) -> None:
        """Supervised fine-tuning, then reinforcement learning, with evaluation around both; from
        the checkpoint `found` on, if there is one."""
        config, policy, chat = self.config, self.parts.policy, self.parts.collector.chat
        if found is not None:
            self.display.say(f"goes on from {found.name}")
        for note in chat.template.notes:
            self.display.say(f"chat template: {note}")
        schedule = schedule_of(config.train)
        policy.restart(lr=config.train.lr, schedule=schedule)
        restored = load_checkpoint(found, policy, self.parts.ranks) if found else None
        if sft_only and restored and restored.phase == RL:
            raise ConfigError(
                f"run {self.folder.path} is past its supervised fine-tuning; go on with "
                "elpo train --resume, or start a new run"
            )
        # Whatever was recorded after the checkpoint, or before any, is work that is done again.
        self.folder.rewind(restored.extra["records"] if restored else 0)
        if restored and restored.phase == RL and restored.step >= config.train.steps:
            self.finish()
            return
        if restored is None or restored.phase == SFT:
            if restored is None:
                self.folder.keep_tokenizer(self.parts.loaded.tokenizer)
                some: Sequence[Message] = [{"role": "user", "content": "[a question]"}]
                if not sft_only:
                    some = self.parts.source.train(self.first_task(0)).messages
                self.folder.keep_chat(chat.shown(some))
            if config.sft.wanted:
                await self.fine_tune(data, restored, sft_only)
            if sft_only:
                self.finish()
                return
            await self.evaluate("after SFT" if config.sft.wanted else f"before {self.algorithm}", 0)
            policy.restart(lr=config.train.lr, schedule=schedule)
            restored = None
        release_memory()
        if config.algo.kl_coef:
            self.reference = make_reference(self.parts, config, restored is None)
        start, ready = 0, None
        if restored is None:
            self.save(0)
        else:
            start = restored.step
            await self.push_weights(restored.weight_version)
            if restored.collected is not None:
                ready = _Collected(restored.collected, **restored.extra["collected"])
        await self.reinforce(start, ready)
        await self.evaluate(f"after {self.algorithm}", config.train.steps)
        self.save(config.train.steps)
        self.finish()

    async def reinforce(self, start: int, ready: _Collected | None) -> None:
        """Reinforcement learning from step `start` on, whose trees may be `ready`."""
        config = self.config
        every, kept = config.eval.every, config.train.checkpoint_every
        times = StepTimes(self.parts, config, start + 1)
        with self.display.phase(self.algorithm, config.train.steps, start) as phase:
            for step in range(start, config.train.steps):
                self.checkpoints.check()
                collected = ready or await self.collect(step, phase)
                values, ready = await self.train_step(step, collected, phase)
                await self.push_weights(self.parts.engine.weight_version + 1)
                values |= times.end(step + 1, collected.forest)
                with region("saving"):
                    self.folder.log("rl", step + 1, values)
                    phase.advance(_figures(values))
                    self.comment(values, collected.forest)
                if await times.profiled(step + 1):
                    self.display.say(f"profile: elpo profile {self.folder.path}")
                if step + 1 == config.train.steps:
                    break
                if every and (step + 1) % every == 0:
                    await self.evaluate(DURING, step + 1)
                if kept and (step + 1) % kept == 0:
                    self.save(step + 1, ready)

    def finish(self) -> None:
        """Wait for the last checkpoint, export its model, and sum up."""
        self.checkpoints.wait()
        loaded, ranks, path = self.parts.loaded, self.parts.ranks, self.folder.path
        export_model(path / "model", loaded.model, loaded.tokenizer, ranks)
        if self.config.model.lora is not None:
            export_adapters(path / "adapters", loaded.model, loaded.tokenizer, ranks)
        if ranks.leads:
            print_summary(path, self.display.console)

    @property
    def algorithm(self) -> str:
        return "ELPO" if self.config.algo.planner == "bel" else "RL"

    async def fine_tune(self, data: Data, restored: TrainState | None, sft_only: bool) -> None:
        """Supervised fine-tuning, with its held-out loss before and after each epoch."""
        examples = Examples([], [], "")
        if data.train:
            positions = getattr(self.parts.loaded.model.config, "max_position_embeddings", None)
            chat = self.parts.collector.chat
            examples = in_tokens(data, chat, self.config, positions)
            said = f"{self.config.sft.data}: {examples.said}"
            self.display.say(said)
        if restored is None and not sft_only:
            await self.evaluate("before SFT", 0)
        await self.cold_start(examples, restored)
        if not sft_only:
            await self.push_weights(self.parts.engine.weight_version + 1)

    async def cold_start(self, examples: Examples, restored: TrainState | None) -> None:
        sft, policy, folder = self.config.sft, self.parts.policy, self.folder
        losses: list[float] = []
        if restored is not None:
            mine = read_metrics(folder.path) if self.parts.ranks.leads else []
            found = [r["loss"] for r in mine if r["phase"] == "sft" and "loss" in r]
            losses = self.parts.ranks.gather(found)[0]
            if restored.extra["examples"] != examples.digest:
                raise ConfigError(
                    f"cannot resume {folder.path}: {sft.data} has other conversations now, or they "
                    "are rendered otherwise; put them back or start a new run"
                )
        total = sft.steps(len(examples.train) + sft.demonstrations)
        step = saved = len(losses)
        began = time.perf_counter()
        with self.display.phase("SFT", total, step) as phase:

            def held_out() -> str:
                if not examples.held_out:
                    return ""
                budget = self.config.train.micro_batch_tokens
                loss = held_out_loss(examples.held_out, policy, budget)
                folder.log("sft", step, {"held_out_loss": loss})
                return f"held-out loss {loss:.3f}"

            def on_step(stats: StepStats, epoch_ends: bool) -> None:
                nonlocal step, saved, began
                step += 1
                values = {
                    "loss": stats.loss,
                    "grad_norm": stats.grad_norm,
                    "lr": stats.lr,
                    "trained_tokens": stats.trained_tokens,
                    "computed_tokens": stats.tokens,
                    "seconds": time.perf_counter() - began,
                }
                folder.log("sft", step, values)
                release_memory()
                shown = epoch_ends or step % max(1, total // 5) == 0
                said = [f"loss {stats.loss:.3f}", held_out() if epoch_ends else ""]
                phase.advance("  ".join(filter(None, said)), report=shown)
                self.checkpoints.check()
                if epoch_ends or (sft.checkpoint_every and step % sft.checkpoint_every == 0):
                    self.save(step, phase=SFT, examples=examples.digest)
                    saved = step
                began = time.perf_counter()

            if sft.demonstrations:
                phase.detail(f"running the tools of {sft.demonstrations} demonstrations")
            await self.parts.engine.release()
            if restored is None and (said := held_out()):
                phase.advance(said, units=0)
            await cold_start(
                self.config,
                self.parts.collector,
                policy,
                on_step,
                guard=lambda forest: self.saving_offenders(forest, f"sft_{step + 1:06d}"),
                seed=self.stream(_SFT, 0),
                conversations=examples.train,
                losses=losses,
            )
        if saved < step:  # it stopped early
            self.save(step, phase=SFT, examples=examples.digest)

    async def collect(self, step: int, phase: Phase) -> _Collected:
        """Trees for the `tasks_per_step` tasks of a step, by the engine's present weights."""
        with region("waiting"):
            config, began = self.config, time.perf_counter()
            counter = Counts(self.parts.engine, self.parts.collector)
            first, wanted = self.first_task(step), config.train.tasks_per_step
            grown = asked = 0

            def on_tree(tree: Tree) -> None:
                nonlocal grown
                grown += 1
                phase.detail(f"collecting {grown}/{asked} trees")

            told: list[Tree] = []  # with signal
            silent: list[Tree] = []
            while len(told) < wanted and asked < wanted * config.algo.dynamic_sampling:
                missing = min(wanted - len(told), wanted * config.algo.dynamic_sampling - asked)
                tasks = [self.parts.source.train(first + asked + i) for i in range(missing)]
                asked += missing
                trees = await self.parts.collector.collect(
                    tasks,
                    lambda: make_planner(config.algo),
                    seed=self.stream(_COLLECT, step),
                    on_tree=on_tree,
                )
                with region("trees"):
                    if config.algo.merge_equal_steps:
                        trees = [merge_equal_steps(tree) for tree in trees]
                    if config.algo.dynamic_sampling == 1:
                        told = trees
                        continue
                    forest = Forest.from_trees(trees)
                    useful = active(forest, score(forest, config.algo))
                    told += [tree for tree, use in zip(trees, useful, strict=True) if use]
                    silent += [tree for tree, use in zip(trees, useful, strict=True) if not use]
            with region("trees"):
                forest = Forest.from_trees([*told, *silent][:wanted])
            ranks = self.parts.ranks
            if config.train.save_trees and ranks.leads:
                file = self.folder.tree_file(step + 1)
                said = "set train.save_trees=false, and go on with --resume"
                with region("saving"), enough_disk(file, said):
                    io.save(forest, file)
            counts = totals(ranks.gather(counter.difference(), ranks.rollouts))
            if counts["faults"] == len(forest.reasons):
                raise RunError(
                    f"step {step + 1}: all {len(forest.reasons)} trajectories were ended by an "
                    f"exception, the first because {forest.reasons[0]}; mend what raises and go on "
                    "with --resume"
                )
            return _Collected(forest, counts, time.perf_counter() - began)

    async def train_step(
        self, step: int, collected: _Collected, phase: Phase
    ) -> tuple[dict[str, Any], _Collected | None]:
        """Update the policy on a step's trees; its metrics and, with overlap, the next trees."""
        if not self.config.train.overlap or step + 1 == self.config.train.steps:
            with region("weight_sync"):
                await self.parts.engine.release()
            return self.update(step, collected, phase), None
        following = asyncio.create_task(self.collect(step + 1, phase))
        try:
            values = await asyncio.to_thread(self.update, step, collected, phase)
            return values, await following
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    def update(self, step: int, collected: _Collected, phase: Phase) -> dict[str, Any]:
        """Updates of the policy on one step's trees; the step's metrics."""
        forest, began = collected.forest, time.perf_counter()
        rng = np.random.default_rng(self.stream(_SHUFFLE, step))
        with self.saving_offenders(forest, f"rl_{step + 1:06d}"):
            values = update_policy(
                self.parts.policy, forest, self.config, rng, self.reference, phase.detail
            )
        seconds = time.perf_counter() - began
        with region("trees"):
            return {
                **tree_metrics(forest),
                **values,
                **staleness(forest, self.parts.engine.weight_version),
                **collected.counts,
                "time/collect": collected.seconds,
                "time/train": seconds,
                "generated_per_s": int(forest.agent.sum()) / collected.seconds,
                "trained_tokens_per_s": values["computed_tokens"] / seconds,
            }

    @contextmanager
    def saving_offenders(self, forest: Forest, name: str) -> Iterator[None]:
        """Save the forest of an update that is not finite and say which tasks are to blame."""
        tokens = self.config.train.micro_batch_tokens
        try:
            with enough_memory(
                "updating the policy",
                f"lower train.micro_batch_tokens={tokens} or rollout.max_tokens, or set "
                "model.gradient_checkpointing=true, and go on with --resume",
            ):
                yield
        except NonFiniteError as error:
            path = self.folder.path / f"nonfinite_{name}.npz"
            if self.parts.ranks.leads:
                io.save(forest, path)
            tasks = ", ".join(forest.task_ids[tree] for tree in error.trees)
            error.args = (f"{error}. Tasks: {tasks}; all trees of the step: {path}",)
            raise

    def comment(self, values: Mapping[str, Any], forest: Forest) -> None:
        """Two trajectories of a step into the trackers, and what is wrong with it, if it was not
        said about the step before."""
        for name, text in sample_texts(forest, self.parts.collector.chat.decode).items():
            self.folder.show(f"rl/{name}", text)
        wrong = advice(values, self.folder.first)
        for kind in wrong.keys() - self.warned:
            self.display.say(f"warning: {wrong[kind]}")
            self.folder.show(f"warning/{kind}", wrong[kind])
        self.warned = wrong.keys()

    async def push_weights(self, version: int) -> None:
        """Give the engine the policy's present weights as `version`, and see that it has them."""
        parts, config = self.parts, self.config
        with region("weight_sync", passes=1):
            await parts.engine.update_weights(named_weights(parts.loaded.model), version)
            # Masters are float32 everywhere; a sharded model computes in another dtype all the
            # same.
            computed = {config.model.dtype, config.rollout.dtype or config.model.dtype}
            dtype = torch.float32 if computed == {"float32"} else torch.bfloat16
            score = None if parts.ranks.mesh is None else parts.policy.score
            await check_engine(parts.engine, parts.policy.compute, dtype, score)

    @cached_property
    def held_out(self) -> list[Task]:
        return held_out_tasks(self.parts.source, self.config.eval)

    async def evaluate(self, name: str, step: int) -> None:
        """Success on held-out tasks, if there are to be any, logged under `name`."""
        began = time.perf_counter()
        if not self.held_out:
            return
        grown: list[Tree] = []

        def on_tree(tree: Tree) -> None:
            grown.append(tree)
            phase.advance(report=False)

        with self.display.phase(f"eval {name}", len(self.held_out)) as phase:
            result = await evaluate(
                self.parts.collector,
                self.config.eval,
                seed=self.stream(_EVALUATE, 0),
                tasks=self.held_out,
                on_tree=on_tree,
            )
            low, high = result.interval
            text = f"success {result.success:.1%} (95 % interval {low:.1%} to {high:.1%})"
            phase.advance(text, units=0)
        values = {
            "name": name,
            "success": result.success,
            "low": low,
            "high": high,
            "tasks": result.tasks,
            "samples": self.config.eval.samples,
            "seconds": time.perf_counter() - began,
        }
        self.folder.log("eval", step, values)
        if grown:  # on this rank
            forest = Forest.from_trees(grown)
            for kind, text in sample_texts(forest, self.parts.collector.chat.decode).items():
                self.folder.show(f"eval/{kind}", text)
        CLOCK.take()  # what it took is no part of a step

    def save(
        self, step: int, ready: _Collected | None = None, *, phase: str = RL, **more: Any
    ) -> None:
        """Begin a checkpoint after a step of a phase, with `more` for a resume to read; `ready`:
        the next step's trees, where they are there already."""
        extra: dict[str, Any] = {"records": self.folder.records, **more}
        if ready is not None:
            extra["collected"] = {"counts": ready.counts, "seconds": ready.seconds}
        state = TrainState(
            step=step,
            weight_version=self.parts.engine.weight_version,
            data_position=self.first_task(step if phase == RL else 0),
            extra=extra,
            collected=ready.forest if ready else None,
            phase=phase,
        )
        with (
            enough_memory(
                "copying weights and moments for a checkpoint",
                "free main memory, or write fewer checkpoints by train.checkpoint_every",
            ),
            region("checkpoint", passes=1),
        ):
            self.checkpoints.save(state, self.parts.policy)

    def first_task(self, step: int) -> int:
        """Index of a step's first training task: the cold start's come before all of them."""
        config = self.config
        tasks = config.train.tasks_per_step * config.algo.dynamic_sampling
        return config.sft.demonstrations + step * tasks

    def stream(self, kind: int, step: int) -> int:
        """Seed of an independent random stream for this purpose and step."""
        sequence = np.random.SeedSequence([self.config.run.seed, kind, step])
        return int(sequence.generate_state(1)[0])


def _figures(values: Mapping[str, Any]) -> str:
    searched, found = values["searches"], values["failures_localized"]
    localized = f"localized {found:.0%}  " if searched else ""
    return (
        f"success {values['success']:.0%}  {localized}"
        f"kl {values.get('approx_kl', 0):.4f}  grad {values.get('grad_norm', 0):.2f}  "
        f"collect {values['time/collect']:.0f} s at {values['generated_per_s']:.0f} tok/s  "
        f"train {values['time/train']:.0f} s at {values['trained_tokens_per_s']:.0f} tok/s"
    )
