"""Memory that a process has freed and still holds."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_memory_back() -> None:
    """Hand to the system what the C library keeps of freed tensors.

    A process runs trial after trial, or mix after mix, and glibc keeps the pages of what was freed:
    one that had once ranked long lists would hold their memory through all that comes after.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
