"""Memory of the host that is kept for the next step, as PyTorch keeps that of a GPU.

A step frees all that it allocates. Left alone, the C library gives the pages back to the system as soon as they are
free, and the next step has each one mapped and zeroed again: 3 to 7 % of a step on a CPU.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Iterable
from functools import cache

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of ``mallopt`` (its manual page, section 3 of Linux' manual)."""

_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")

_HEAP_BYTES = 64 << 20
"""A thread's memory comes in pieces of this size; with so much padding asked for, free ones are kept."""


def keep_host_memory(owner: object, devices: Iterable[torch.device]) -> None:
    """Have the process keep freed memory of the host as long as an object lives that works on a CPU.

    Does nothing where no device is a CPU, where the C library is another than GNU's, or where the user has set its
    thresholds in the environment (``MALLOC_TRIM_THRESHOLD_`` and its like, or ``GLIBC_TUNABLES``).

    Args:
        owner: what uses the memory; when it goes, the process gives back what is free.
        devices: those that it works on in this process.
    """
    library = _tuned() if any(device.type == "cpu" for device in devices) else None
    if library is not None:
        weakref.finalize(owner, library.malloc_trim, 0).atexit = False


@cache
def _tuned() -> ctypes.CDLL | None:
    """The C library, told once to keep what is freed; None where it can't be told."""
    told = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in _OWN_SETTINGS)
    if told or sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    library.mallopt(_TRIM_THRESHOLD, -1)
    library.mallopt(_TOP_PAD, _HEAP_BYTES)
    library.mallopt(_MMAP_MAX, 0)
    return library
