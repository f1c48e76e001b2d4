"""What the figures of a step mean where something goes wrong, in words and with the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLLAPSED = 0.1  # entropy as a share of the first step's
MALFORMED, FEW_CALLS = 0.1, 10  # share of calls; as few say nothing
APART_NATS, APART_ESS = 0.1, 0.5  # mean size of log-prob differences; effective sample size


def advice(values: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> dict[str, str]:
    """A sentence for each thing that is wrong with a step of these metrics, by a name for it.
    `first` are those of the run's first step."""
    found: dict[str, str] = {}
    n, faults = values["trajectories"], values.get("faults", 0)
    if faults:
        found["faults"] = (
            f"{faults} of {n} trajectories were ended by an exception in a tool, a reward or a "
            "parser of calls, not by the model, and count as failed; the first of each kind was "
            "logged with its traceback"
        )
    if faults < n and (not values["updates"] or values.get("grad_norm") == 0):
        success = values["success"]
        if success == 1:
            found["solved"] = (
                f"the step trains on nothing: all {n} trajectories are correct; take harder tasks, "
                "or stop here"
            )
        elif success == 0:
            found["failed"] = (
                f"the step trains on nothing: all {n} trajectories fail; read some (elpo show "
                "RUN --failed), take easier tasks or a model that knows the tool (a cold start by "
                "sft.data or sft.demonstrations), or raise "
                "rollout.max_turns or max_tokens where trajectories end by these"
            )
        else:
            found["uniform"] = (
                "the step trains on nothing: each task is solved by all of its trajectories or by "
                f"none ({success:.0%} correct); raise algo.n_total or train.tasks_per_step, or "
                "take tasks of middle difficulty"
            )
    if first is not None and values["entropy"] < COLLAPSED * first["entropy"]:
        found["entropy"] = (
            f"the policy's entropy collapses: {values['entropy']:.2g} nats a token, after "
            f"{first['entropy']:.2g} at the first step; lower train.lr, or raise "
            "algo.clip.eps_high or rollout.temperature"
        )
    calls, malformed = values.get("tool_runs", 0), values["malformed_calls"]
    if calls >= FEW_CALLS and malformed > MALFORMED * calls:
        found["malformed"] = (
            f"{malformed} of {calls} tool calls cannot be read; show the format in task.system, "
            "set rollout.call_format or model.chat_template as the model knows them, raise "
            "rollout.max_turn_tokens where calls are cut off, or begin with a cold start "
            "(sft.demonstrations)"
        )
    if values.get("mismatch_mean", 0) > APART_NATS or values.get("mismatch_ess", 1) < APART_ESS:
        found["apart"] = (
            f"engine and trainer drift apart: their log-probs differ by "
            f"{values['mismatch_mean']:.2g} nats on average, effective sample size "
            f"{values['mismatch_ess']:.0%}; set rollout.dtype=float32 or model.dtype=float32, or "
            "train.old_logprob=recompute with train.importance_sampling=token"
        )
    return found
