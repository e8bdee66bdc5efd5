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


class Exchange:
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

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.counters = Counters()

    def send(self, bridge: Bridge, tensor: torch.Tensor) -> None:
        """Leave the message for its receiver, on the receiver's device."""
        tensor = settled(tensor)
        self.counters.count(bridge, tensor)
        tensor = tensor.to(self.exchange.devices[bridge.destination])
        with self.exchange.changed:
            self.exchange.arrived[bridge.tag] = tensor
            self.exchange.changed.notify_all()

    def receive(self, bridge: Bridge, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Wait for the message, take it away."""
        exchange = self.exchange
        give_up = time.monotonic() + exchange.deadline_s
        with exchange.changed:
            while bridge.tag not in exchange.arrived:
                if exchange.aborted:
                    raise Aborted
                if not exchange.changed.wait(timeout=max(0.0, give_up - time.monotonic())):
                    raise DeadlineError(
                        f"device {bridge.destination} waited {exchange.deadline_s:g} s for {bridge.wire!r} "
                        f"({bridge.size_bytes} bytes) from device {bridge.source}"
                    )
            return exchange.arrived.pop(bridge.tag)
