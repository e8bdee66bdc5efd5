"""How processes tell each other what went wrong."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from graphpart.errors import DeadlineError, ExecutionError

_FAULT, _READERS = "graphpart/fault", "graphpart/fault/readers"
_LINGER_S = 5.0


def publish_fault(rank: int, reason: BaseException, group: dist.ProcessGroup | None = None) -> None:
    """Leave the first fault where every process finds it, then wake those that wait for a message of this one."""
    store = dist.distributed_c10d._get_default_store()
    store.compare_set(_FAULT, "", f"rank {rank} failed: {reason}")
    store.add(_READERS, 0)
    # Gloo has no abort; a receive that times out at once closes this process's connections, which ends the waits of
    # its peers. The group cannot be used after a fault anyway: the ranks are no longer at the same step.
    with contextlib.suppress(RuntimeError):
        peer = (rank + 1) % dist.get_world_size()
        work = dist.irecv(torch.empty(1, dtype=torch.uint8), peer, group=group, tag=2**30)
        if work is not None:
            work.wait(datetime.timedelta(milliseconds=1))
    # This process may end now and take the store with it, so it stays until the others have read.
    give_up = time.monotonic() + _LINGER_S
    with contextlib.suppress(RuntimeError):
        while store.add(_READERS, 0) < dist.get_world_size() - 1 and time.monotonic() < give_up:
            time.sleep(0.02)


def known_fault() -> str:
    """The first fault that any process has published; empty if there is none, or nobody left to ask."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.get(_FAULT).decode() if store.check([_FAULT]) else ""
    except RuntimeError:
        return ""


@contextlib.contextmanager
def faults_named(waiting: str, deadline_s: float) -> Iterator[None]:
    """Turn a broken or late message into an error that says which process failed, and why.

    Raises:
        ExecutionError: with the fault of the process that failed first.
        DeadlineError: if no process failed but the message is late.
    """
    try:
        yield
    except RuntimeError as reason:
        fault = known_fault()
        if fault:
            with contextlib.suppress(RuntimeError):
                dist.distributed_c10d._get_default_store().add(_READERS, 1)
            raise ExecutionError(f"{fault} ({waiting} meanwhile)") from reason
        if "imed out" in str(reason) or "imeout" in str(reason):
            raise DeadlineError(f"{waiting} longer than {deadline_s:g} s; is that process still running?") from reason
        raise ExecutionError(f"{waiting}, but the connection was lost; that process has ended: {reason}") from reason
