"""Fused log-prob and policy-loss kernels."""

from elpo_kernels.linear import linear_logprob, linear_policy_loss
from elpo_kernels.policy import PolicyLossOutput, PolicyStats, policy_loss

__all__ = [
    "PolicyLossOutput",
    "PolicyStats",
    "linear_logprob",
    "linear_policy_loss",
    "policy_loss",
]
