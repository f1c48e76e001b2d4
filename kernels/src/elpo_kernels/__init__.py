"""Fused log-prob and policy-loss kernels, and attention along the paths of trees."""

from elpo_kernels._backend import widens_bfloat16
from elpo_kernels._tree_blocks import TreePlan
from elpo_kernels.attention import tree_attention
from elpo_kernels.linear import LoRA, linear_logprob, linear_policy_loss
from elpo_kernels.logits import logits_policy_loss, logprob_from_logits
from elpo_kernels.module import LinearPolicyLoss
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
    "tree_attention",
    "widens_bfloat16",
]
