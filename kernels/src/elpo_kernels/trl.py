"""See `adapters.trl`."""

from elpo_kernels.adapters.trl import FusedPolicyLoss

__all__ = ["FusedPolicyLoss"]
