"""By what way the processes of a group reach each other: over which device, and in which group."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist


def wire_device(group: dist.ProcessGroup) -> torch.device:
    """The device from which this process gathers and broadcasts in ``group``: its GPU with NCCL, else the CPU."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def group_for_messages() -> Callable[[], dist.ProcessGroup | None]:
    """The group in which the processes send each other messages from host memory; every process has to ask for it.

    NCCL knows no tags: two processes would have to name their messages in one order, and large ones that cross would
    wait for each other. So where it is all there is, messages go in a group of Gloo beside it.

    Returns:
        Gives the group, None for the whole world's own: a group that outlives its destruction aborts the interpreter.
    """
    if "cpu:" in dist.get_backend_config():
        return lambda: None
    return weakref.ref(dist.new_group(backend="gloo"))
