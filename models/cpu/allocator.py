"""The C library's allocator keeps what is freed, as every training step allocates the same blocks again."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST = 32 * 2**20  # bytes: older versions of glibc refuse more
_NEVER = 2**31 - 1


@cache
def keep_freed_memory() -> bool:
    """Blocks of up to 32 MiB stay with the process when freed, instead of coming back as page faults.

    Returns whether the C library took it; others than glibc do not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _NEVER))
