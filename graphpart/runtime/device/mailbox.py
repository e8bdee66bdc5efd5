"""What every kind of mailbox promises to a worker, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from graphpart.ir.program import Bridge


class Aborted(Exception):
    """Another worker failed; this one stops waiting. Never reaches the user."""


@dataclass(slots=True)
class Counters:
    """Messages a worker has sent.

    Attributes:
        num_messages: how many.
        message_bytes: their bytes.
        tags: of each of them, in the order of sending.
    """

    num_messages: int = 0
    message_bytes: int = 0
    tags: list[int] = field(default_factory=list)

    def count(self, bridge: Bridge, tensor: torch.Tensor) -> None:
        """Add one message."""
        self.num_messages += 1
        self.tags.append(bridge.tag)
        self.message_bytes += tensor.numel() * tensor.element_size()


class Mailbox(Protocol):
    """Carries the messages of one step for one worker.

    What crosses lies in memory as if made there, so that bits don't depend on whether it was copied.
    """

    counters: Counters

    def send(self, bridge: Bridge, tensor: torch.Tensor) -> None:
        """Send without waiting for the receiver."""

    def receive(self, bridge: Bridge, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Wait for the message of a bridge, at most until the deadline."""
