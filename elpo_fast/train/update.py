"""What a step does with its trees: advantages, micro-batches, the objective, updates."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from elpo_fast.algo import score
from elpo_fast.config import Config, ConfigError
from elpo_fast.faults import enough_memory
from elpo_fast.model.load import load_model
from elpo_fast.regions import region
from elpo_fast.train.export import export_model
from elpo_fast.train.metrics import mean_stats, trajectory_tokens
from elpo_fast.train.objective import ObjectiveStats, linearised, with_entropy
from elpo_fast.train.offpolicy import corrected, log_ratios, mismatch, sequence_weights
from elpo_fast.train.parts import Parts
from elpo_fast.train.step import PolicyOptimizer
from elpo_fast.tree.pack import PackedBatch, Scored, active, micro_batches
from elpo_fast.tree.store import Forest


def update_policy(
    policy: PolicyOptimizer,
    forest: Forest,
    config: Config,
    rng: np.random.Generator,
    reference: PolicyOptimizer | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """`updates_per_step` updates of the policy, each on its share of a step's trees, which `rng`
    draws; their figures. `reference`: what `algo.kl_coef` keeps the policy near to.

    Raises `NonFiniteError`.
    """
    algo, train, trees = config.algo, config.train, len(forest)
    with region("scoring"):
        scored = score(forest, algo)
        skips = train.skip_uniform and not (algo.kl_coef or algo.entropy_coef)
        useful = active(forest, scored) if skips else np.ones(trees, bool)
    shares = np.array_split(rng.permutation(trees), train.updates_per_step)

    def in_batches(scored: Scored) -> list[list[PackedBatch]]:
        budget = train.micro_batch_tokens
        with region("packing"):
            return [
                micro_batches(forest, scored, share[useful[share]], budget, scale=1 / len(share))
                for share in shares
            ]

    groups, figures = in_batches(scored), {}
    if train.old_logprob == "recompute":
        batches = [batch for group in groups for batch in group]
        logprobs = policy.logprobs(batches)
        gaps = log_ratios(batches, logprobs)
        agent = [gap[batch.agent == 1] for batch, gap in zip(batches, gaps, strict=True)]
        figures = mismatch(np.concatenate(agent)) if agent else {}
        if train.importance_sampling == "sequence":
            factor = sequence_weights(forest, batches, gaps, train.importance_cap)
            with region("scoring"):
                scored = score(forest, algo, factor)
            groups = in_batches(scored)  # of the same tokens in the same order
        fresh = zip(logprobs, gaps, strict=True)
        groups = [[corrected(batch, *next(fresh), train) for batch in group] for group in groups]
    updates, divergence = [], []
    for number, (share, batches) in enumerate(zip(shares, groups, strict=True)):
        say(f"update {number + 1}/{len(groups)}")
        if batches:
            with region("scoring"):
                batches, found = _objective(
                    policy, reference, forest, scored, batches, config, 1 / len(share)
                )
            made = policy.update(batches)
            updates.append(found.of(made) if found else made)
            divergence += [found.reference_kl] if found and algo.kl_coef else []
            with region("optimizer"):
                release_memory()
    if divergence:
        figures["reference_kl"] = float(np.mean(divergence))
    with region("trees"):
        if train.old_logprob == "rollout" and updates:
            figures |= mismatch(updates[0].gap)
        computed = sum(update.tokens for update in updates)
        lengths = np.add.reduceat(trajectory_tokens(forest), forest.leaf_start[:-1])
        return {
            **mean_stats(updates),
            **figures,
            "skipped_trees": int((~useful).sum()),
            "computed_tokens": computed,
            "sharing_computed": int(lengths[useful].sum()) / max(computed, 1),
        }


def _objective(
    policy: PolicyOptimizer,
    reference: PolicyOptimizer | None,
    forest: Forest,
    scored: Scored,
    batches: list[PackedBatch],
    config: Config,
    scale: float,
) -> tuple[list[PackedBatch], ObjectiveStats | None]:
    """Batches of the configured objective, and its figures where they are not the update's."""
    algo = config.algo
    if algo.entropy_coef:
        batches = with_entropy(forest, scored, batches, algo.entropy_coef * scale)
    if algo.ratio == "token" and reference is None:
        return batches, None
    return linearised(
        policy,
        forest,
        scored,
        batches,
        ratio=algo.ratio,
        scale=scale,
        kl_coef=algo.kl_coef,
        reference=reference.logprobs(batches) if reference else (),
    )


def make_reference(parts: Parts, config: Config, begins: bool) -> PolicyOptimizer:
    """The policy as it was when reinforcement learning began, in the run folder `reference`: now,
    or in the run that is resumed."""
    loaded, policy, path = parts.loaded, parts.policy, config.run_dir / "reference"
    if begins:
        export_model(path, loaded.model, loaded.tokenizer, parts.ranks)
    elif not path.is_dir():
        raise ConfigError(
            f"algo.kl_coef={config.algo.kl_coef:g}: {path} is not there, because the run began "
            "without it; set 0, or start a new run"
        )
    plain = {"name": str(path), "revision": None, "lora": None}
    with enough_memory("loading the reference policy", "take a smaller model"):
        model = load_model(config.model.model_copy(update=plain), seed=config.run.seed).model
    return PolicyOptimizer(model, lr=0.0, temperature=policy.temperature, dtype=policy.dtype)


def release_memory() -> None:
    """Give freed pages back to the system. glibc keeps them, scattered over its heap, and the
    process grows by gigabytes over a few steps; elsewhere this does nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
