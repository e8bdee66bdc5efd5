"""Gradients of parameters, put together by the workers that make their parts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from torch import Tensor

from graphpart.ir.program import Wire
from graphpart.ir.region import Region
from graphpart.runtime.state import ModelState
from graphpart.runtime.tiled_layout import paste


class ParameterGradients:
    """Collects the parts of one backward; each worker writes its own into a whole, all at once.

    Args:
        state: the parameters.
        wires: per parameter, the wires of its parts that get a gradient: disjoint regions.
    """

    def __init__(self, state: ModelState, wires: Mapping[str, Sequence[Wire]]) -> None:
        self.state = state
        self.wires = wires
        self._parts: dict[str, dict[Region, Tensor]] = {}
        self._wholes: dict[str, Tensor | None] = {}
        self._lock = threading.Lock()

    def keep(self, wire: Wire, gradient: Tensor) -> None:
        """Take the gradient of one wire, on the thread of the worker that has it."""
        name = wire.value
        with self._lock:
            if name not in self._wholes:
                self._wholes[name] = self.state.start_gradient(name, [w.region for w in self.wires[name]])
            whole = self._wholes[name]
            if whole is None:
                self._parts.setdefault(name, {})[wire.region] = gradient
        if whole is not None:
            paste(whole, wire.region, gradient)

    def of(self, name: str) -> Tensor | None:
        """A parameter's gradient; None if no part of it has one, in any process."""
        if not self.wires.get(name):
            return None
        whole = self._wholes.get(name)
        return whole if whole is not None else self.state.gradient(name, self._parts.get(name, {}))
