"""How processes tell each other what went wrong."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from graphpart.errors import DeadlineError, ExecutionError, GraphpartError

_FAULT, _READERS = "graphpart/fault", "graphpart/fault/readers"
_LATE, _FAILED = "late", "failed"
_LINGER_S = 5.0


class Fault(NamedTuple):
    """What went wrong first, of all processes.

    Attributes:
        says: which process, and what.
        is_late: whether that process did not fail, but did not come in time.
    """

    says: str
    is_late: bool = False


def publish_fault(fault: Fault, num_readers: int, group: dist.ProcessGroup | None = None) -> None:
    """Leave the first fault where every process finds it, then wake those that wait for a message of this one.

    Args:
        fault: left there unless another process has left one before.
        num_readers: how many processes may read it; this one stays a while until they have.
        group: the one in which processes send each other messages; None for the whole world's own.
    """
    store = dist.distributed_c10d._get_default_store()
    store.compare_set(_FAULT, "", f"{_LATE if fault.is_late else _FAILED} {fault.says}")
    store.add(_READERS, 0)
    # Gloo has no abort; a receive that times out at once closes this process's connections, which ends the waits of
    # its peers. The group cannot be used after a fault anyway: the ranks are no longer at the same step.
    with contextlib.suppress(RuntimeError):
        peer = (dist.get_rank() + 1) % dist.get_world_size()
        work = dist.irecv(torch.empty(1, dtype=torch.uint8), peer, group=group, tag=2**30)
        if work is not None:
            work.wait(datetime.timedelta(milliseconds=1))
    # This process may end now and take the store with it, so it stays until the others have read.
    give_up = time.monotonic() + _LINGER_S
    with contextlib.suppress(RuntimeError):
        while store.add(_READERS, 0) < num_readers and time.monotonic() < give_up:
            time.sleep(0.02)


def known_fault() -> Fault | None:
    """The first fault that any process has published; None if there is none, or nobody left to ask."""
    try:
        store = dist.distributed_c10d._get_default_store()
        if not store.check([_FAULT]):
            return None
        kind, _, says = store.get(_FAULT).decode().partition(" ")
    except RuntimeError:
        return None
    return Fault(says, kind == _LATE)


def is_timeout(reason: BaseException) -> bool:
    """Whether a wait for a message has ended because it took too long."""
    return "imed out" in str(reason) or "imeout" in str(reason)


@contextlib.contextmanager
def faults_named(waiting: str, deadline_s: float) -> Iterator[None]:
    """Turn a broken or late message into an error that says which process failed, and why.

    Raises:
        ExecutionError: with the fault of the process that failed first.
        DeadlineError: if no process failed but the message, or a process, is late.
    """
    try:
        yield
    except RuntimeError as reason:
        if isinstance(reason, GraphpartError):
            raise
        fault = known_fault()
        if fault:
            with contextlib.suppress(RuntimeError):
                dist.distributed_c10d._get_default_store().add(_READERS, 1)
            kind = DeadlineError if fault.is_late else ExecutionError
            raise kind(f"{fault.says} ({waiting} meanwhile)") from reason
        if is_timeout(reason):
            raise DeadlineError(f"{waiting} longer than {deadline_s:g} s; is that process still running?") from reason
        raise ExecutionError(f"{waiting}, but the connection was lost; that process has ended: {reason}") from reason
