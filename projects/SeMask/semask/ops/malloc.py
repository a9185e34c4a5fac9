"""Keep freed memory in the process, so that later steps need not request it again.

The C library returns large blocks to the system when they are freed. Every step then maps and
clears the same gigabytes again, which takes a seventh of a training step on the CPU.
"""

import ctypes
import sys

# Parameters of mallopt(3), from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4

# Larger blocks are returned: in a heap that keeps them, small blocks that stay take their places.
LARGEST_KEPT = 2**27


def can_keep_memory() -> bool:
    """Whether the C library supports it (glibc)."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def keep_freed_memory() -> None:
    """Keep freed memory for the rest of the process, whose size then never shrinks.

    Raises:
        OSError: the C library refuses.
    """
    libc = ctypes.CDLL(None)
    # Only the largest blocks have their own mappings, and the heap is never trimmed (mallopt(3)).
    # Older versions do not take such a threshold: there no block has its own mapping.
    keeps = libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT) or libc.mallopt(_M_MMAP_MAX, 0)
    if not (keeps and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        raise OSError("mallopt: the C library does not take these settings")
