"""Fused log-prob and policy-loss kernels."""
