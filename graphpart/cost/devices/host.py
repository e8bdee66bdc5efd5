"""What this host has, and what one of several workers on its CPU gets of it."""

from __future__ import annotations

import os

from graphpart.cost.devices.datasheets import DATA_SHEETS, cpu_worker
from graphpart.ir.cluster import Device

CPU = "CPU"
"""The kind of a worker on this host's CPU."""


def is_cpu(kind: str) -> bool:
    """Whether a kind, as somebody wrote it, is a worker on this host's CPU."""
    return kind.upper() == CPU


def known_kinds() -> str:
    """The kinds whose figures need not be given."""
    return ", ".join((CPU, *(sheet.kind for sheet in DATA_SHEETS)))


def host_worker(index: int, num_workers: int) -> Device:
    """One of several equal workers on this host's CPU."""
    return cpu_worker(index, num_workers, num_cores=host_cores(), host_memory_bytes=host_memory_bytes())


def host_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory_bytes() -> int:
    """Memory of this host; 8 GiB where the system doesn't say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 8 * 2**30
