"""Fused log-prob and policy-loss kernels, and attention along the paths of trees."""

from elpo_kernels.adapters.module import LinearPolicyLoss
from elpo_kernels.attention import TreePlan, register_attention, tree_attention
from elpo_kernels.backend import widens_bfloat16
from elpo_kernels.linear import LoRA, linear_logprob, linear_policy_loss
from elpo_kernels.logits import logits_policy_loss, logprob_from_logits
from elpo_kernels.policy import PolicyLossOutput, PolicyStats, policy_loss

__all__ = [
    "LinearPolicyLoss",
    "LoRA",
    "PolicyLossOutput",
    "PolicyStats",
    "TreePlan",
    "linear_logprob",
    "linear_policy_loss",
    "logits_policy_loss",
    "logprob_from_logits",
    "policy_loss",
    "register_attention",
    "tree_attention",
    "widens_bfloat16",
]
