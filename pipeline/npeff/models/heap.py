"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_ON_HEAP = 32 << 20
"""The most that glibc lets M_MMAP_THRESHOLD be."""


def keep_freed_memory() -> bool:
    """Have what a batch frees kept for the next one, which takes as much; whether that could be arranged (glibc only).

    The heap is otherwise given back to the system after every batch, and every page of it is asked for and cleared
    anew: one to three hundredths of the time of a pass on a CPU. The most that the process ever holds stays the same.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # setting the one stops glibc from adapting the other: both or none
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
