"""How messages travel between the workers of one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import torch

from graphpart.errors import DeadlineError
from graphpart.ir.program import Bridge
from graphpart.runtime.device.mailbox import Aborted, Counters
from graphpart.runtime.kernels.memory import settled


class Post:
    """Where the workers of one process leave messages for each other during one step."""

    def __init__(self, devices: Iterable[torch.device], deadline_s: float) -> None:
        self.devices = tuple(devices)
        self.deadline_s = deadline_s
        self.arrived: dict[int, torch.Tensor] = {}
        self.changed = threading.Condition()
        self.aborted = False

    def abort(self) -> None:
        """Wake every waiting worker with :class:`Aborted`."""
        with self.changed:
            self.aborted = True
            self.changed.notify_all()


class LocalMailbox:
    """Passes tensors by reference between CPU workers, and by copy between GPUs."""

    def __init__(self, post: Post) -> None:
        self.post = post
        self.counters = Counters()

    def send(self, bridge: Bridge, tensor: torch.Tensor) -> None:
        """Leave the message for its receiver, on the receiver's device."""
        tensor = settled(tensor)
        self.counters.count(bridge, tensor)
        tensor = tensor.to(self.post.devices[bridge.destination])
        with self.post.changed:
            self.post.arrived[bridge.tag] = tensor
            self.post.changed.notify_all()

    def receive(self, bridge: Bridge, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Wait for the message, take it away."""
        post = self.post
        give_up = time.monotonic() + post.deadline_s
        with post.changed:
            while bridge.tag not in post.arrived:
                if post.aborted:
                    raise Aborted
                if not post.changed.wait(timeout=max(0.0, give_up - time.monotonic())):
                    raise DeadlineError(
                        f"device {bridge.destination} waited {post.deadline_s:g} s for {bridge.wire!r} "
                        f"({bridge.size_bytes} bytes) from device {bridge.source}; see whether that device still "
                        "computes, or partition with a larger deadline_s="
                    )
            return post.arrived.pop(bridge.tag)
