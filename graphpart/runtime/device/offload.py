"""Boundary activations in host memory, from the forward of a segment that runs again to its backward.

What such a segment reads is all that it keeps; on a GPU that goes to pinned host memory on a stream of its own, and
comes back on another, so that both overlap with compute (M. Rhu et al., "vDNN", MICRO 2016).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SMALLEST_BYTES = 1 << 18
"""Tensors below this size stay where they are: a copy would take longer than it is worth."""


class Shelved(Protocol):
    """A tensor that was put away."""

    def back(self) -> Tensor:
        """The tensor, on its device, with the same strides; the device's work from now on waits for it."""


class Shelf(Protocol):
    """Where a device puts tensors away."""

    def put(self, tensor: Tensor) -> Shelved:
        """Put a tensor away; its memory on the device is free once nothing else holds it and the copy is done."""


def shelf_of(device: torch.device) -> Shelf:
    """The shelf of a device: pinned host memory for a GPU.

    Args:
        device: a CUDA device.
    """
    return PinnedShelf(device)


def is_worth_it(tensor: Tensor) -> bool:
    """Whether a tensor may be put away: large enough, and without gaps, so that it comes back with its strides."""
    dense = torch.ops.aten.is_non_overlapping_and_dense(tensor)
    return bool(dense) and tensor.numel() * tensor.element_size() >= SMALLEST_BYTES


class PinnedShelf:
    """Pinned host memory; PyTorch keeps it for reuse.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.away, self.home = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def put(self, tensor: Tensor) -> PinnedTensor:
        """Start the copy to the host, after what the device does now."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self.away.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.away):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.away)
        return PinnedTensor(host, self.away.record_event(), self)


@dataclass(eq=False)
class PinnedTensor:
    """A tensor in pinned host memory, or on its way there.

    Attributes:
        host: the copy.
        arrived: when it is complete.
        shelf: whose it is.
    """

    host: Tensor
    arrived: torch.cuda.Event
    shelf: PinnedShelf

    def back(self) -> Tensor:
        """Start the copy back; the device's work from now on waits for it."""
        current = torch.cuda.current_stream(self.shelf.device)
        self.shelf.home.wait_event(self.arrived)
        with torch.cuda.stream(self.shelf.home):
            tensor = torch.empty_like(self.host, device=self.shelf.device)
            tensor.copy_(self.host, non_blocking=True)
        current.wait_stream(self.shelf.home)
        tensor.record_stream(current)
        return tensor
