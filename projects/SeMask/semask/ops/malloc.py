"""Keep freed memory in the process, so that no step has to request it from the system again.

The C library gives large blocks back to the system when they are freed. Every step then pays for
mapping and clearing the same gigabytes once more: a seventh of a training step on the CPU.
"""

import ctypes
import sys

# Parameters of mallopt(3), from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def can_keep_memory() -> bool:
    """Whether the C library is one that can be told (glibc)."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def keep_freed_memory() -> None:
    """From now on, for the whole process. Its size stays at the largest it has had.

    Raises:
        OSError: the C library has refused.
    """
    libc = ctypes.CDLL(None)
    # No block has a mapping of its own, and the heap is never cut (mallopt(3)).
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        raise OSError("mallopt: the C library does not take these settings")
