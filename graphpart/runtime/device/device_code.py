"""What one device needs to know of a program and its backward: made once, shared by all steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from graphpart.cost.storage import VIEWS, base_name
from graphpart.ir.cluster import Device
from graphpart.ir.graph import Graph, Operator, refs
from graphpart.ir.program import Backward, Bridge, Program
from graphpart.lower.backward import weight_wires
from graphpart.rules.weights import carried, deferrable
from graphpart.runtime.device.codegen import Executable, compile_segment
from graphpart.runtime.device.offload import Shelf, shelf_of

_MAY_RETURN_OPERAND = frozenset({"contiguous", "to", "dropout", "_to_copy", "copy"})
"""Operators that make a copy only where there is something to do."""


@dataclass(frozen=True)
class DeviceCode:
    """What one device needs to know of a program; made once, shared by all steps.

    Attributes:
        program: the whole program.
        graph: the graph it comes from, for errors.
        device_index: which device this is.
        device: the torch device.
        executables: compiled segments of this device, by name.
        cluster_device: the device as the plan knows it.
        forecast_bytes: memory that the plan expects it to take.
    """

    program: Program
    graph: Graph
    device_index: int
    device: torch.device
    executables: Mapping[str, Executable]
    cluster_device: Device
    forecast_bytes: float

    @classmethod
    def build(
        cls,
        program: Program,
        graph: Graph,
        device_index: int,
        device: torch.device,
        cluster_device: Device,
        forecast_bytes: float,
    ) -> DeviceCode:
        """Compile the segments of one device."""
        own = [s for s in program.segments if s.device == device_index]
        executables = {s.name: compile_segment(s, device, graph) for s in own}
        return cls(program, graph, device_index, device, executables, cluster_device, forecast_bytes)

    @cached_property
    def split_executables(self) -> Mapping[str, Executable]:
        """Compiled segments whose backward leaves gradients of weights for later, by name."""
        found, weights = {}, weight_wires(self.program)
        for name in self.executables:
            segment = self.program.segment[name]
            deferred = deferrable(segment.steps, carried(segment.steps, weights.intersection(segment.inputs)))
            plain = self.executables[name]
            found[name] = compile_segment(segment, self.device, self.graph, deferred) if deferred else plain
        return found

    def operator(self, name: str) -> Operator | None:
        """The traced operator behind a step, by what the step belongs to; None for a part of a parameter's bridge."""
        origin = self.program.graph.origin(name)
        return None if origin is None else self.graph.operator[origin]

    @cached_property
    def sends(self) -> Mapping[str, tuple[Bridge, ...]]:
        """Per wire made here, the messages it leaves in."""
        found: dict[str, list[Bridge]] = {}
        for bridge in self.program.bridges:
            if bridge.source == self.device_index:
                found.setdefault(bridge.wire, []).append(bridge)
        return {name: tuple(bridges) for name, bridges in found.items()}

    @cached_property
    def receives(self) -> Mapping[str, Bridge]:
        """Per wire made elsewhere and read here, the message it comes in."""
        return {b.wire: b for b in self.program.bridges if b.destination == self.device_index}

    @cached_property
    def num_reads(self) -> Mapping[str, int]:
        """Per wire, how often it is read here; one that the caller wants is never used up."""
        found: dict[str, int] = {}
        for segment in self.program.segments:
            if segment.device == self.device_index:
                for name in segment.inputs:
                    found[name] = found.get(name, 0) + 1
        for wanted in (*self.program.outputs, *(n for _, n in self.program.mutations)):
            if wanted is not None and self.program.wire[wanted].device == self.device_index:
                found[wanted] = found.get(wanted, 0) + 1
        return found

    @cached_property
    def shelf(self) -> Shelf | None:
        """Where what recomputed segments keep goes until their backward; None if it stays on the device."""
        return shelf_of(self.device) if self.program.offload else None

    @cached_property
    def overwritten(self) -> frozenset[str]:
        """Sources that are overwritten once the forward is over, and what may share their memory."""
        values = {source for source, _ in self.program.mutations}
        found = {wire.name for wire in self.program.wires if not wire.segment and wire.value in values}
        for step in (step for segment in self.program.segments for step in segment.steps) if found else ():
            may_share = step.is_bridge or base_name(step.target) in VIEWS | _MAY_RETURN_OPERAND
            if may_share and any(ref.name in found for ref in refs((step.args, dict(step.kwargs)))):
                found.update(name for name in step.results if name)
        return frozenset(found)

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Wires made here that the caller wants: outputs, and values that buffers are overwritten with."""
        wanted = dict.fromkeys((*self.program.outputs, *(n for _, n in self.program.mutations)))
        return tuple(n for n in wanted if n is not None and self.program.wire[n].device == self.device_index)


@dataclass(frozen=True)
class BackwardCode:
    """What one device needs to know of one backward pass.

    Attributes:
        backward: the whole backward pass.
        sends: per wire whose gradient leaves here, the message it leaves in.
        receives: per wire made here, the messages its gradient comes in, by rank.
        position: per wire, the place of each of this device's contributors in the order of summation.
    """

    backward: Backward
    sends: Mapping[str, Bridge]
    receives: Mapping[str, Mapping[int, Bridge]]
    position: Mapping[str, Mapping[str, int]]

    @classmethod
    def build(cls, program: Program, backward: Backward, device_index: int) -> BackwardCode:
        """Pick one device's part."""
        sends = {b.wire: b for b in backward.bridges if b.source == device_index}
        receives: dict[str, dict[int, Bridge]] = {}
        for bridge in backward.bridges:
            if bridge.destination == device_index:
                receives.setdefault(bridge.wire, {})[bridge.source] = bridge
        position = {}
        for name, segments in backward.contributors.items():
            own = [s for s in segments if program.segment[s].device == device_index]
            position[name] = {s: i for i, s in enumerate(own)}
        return cls(backward, sends, receives, position)
