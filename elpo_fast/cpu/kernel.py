"""How a function of this wing becomes a kernel.

Numba keeps compiled code on disk and looks at the file of a kernel's own, to see whether it has
changed. Kernels here call helpers of other files, so their code is kept under a name that depends
on all of the wing: any change compiles it again.
"""

# Kernels are typed by their compilation.
# mypy: ignore-errors

from __future__ import annotations

import hashlib
from pathlib import Path

from numba import njit
from numba.core.caching import IndexDataCacheFile, NullCache

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
            forceinline=not parallel,
        )(function)
        cache = made._cache
        if not isinstance(cache, NullCache):
            cache._cache_file = IndexDataCacheFile(
                cache_path=cache._cache_path,
                filename_base=f"{cache._impl.filename_base}-{SOURCES[:8]}",
                source_stamp=cache._impl.locator.get_source_stamp(),
            )
        return made

    return compiled
