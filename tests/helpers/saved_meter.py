"""What workers really keep for their backward over a step, storage by storage."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from graphpart.ir.program import Segment, Wire
from graphpart.module.traced_call import TracedCall
from graphpart.runtime.device.rerun import Rerun
from graphpart.runtime.device.worker import DeviceRun


class SavedMeter:
    """Bytes that each device keeps for backward, now and at most; parameters and buffers aside, and parts of them.

    Attributes:
        now_bytes: by device.
        peak_bytes: by device.
    """

    def __init__(self, own: Collection[Tensor]) -> None:
        self.now_bytes: Counter[int] = Counter()
        self.peak_bytes: Counter[int] = Counter()
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._parts: list[Tensor] = []  # kept, so that nothing else comes to have their memory
        self._holders: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self._lock = threading.RLock()

    def hold(self, device: int, tensor: Tensor) -> Held:
        """Count a tensor's storage, once however often it is held, as long as what is returned lives."""
        storage = tensor.untyped_storage()
        key, size_bytes = storage._cdata, storage.nbytes()
        held = Held(tensor)
        if key not in self._own:
            with self._lock:
                self._holders[device][key] += 1
                if self._holders[device][key] == 1:
                    self.now_bytes[device] += size_bytes
                    self.peak_bytes[device] = max(self.peak_bytes[device], self.now_bytes[device])
            weakref.finalize(held, self._release, device, key, size_bytes)
        return held

    def leave_out(self, part: Tensor) -> None:
        """Do not count what a step reads of a parameter or buffer: a forecast has it among these."""
        with self._lock:
            self._parts.append(part)
            self._own.add(part.untyped_storage()._cdata)

    def _release(self, device: int, key: int, size_bytes: int) -> None:
        with self._lock:
            self._holders[device][key] -= 1
            if not self._holders[device][key]:
                self.now_bytes[device] -= size_bytes


class Held:
    """A tensor, and that it is held."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def metered(parted: Any) -> Iterator[SavedMeter]:
    """Watch what autograd saves in forwards and in what is run again, and the inputs kept to run again."""
    meter = SavedMeter([*parted.parameters(), *parted.buffers()])
    forward, again, of, cut_source = DeviceRun._forward, DeviceRun._run_again, Rerun.of, TracedCall._cut
    here = threading.local()

    def watched(method: Any) -> Any:
        def call(self: DeviceRun, segment: Segment, *given: Any) -> Any:
            here.device = device = self.code.device_index
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: meter.hold(device, tensor), lambda held: held.tensor
            )
            with hooks:
                return method(self, segment, *given)

        return call

    def kept(segment: Segment, inputs: Sequence[Tensor], overwritten: Collection[str]) -> Rerun:
        rerun = of(segment, inputs, overwritten)
        weakref.finalize(rerun, lambda held: None, [meter.hold(here.device, t) for t in rerun.tensors if t is not None])
        return rerun

    def cut(self: TracedCall, wire: Wire, device: torch.device, leaves: Sequence[Any]) -> Tensor:
        part = cut_source(self, wire, device, leaves)
        if wire.origin in ("parameter", "buffer"):
            meter.leave_out(part)
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TracedCall, "_cut", cut)
        patch.setattr(DeviceRun, "_forward", watched(forward))
        patch.setattr(DeviceRun, "_run_again", watched(again))
        patch.setattr(Rerun, "of", kept)
        yield meter
