"""See `adapters.verl`."""

from elpo_kernels.adapters.verl import AGGREGATIONS, policy_loss

__all__ = ["AGGREGATIONS", "policy_loss"]
