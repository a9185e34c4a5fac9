"""Keep freed memory in the process, so that later steps need not request it again.

The C library returns large blocks to the system when they are freed. Every step then maps and
clears the same gigabytes again, which takes a seventh of a training step on the CPU.
"""

import ctypes
import sys

# Parameters of mallopt(3), from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def can_keep_memory() -> bool:
    """Whether the C library supports it (glibc)."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def keep_freed_memory() -> None:
    """Keep freed memory for the rest of the process, whose size then never shrinks.

    Raises:
        OSError: the C library refuses.
    """
    libc = ctypes.CDLL(None)
    # No block has its own mapping, and the heap is never trimmed (mallopt(3)).
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        raise OSError("mallopt: the C library does not take these settings")
