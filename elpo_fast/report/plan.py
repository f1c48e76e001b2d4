"""`elpo plan`: what a step takes on a cluster (memory of a GPU, seconds, tokens a second), and
which `parallel`, `train.micro_batch_tokens` and `rollout.trees_in_flight` to take.

Trees of the configuration's planner are grown without a model, of the lengths that are given and
with verdicts that are drawn, and packed as a step packs them: shared prefixes, cut trees and pairs
of attention are counted, not guessed. A micro-batch then takes

    max(products + attention + head + elements, launches, FSDP's bytes over the link) seconds,

an update also the optimizer's bytes, and a step of the engine the larger of its bytes and its
products. Rates are those of data sheets times the shares of them that were reached where it was
measured (`Shares`); `MEASURED` says how far that is from everything recorded. What was not measured
on a GPU, decoding and the link between GPUs, is said to be so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from elpo_fast.algo import make_planner, score
from elpo_fast.algo.planners import trajectory_of
from elpo_fast.config import Config, ConfigError
from elpo_fast.model.load import described, quiet
from elpo_fast.regions import Total
from elpo_fast.train import limits
from elpo_fast.train.costs import COPY, Costs
from elpo_fast.tree import io
from elpo_fast.tree.pack import micro_batches
from elpo_fast.tree.store import Forest, Tree

GB = 1e9


class Card(NamedTuple):
    """A device by its data sheet, or as measured: bytes, operations a second in products, bytes a
    second of its memory and to other devices."""

    name: str
    memory: float
    products: float
    bandwidth: float
    link: float


class Shares(NamedTuple):
    """What of a card's rates is reached, and what a host adds."""

    body: float  # products of the blocks
    attention: float  # of packed trees, forward and backward
    head: float  # the fused loss
    bandwidth: float
    decode: float  # of the bytes or products of an engine's step
    elements: float  # bytes between products, of a token and layer, over 2 (4 H + 3 I)
    launches: float  # seconds of the host for a layer of a micro-batch
    step: float  # seconds of the host for a step of the engine
    kept: float  # bytes kept for the backward, of a token and layer, over (4 H + 3 I) numbers


CARDS = {
    name.lower(): Card(name, memory * GB, limits.SHEETS[name], bandwidth * 1e12, link * GB)
    for name, (memory, bandwidth, link) in {
        "A100": (80, 2.04, 300),
        "H100": (80, 3.35, 450),
        "H200": (141, 4.8, 450),
        "B200": (180, 8.0, 900),
        "L40S": (48, 0.864, 32),
        "MI300X": (192, 5.3, 448),
    }.items()
}
_GPU = Shares(0.71, 0.172, 0.53, 0.89, 0.6, 5.8, 4.4e-3, 2e-3, 1.17)
EAGER, COMPILED = _GPU._replace(launches=6.8e-3, kept=1.64), _GPU
CPU = Shares(0.70, 0.70, 0.70, 1.0, 0.66, 0.0, 0.0, 0.0, 1.64)
LINK = 0.7  # of the link's rate; assumed
MEASURED = {"seconds of an update": 0.15, "memory of an update": 0.02, "CPU decoding": 0.20}
"""Largest relative error over what `bench/results` has; a test computes it."""

SERVER_LEAVES = 2.5 * GB  # a server's, while it lends its memory
SERVER_SHARE = 0.5  # `mem_fraction_static`, of what is free at its start
_BYTES = {"float32": 4, "bfloat16": 2}
BUDGETS = tuple(1 << power for power in range(11, 18))
CHECKPOINTING: tuple[bool | str, ...] = (False, "selective", True)  # the quickest first


class Lengths(NamedTuple):
    """Of trajectories, in tokens: what a task says, and in each turn the policy and the tool."""

    prompt: int
    turns: int
    said: int
    answer: int


class Work(NamedTuple):
    """A micro-batch: computed tokens, pairs of attention, rows of the loss."""

    tokens: float
    pairs: float
    rows: float


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model beyond its `costs`."""

    costs: Costs
    layers: int
    hidden: int
    mlp: int
    parameters: int
    number: int  # bytes of a number in which it computes

    @staticmethod
    def of(model: PreTrainedModel, number: int) -> Model:
        """Of a model whose weights may be on the meta device."""
        shape = model.config
        return Model(
            Costs.of(model),
            shape.num_hidden_layers,
            shape.hidden_size,
            shape.intermediate_size,
            sum(p.numel() for p in model.parameters()),
            number,
        )

    @property
    def ends(self) -> int:
        """Weights of embedding and head."""
        return self.parameters - self.costs.weights

    @property
    def products(self) -> float:
        """Numbers of a token that matrix products and attention make in all layers."""
        heads = self.costs.pair / 4
        return 2 * heads + self.costs.cached + (2 * self.hidden + 2 * self.mlp) * self.layers

    @property
    def width(self) -> int:
        """Numbers of a token in a layer, about."""
        return 4 * self.hidden + 3 * self.mlp


@dataclass(frozen=True, slots=True)
class Trees:
    """Trees as a step's will be, each figure of one tree."""

    forest: Forest
    sampled: float  # tokens of the policy, each once
    whole: float  # tokens of all trajectories
    unique: float
    longest: int  # of a trajectory
    rows: float  # decoded at once, on average over a tree's requests

    @staticmethod
    def of(forest: Forest, rows: float) -> Trees:
        count = len(forest)
        lengths = [
            sum(int(forest.token_count[node]) for node in forest.path(int(leaf)))
            for leaf in forest.leaf_node
        ]
        return Trees(
            forest,
            float(forest.agent.sum()) / count,
            sum(lengths) / count,
            len(forest.token_ids) / count,
            max(lengths),
            rows,
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """What is chosen."""

    replicate: int
    shard: int
    budget: int  # train.micro_batch_tokens
    checkpointing: bool | str  # model.gradient_checkpointing


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one GPU: bytes by what holds them while updating and while sampling, and seconds."""

    setting: Setting
    updating: dict[str, float]
    sampling: dict[str, float]
    update: float
    rollout: float
    in_flight: int
    cached: float  # tokens that the engine's cache can hold

    @property
    def peak(self) -> float:
        return max(sum(self.updating.values()), sum(self.sampling.values()))


def grow(config: Config, lengths: Lengths, count: int = 8) -> Trees:
    """Trees of the configured planner, half of whose trajectories fail: the later one branches off
    a failed trajectory, the less likely it is right."""
    rng = np.random.default_rng(0)
    trees: list[Tree] = []
    requests = 0

    def extend(tree: Tree, node: int) -> int:
        depth = tree.depth[node]
        for turn in range(depth + 1, lengths.turns + 1):
            answered = turn < lengths.turns
            size = lengths.said + answered * lengths.answer
            agent, zeros = np.arange(size) < lengths.said, np.zeros(size)
            ids = rng.integers(1 << 30, size=size)
            node = tree.add_step(node, ids, agent, zeros, zeros, tool_call=answered)
        correct = bool(rng.random() < 0.5 * (1 - depth / lengths.turns))
        return tree.finish(node, reward=float(correct), correct=correct, end="answer")

    for _ in range(count):
        tree, planner = Tree(rng.integers(1 << 30, size=lengths.prompt)), make_planner(config.algo)
        while not planner.done:
            asked = planner.requests()
            requests += 1
            for request in asked:
                for _ in range(request.count):
                    planner.observe(trajectory_of(tree, extend(tree, request.node)))
        trees.append(tree)
    leaves = sum(len(tree.leaves) for tree in trees)
    return Trees.of(Forest.from_trees(trees), leaves / requests)


def packed(config: Config, trees: Trees, budget: int) -> tuple[Work, float]:
    """The mean micro-batch of these trees, and how many of them a tree makes."""
    forest = trees.forest
    scored = score(forest, config.algo)
    every = range(len(forest))
    parts = [
        Work(len(part.trie), float(np.sum(part.trie.position + 1.0)), len(part.loss_rows))
        for part in micro_batches(forest, scored, every, budget)
    ]
    total = Work(*(sum(column) for column in zip(*parts, strict=True)))
    # The last batch of so few trees is not full; those of a whole step are.
    train = config.train
    number = max(total.tokens / budget, len(forest) * train.updates_per_step / train.tasks_per_step)
    return Work(*(x / number for x in total)), number / len(forest)


def update_seconds(
    model: Model,
    card: Card,
    shares: Shares,
    parts: Iterable[Work],
    setting: Setting,
    *,
    passes: float = 3,
    optimizer: bool = True,
) -> float:
    """Of one update by one GPU, from its micro-batches; `passes`: forward counts 1, backward 2."""
    costs, number = model.costs, model.number
    seconds = 0.0
    bandwidth = card.bandwidth * shares.bandwidth
    forward = passes + (setting.checkpointing is True)
    bytes_sent = _sent(model, setting)
    for part in parts:
        body = forward * costs.forward(part.tokens, 0) / (card.products * shares.body)
        pairs = forward * costs.pair * part.pairs / (card.products * shares.attention)
        head = passes * costs.head(part.rows) / (card.products * shares.head)
        between = number * shares.elements * model.width * model.layers * part.tokens / bandwidth
        if setting.checkpointing:
            between *= 4 / 3  # backward has twice the forward's
        added = 10.0 * costs.trained / setting.shard / bandwidth if number == 2 else 0.0
        host = shares.launches * model.layers * forward / 3
        sent = bytes_sent / (card.link * LINK) if bytes_sent else 0.0
        seconds += max(body + pairs + head + between + added, host, sent)
    if optimizer:
        one = replace(costs, trained=costs.trained / setting.shard)
        seconds += one.bytes("optimizer", Total(passes=1), number) / bandwidth
    return seconds


def _sent(model: Model, setting: Setting) -> float:
    """Bytes that FSDP2 sends and receives for a micro-batch: blocks gathered twice in bfloat16,
    embedding and head in float32, gradients summed in float32."""
    shard, replicate = setting.shard, setting.replicate
    gathered = 2 * 2.0 * model.costs.weights + 4.0 * model.ends
    summed = 4.0 * model.costs.trained
    between = (gathered + summed) * (shard - 1) / shard
    return between + 2 * summed / shard * (replicate - 1) / replicate


def memory(
    config: Config, model: Model, shares: Shares, part_tokens: float, setting: Setting
) -> dict[str, float]:
    """Bytes of one GPU while it updates on micro-batches of `part_tokens`."""
    costs, shard, number = model.costs, setting.shard, model.number
    frozen = (model.parameters - costs.trained) / shard
    mine = replace(costs, trained=costs.trained / shard)
    found = mine.held(config.train.optimizer, number, frozen)
    if setting.shard * setting.replicate > 1:
        found.pop(COPY, None)
        block = costs.weights / model.layers
        found["gathered by FSDP2"] = 3 * number * block + 2 * 4.0 * model.ends
    layers = 1 if setting.checkpointing else model.layers
    kept = shares.kept * model.width * layers
    if setting.checkpointing:
        kept += model.hidden * model.layers
    if setting.checkpointing == "selective":
        kept += model.products
    found["activations"] = number * kept * part_tokens
    if not frozen:
        found["head's gradient"] = 4.0 * costs.head_weights
    return found


def decode_seconds(model: Model, card: Card, shares: Shares, rows: float, length: float) -> float:
    """Of one step of an engine: `rows` tokens, each after `length` others."""
    costs, number = model.costs, model.number
    weights = costs.weights + costs.head_weights
    moved = number * (weights + rows * length * costs.cached) / (card.bandwidth * shares.bandwidth)
    done = (costs.forward(rows, rows * length) + costs.head(rows)) / (card.products)
    return max(moved, done) / shares.decode + shares.step


def estimate(
    config: Config, model: Model, card: Card, trees: Trees, setting: Setting, compiled: bool
) -> Estimate:
    """A step of `train.tasks_per_step` trees on `replicate` times `shard` of a card."""
    on_gpu = card.link > 0
    shares = (COMPILED if compiled else EAGER) if on_gpu else CPU
    ranks = setting.shard * setting.replicate
    work, per_tree = packed(config, trees, setting.budget)
    train = config.train
    updating = memory(config, model, shares, work.tokens, setting)
    state = {
        name: size
        for name, size in updating.items()
        if name in ("float32 masters", "AdamW's moments", COPY, "frozen weights")
    }
    costs, rollout = model.costs, config.rollout
    sizes = rollout.sizes("cuda" if on_gpu else "cpu")
    engine = replace(model, number=_BYTES.get(rollout.dtype or "", model.number))
    weights = float(engine.number * (costs.weights + costs.head_weights))
    token = float(engine.number * costs.cached)
    sampling, cached = dict(state), float("inf")
    if rollout.engine == "local":
        own = costs.engine(engine.number, engine.number, sizes.cache_tokens)
        sampling |= own
        if train.overlap:
            updating |= own
        cached = sizes.cache_tokens
    elif not rollout.sglang.urls:
        held = state.get("float32 masters", 0.0) + state.get(COPY, 0.0)
        share = float(rollout.sglang.args.get("mem_fraction_static", SERVER_SHARE))
        server = share * (card.memory - held)
        sampling["SGLang's server"] = server
        updating["SGLang, lending"] = server if train.overlap else SERVER_LEAVES
        cached = max(0.0, (server - weights) / token)
    mine = ceil(train.tasks_per_step / ranks)
    wanted = max(1, ceil(sizes.max_batch / trees.rows))
    in_flight = int(max(1, min(mine, wanted, cached // (trees.rows * trees.longest))))
    rows = min(sizes.max_batch, in_flight * trees.rows)
    seconds = mine * trees.sampled / rows
    seconds *= decode_seconds(engine, card, shares, rows, trees.longest / 2)
    computed = mine * (trees.unique - trees.sampled)
    seconds += costs.forward(computed, computed * trees.longest / 2) / (card.products * shares.body)
    tasks = train.tasks_per_step / train.updates_per_step
    batches = ceil(round(per_tree * tasks, 6))
    each = Work(*(x * per_tree * tasks / batches for x in work))
    passes = 3 + (train.old_logprob == "recompute")
    mine_of_them = itertools.repeat(each, ceil(batches / ranks))
    update = update_seconds(model, card, shares, mine_of_them, setting, passes=passes)
    return Estimate(
        setting, updating, sampling, train.updates_per_step * update, seconds, in_flight, cached
    )


def settings(gpus: int, longest: int) -> Iterator[Setting]:
    """All that may be suggested."""
    for shard in (n for n in range(1, gpus + 1) if gpus % n == 0):
        for checkpointing in CHECKPOINTING:
            for budget in BUDGETS:
                if budget >= longest:
                    yield Setting(gpus // shard, shard, budget, checkpointing)


def best(estimates: Sequence[Estimate], card: Card) -> Estimate | None:
    """The quickest of those that fit in nine tenths of the memory, or one that takes less of it and
    at most 3 % longer."""
    fit = [e for e in estimates if e.peak <= 0.9 * card.memory]
    if not fit:
        return None
    least = min(e.update + e.rollout for e in fit)
    close = [e for e in fit if e.update + e.rollout <= 1.03 * least]
    dear = CHECKPOINTING.index
    return min(close, key=lambda e: (dear(e.setting.checkpointing), e.peak))


def this_cpu() -> Card:
    """This machine's processor and memory, measured; in float32."""
    import psutil

    cpu = torch.device("cpu")
    rate = limits.products(cpu, torch.float32)
    return Card("this CPU", psutil.virtual_memory().total, rate, limits.memory(cpu), 0.0)


def find_card(name: str) -> Card:
    """Raises `LookupError`."""
    if name.lower() == "cpu":
        return this_cpu()
    if name.lower() not in CARDS:
        raise LookupError(f"--gpu {name}: known are {', '.join(CARDS)} and cpu")
    return CARDS[name.lower()]


def plan(
    config: Config, gpus: int, gpu: str, lengths: Sequence[int], file: Path | None = None
) -> None:
    """Print the estimate as configured and the one suggested. `lengths`: see `Lengths`; `file`:
    saved trees in their place. Raises `LookupError` for what cannot be planned."""
    if min(gpus, *lengths[:3]) < 1 or lengths[3] < 0:
        raise LookupError("--gpus and --lengths have to be at least 1, an answer 0")
    if file is not None and not file.is_file():
        raise LookupError(f"--trees {file}: there is no such file")
    card, console = find_card(gpu), Console()
    wide = config.model.dtype == "float32" or not card.link
    with quiet():
        model = Model.of(described(config.model)[0], 4 if wide else 2)
    trees = grow(config, Lengths(*lengths))
    if file is not None:
        trees = Trees.of(io.load(file), trees.rows)
    compiled = config.model.compile is not False and card.link > 0
    parallel, train = config.parallel, config.train
    now = Setting(
        parallel.replicate,
        parallel.shard,
        train.micro_batch_tokens,
        config.model.gradient_checkpointing,
    )
    said = [
        f"{model.parameters / 1e9:.2f} billion weights on {gpus} x {card.name}; a step has "
        f"{train.tasks_per_step} trees of {config.algo.n_total} trajectories, {trees.whole:,.0f} "
        f"tokens each, of which {trees.unique:,.0f} are computed: {trees.whole / trees.unique:.1f} "
        "times fewer",
    ]
    columns: list[tuple[str, Estimate]] = []
    if now.replicate * now.shard == gpus:
        columns.append(("as configured", estimate(config, model, card, trees, now, compiled)))
    else:
        said.append(
            f"parallel.replicate={now.replicate} times parallel.shard={now.shard} are not "
            f"{gpus} GPUs"
        )
    tried = [
        estimate(config, model, card, trees, setting, compiled)
        for setting in settings(gpus, trees.longest)
    ]
    found = best(tried, card)
    if found is not None:
        columns.append(("suggested", found))
    elif tried:
        columns.append(("the least memory", min(tried, key=lambda e: e.peak)))
    else:
        raise ConfigError(
            f"a trajectory of {trees.longest} tokens is longer than the largest micro-batch that "
            f"is tried, {BUDGETS[-1]}; give shorter lengths"
        )
    console.print(*said, sep="\n", highlight=False, soft_wrap=True)
    console.print(_table(columns, train.tasks_per_step * trees.whole))
    for line in _verdicts(columns, found, card, config):
        console.print(line, highlight=False, soft_wrap=True)


def _table(columns: Sequence[tuple[str, Estimate]], tokens: float) -> Table:
    table = Table()
    table.add_column("")
    for title, _ in columns:
        table.add_column(title, justify="right")
    found, row = [each for _, each in columns], table.add_row
    row("parallel.replicate", *(str(e.setting.replicate) for e in found))
    row("parallel.shard", *(str(e.setting.shard) for e in found))
    row("train.micro_batch_tokens", *(str(e.setting.budget) for e in found))
    row("model.gradient_checkpointing", *(str(e.setting.checkpointing).lower() for e in found))
    row("rollout.trees_in_flight, of each", *(str(e.in_flight) for e in found))
    table.add_section()
    for kind in ("updating", "sampling"):
        names = dict.fromkeys(name for e in found for name in getattr(e, kind))
        for name in names:
            sizes = (getattr(e, kind).get(name, 0.0) for e in found)
            row(f"GB {kind}: {name}", *(f"{size / GB:.1f}" for size in sizes))
        row(f"GB {kind}", *(f"{sum(getattr(e, kind).values()) / GB:.1f}" for e in found))
    table.add_section()
    row("seconds sampling", *(f"{e.rollout:.1f}" for e in found))
    row("seconds updating", *(f"{e.update:.1f}" for e in found))
    row("seconds of a step", *(f"{e.rollout + e.update:.1f}" for e in found))
    row("rollout, tokens/s", *(f"{tokens / e.rollout:,.0f}" for e in found))
    row("training, tokens/s", *(f"{tokens / e.update:,.0f}" for e in found))
    return table


def _verdicts(
    columns: Sequence[tuple[str, Estimate]], found: Estimate | None, card: Card, config: Config
) -> Iterator[str]:
    room = 0.9 * card.memory
    for title, each in columns:
        for kind in ("updating", "sampling"):
            parts = getattr(each, kind)
            if (size := sum(parts.values())) > room:
                most = max(parts, key=lambda name: parts[name])
                yield (
                    f"{title} does not fit: {kind} takes {size / GB:.0f} of {room / GB:.0f} GB "
                    f"(nine tenths of the memory), most of it {most} with {parts[most] / GB:.0f}"
                )
        if each.cached < config.rollout.max_tokens:
            yield (
                f"{title} leaves the engine a cache of {each.cached:,.0f} tokens, less than "
                f"rollout.max_tokens={config.rollout.max_tokens}; raise mem_fraction_static or "
                "tp_size"
            )
    if found is None:
        yield (
            "nothing fits: take more GPUs, a smaller model, model.lora or train.optimizer=adamw8bit"
        )
    errors = ", ".join(f"{name} {error:.0%}" for name, error in MEASURED.items())
    yield f"largest errors over what was measured (bench/results): {errors}"
    if card.link:
        yield (
            "not measured yet: decoding on GPUs, the link between them, checkpointed activations; "
            "tools are taken to hide behind decoding"
        )
