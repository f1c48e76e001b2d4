"""How a function of this wing becomes a kernel.

Numba keeps compiled code on disk and looks at the file of a kernel's own, to see whether it has
changed. Kernels here call helpers of other files, so theirs is kept for the whole wing: any change
compiles it again.
"""

# Kernels are typed by their compilation.
# mypy: ignore-errors

from __future__ import annotations

import hashlib
from pathlib import Path

from numba import njit
from numba.core.caching import NullCache

SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()


def kernel(*, fast=False, parallel=False, inline="never"):
    """Without the interpreter's lock and without Python's division by zero. `fast`: sums in any
    order, and neither infinities nor NaN are expected; `parallel`: with `prange`."""

    def compiled(function):
        made = njit(
            cache=True,
            error_model="numpy",
            nogil=True,
            fastmath=fast,
            parallel=parallel,
            inline=inline,
        )(function)
        if not isinstance(made._cache, NullCache):
            file = made._cache._cache_file
            file._source_stamp = (*file._source_stamp, SOURCES)
        return made

    return compiled
