"""Attention along the paths of trees.

To be read from the bottom up: `plan` says what sees what, `blocks` what of that is worth visiting,
`kernels` visit it, in the `tiles` of each chip; `ops` is their operator; `functions` what is
called, and what else may compute it (`dense`, `flex`, `varlen`).
"""

from elpo_kernels.attention.functions import register_attention, tree_attention
from elpo_kernels.attention.plan import TreePlan

__all__ = ["TreePlan", "register_attention", "tree_attention"]
