"""Gradients of parameters, put together by the workers that make their parts."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from graphpart.ir.program import Wire
from graphpart.ir.region import Region
from graphpart.runtime.kernels.memory import laid_as
from graphpart.runtime.parameters.layout import paste
from graphpart.runtime.parameters.model_state import ModelState


class ParameterGradients:
    """Collects the parts of one backward; each worker writes its own into a whole, all at once.

    Args:
        state: the parameters.
        wires: per parameter, the wires of its parts that get a gradient: disjoint regions.
        own: the devices whose workers run in this process.
    """

    def __init__(self, state: ModelState, wires: Mapping[str, Sequence[Wire]], own: Collection[int]) -> None:
        self.state = state
        self.wires = wires
        self._left = {name: sum(wire.device in own for wire in parts) for name, parts in wires.items()}
        self._complete: dict[int, list[str]] = {}
        self._borrowed: set[str] = set()
        self._parts: dict[str, dict[Region, Tensor]] = {}
        self._wholes: dict[str, Tensor | None] = {}
        self._lock = threading.Lock()

    def keep(self, wire: Wire, gradient: Tensor, is_own: bool) -> None:
        """Take the gradient of one wire, on the thread of the worker that has it.

        It lies in memory as the parameter does, as autograd has it: what it is summed up to depends on that.

        Args:
            wire: of a parameter, or of a part of one.
            gradient: of its shape.
            is_own: whether nobody else has the gradient's memory.
        """
        name = wire.value
        with self._lock:
            if name not in self._wholes:
                self._wholes[name] = self.state.start_gradient(name, [w.region for w in self.wires[name]])
            whole = self._wholes[name]
        if whole is not None:
            paste(whole, wire.region, gradient)
        else:
            lies_so = laid_as(gradient, self.state.read(name, wire.region))
            is_own = is_own or (gradient.layout == torch.strided and lies_so.data_ptr() != gradient.data_ptr())
        with self._lock:
            if whole is None:
                self._parts.setdefault(name, {})[wire.region] = lies_so
                if not is_own:
                    self._borrowed.add(name)
            self._left[name] -= 1
            if not self._left[name]:
                self._complete.setdefault(wire.device, []).append(name)

    def take_complete(self, device: int) -> list[str]:
        """The parameters whose last part came from a device, since this was last asked."""
        with self._lock:
            return self._complete.pop(device, [])

    def without_own_parts(self) -> list[str]:
        """Parameters that get a gradient, but only in parts at home in other processes."""
        return [name for name, left in self._left.items() if not left and name not in self._wholes]

    def at_home(self, device: int) -> list[str]:
        """Parameters that get a gradient and whose first part is at home on a device."""
        return [name for name, wires in self.wires.items() if wires[0].device == device]

    def is_borrowed(self, name: str) -> bool:
        """Whether a parameter's gradient may share its memory with something else, and must not be changed in place."""
        return name in self._borrowed

    def of(self, name: str) -> Tensor | None:
        """A parameter's gradient; None if no part of it has one, in any process."""
        if not self.wires.get(name):
            return None
        whole = self._wholes.get(name)
        return whole if whole is not None else self.state.gradient(name, self._parts.get(name, {}))
