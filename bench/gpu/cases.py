"""The kernels' random problems and their float64 truth, which are no part of their distribution."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "kernels" / "tools"))

from kernel_cases import (
    error,
    make_case,
    make_forest,
    true_attention,
    true_policy,
    truth,
)

__all__ = ["error", "make_case", "make_forest", "true_attention", "true_policy", "truth"]
