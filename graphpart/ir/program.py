"""What runs: segments of operators on each device, and the bridges between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from graphpart.errors import ProgramError
from graphpart.ir.gc_pause import no_collection
from graphpart.ir.graph import Graph
from graphpart.ir.region import Region

DEFAULT_DEADLINE_S = 600.0

BRIDGE_TARGETS = frozenset(
    ["graphpart.slice", "graphpart.split", "graphpart.cast", "graphpart.concat", "graphpart.sum"]
)
"""What the parts of a bridge compute on either side of its message."""


@dataclass(frozen=True, slots=True)
class Wire:
    """A region of one value, made once, in one place, and read by any number of segments.

    Attributes:
        name: unique in the program.
        value: the graph's name for the value.
        region: which part of it.
        shape: shape of the part.
        dtype: name without the ``torch.`` prefix.
        size_bytes: bytes of the part.
        origin: ``segment``, or the kind of source it comes from (``parameter``, ``buffer``, ``constant``, ``input``).
        device: index of the device that makes or keeps it. An input is at hand on every device.
        microbatch: which microbatch it belongs to; None if the step makes it once.
        segment: name of the segment that makes it; empty for a source.
        differentiable: whether a gradient may flow back along it.
    """

    name: str
    value: str
    region: Region
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    origin: str
    device: int
    microbatch: int | None = None
    segment: str = ""
    differentiable: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One call inside a segment.

    Attributes:
        operator: the operator of the program's graph that it computes, or a tile of; of a part of a bridge, the value.
        target: what to call: ``aten.linear.default``, or ``graphpart.concat`` for a bridge's part.
        args: positional arguments; a :class:`~graphpart.ir.graph.Ref` names a local.
        kwargs: keyword arguments, likewise.
        results: local names, one per result; empty string where the result isn't used.
        key: what a random operator's generator is seeded with, besides the step's own seed.
        share: the part of the operator's work that it does.
    """

    operator: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[str, ...]
    key: int | None = None
    share: float = 1.0

    @property
    def is_bridge(self) -> bool:
        """Whether it is a part of a bridge, not of an operator."""
        return self.target in BRIDGE_TARGETS


@dataclass(frozen=True)
class Segment:
    """Straight-line work of one device between two bridges.

    Attributes:
        name: unique in the program.
        device: index of the device that runs it.
        microbatch: which microbatch; None if the step runs it once.
        level: longest path of segments before it; rises along every edge.
        steps: calls, in order.
        inputs: names of the wires it reads; also the locals they are bound to.
        outputs: names of the wires it makes; also locals.
        reach: per output, the inputs from which a gradient path leads to it.
        fraction: part of the samples that it works on (1 for a segment that runs once).
        recompute: whether its forward keeps only its inputs, and is run again for its backward.
    """

    name: str
    device: int
    microbatch: int | None
    level: int
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reach: Mapping[str, frozenset[str]] = field(default_factory=dict)
    fraction: float = 1.0
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Bridge:
    """One message: a wire from the device that makes it to another device that reads it.

    Attributes:
        wire: name of the wire.
        source: index of the sending device.
        destination: index of the receiving device.
        size_bytes: bytes of the message.
        tag: number of the message among all of the program, the key that send and receive share.
    """

    wire: str
    source: int
    destination: int
    size_bytes: int
    tag: int


@dataclass(frozen=True, slots=True)
class Collective:
    """Messages that together are one collective operation.

    Attributes:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all``, ``broadcast``, ``reduce``,
            ``scatter`` or ``gather``.
        value: the graph's name for what is exchanged.
        microbatch: which microbatch it belongs to, or None.
        devices: indices of the devices that take part.
        tags: its messages, by their bridges' tags.
        size_bytes: bytes of its messages together.
    """

    kind: str
    value: str
    microbatch: int | None
    devices: tuple[int, ...]
    tags: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SegmentBackward:
    """The backward work of one segment.

    Attributes:
        outputs: wires made by the segment that get a gradient.
        inputs: wires read by it for which it makes a gradient.
        weights: those of the inputs whose gradient can be made apart, after the others: parameters, or what a segment
            makes of parameters alone, such as a cast.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Backward:
    """The backward pass for one set of live outputs.

    Gradients are summed in the order that is written here, whatever the timing: on each device over
    ``contributors`` (by microbatch, then segment), then over ``gradient_devices`` by rank.

    Attributes:
        live: wires for which the caller gives a gradient: program outputs, or the terms of a loss.
        segments: the segments that have backward work, with what it is.
        contributors: per wire, the segments whose backward makes a part of its gradient, in summation order.
        gradient_devices: per wire, the devices that contribute, in summation order.
        bridges: gradient messages, each the mirror of a forward bridge.
        sources: wires of sources (parameters, inputs) that get a gradient.
        collectives: the collectives among the gradient messages.
    """

    live: tuple[str, ...]
    segments: Mapping[str, SegmentBackward]
    contributors: Mapping[str, tuple[str, ...]]
    gradient_devices: Mapping[str, tuple[int, ...]]
    bridges: tuple[Bridge, ...]
    sources: tuple[str, ...]
    collectives: tuple[Collective, ...] = ()

    @property
    def num_messages(self) -> int:
        """Messages between devices in one backward pass."""
        return len(self.bridges)

    @property
    def message_bytes(self) -> int:
        """Bytes between devices in one backward pass."""
        return sum(b.size_bytes for b in self.bridges)


@dataclass(frozen=True)
class Program:
    """A graph lowered onto devices.

    Attributes:
        graph: what was lowered: the traced graph, with others in place of the operators that had to be rewritten. Its
            operators say what a step costs, and which traced operator it comes from.
        num_devices: number of devices, used or not.
        num_microbatches: parts of the sample axis, in time.
        sample_sizes: samples per microbatch.
        wires: everything that passes between segments.
        segments: in an order that respects every dependency.
        bridges: forward messages.
        outputs: per output of the graph, the wire that holds it whole, or None where it is no tensor.
        mutations: pairs (source value, wire): written back at the step's end.
        deadline_s: how long a device waits for one message before it gives up.
        collectives: the collectives among the forward messages.
        offload: whether what recomputed segments keep goes to host memory until their backward.
    """

    graph: Graph
    num_devices: int
    num_microbatches: int
    sample_sizes: tuple[int, ...]
    wires: tuple[Wire, ...]
    segments: tuple[Segment, ...]
    bridges: tuple[Bridge, ...]
    outputs: tuple[str | None, ...]
    mutations: tuple[tuple[str, str], ...]
    deadline_s: float = DEFAULT_DEADLINE_S
    collectives: tuple[Collective, ...] = ()
    offload: bool = False

    @no_collection()
    def __post_init__(self) -> None:
        """Check what the runtime and the simulator rest on, in time linear in the program.

        Names and tags are unique; a wire lives where the segment that makes it does; levels rise along every edge; a
        wire crosses once to each device that reads it elsewhere, from where it is.

        Raises:
            ProgramError: naming the first thing out of order.
        """
        brought = {(bridge.wire, bridge.destination) for bridge in self.bridges}
        distinct: tuple[tuple[str, Collection[Hashable], Iterator[Hashable]], ...] = (
            ("wire", self.wire, (wire.name for wire in self.wires)),
            ("segment", self.segment, (segment.name for segment in self.segments)),
            ("message", brought, ((bridge.wire, bridge.destination) for bridge in self.bridges)),
            ("tag", {bridge.tag for bridge in self.bridges}, (bridge.tag for bridge in self.bridges)),
        )
        sizes = (len(self.wires), len(self.segments), len(self.bridges), len(self.bridges))
        for (what, keys, of_each), size in zip(distinct, sizes, strict=True):
            if len(keys) < size:
                ((twice, _),) = Counter(of_each).most_common(1)
                raise ProgramError(f"{what} {twice!r} is there twice")
        self._check_wires()
        self._check_bridges()
        self._check_segments(brought)

    def _check_wires(self) -> None:
        """Wires live where their makers do, and what is asked for exists."""
        for wire in self.wires:
            if wire.segment:
                maker = self.segment.get(wire.segment)
                if maker is None or maker.device != wire.device:
                    raise ProgramError(f"wire {wire.name!r} is not on the device of a segment {wire.segment!r}")
        for name in (*self.outputs, *(name for _, name in self.mutations)):
            if name is not None and name not in self.wire:
                raise ProgramError(f"the program gives {name!r}, which is no wire of it")

    def _check_bridges(self) -> None:
        """Messages leave from where their wire is, to elsewhere, with all of it."""
        for bridge in self.bridges:
            wire = self.wire.get(bridge.wire)
            if wire is None or (wire.device, wire.size_bytes) != (bridge.source, bridge.size_bytes):
                raise ProgramError(f"{bridge} carries no wire that is there, or not all of it")
            if bridge.destination == bridge.source:
                raise ProgramError(f"{bridge} goes nowhere")

    def _check_segments(self, brought: Set[tuple[str, int]]) -> None:
        """Segments read what was made at a lower level, on their device or brought there."""
        wires, makers = self.wire, self.segment
        for segment in self.segments:
            for name in segment.inputs:
                wire = wires.get(name)
                if wire is None:
                    raise ProgramError(f"segment {segment.name!r} reads {name!r}, which is no wire")
                if wire.segment and makers[wire.segment].level >= segment.level:
                    raise ProgramError(
                        f"segment {segment.name!r} of level {segment.level} reads {name!r}, which is made at level "
                        f"{makers[wire.segment].level} by {wire.segment!r}"
                    )
                if wire.device != segment.device and wire.origin != "input" and (name, segment.device) not in brought:
                    raise ProgramError(f"segment {segment.name!r} reads {name!r}, which no message brings there")

    @cached_property
    def wire(self) -> Mapping[str, Wire]:
        """Every wire by name."""
        return {w.name: w for w in self.wires}

    @cached_property
    def segment(self) -> Mapping[str, Segment]:
        """Every segment by name."""
        return {s.name: s for s in self.segments}

    @cached_property
    def readers(self) -> Mapping[str, tuple[str, ...]]:
        """Per wire, the segments that read it, by microbatch and then in program order."""
        found: dict[str, list[Segment]] = {w.name: [] for w in self.wires}
        for segment in self.segments:
            for name in segment.inputs:
                found[name].append(segment)
        first = -1
        return {
            name: tuple(s.name for s in sorted(users, key=lambda s: first if s.microbatch is None else s.microbatch))
            for name, users in found.items()
        }

    @property
    def num_messages(self) -> int:
        """Messages between devices in one forward pass."""
        return len(self.bridges)

    @property
    def message_bytes(self) -> int:
        """Bytes between devices in one forward pass."""
        return sum(b.size_bytes for b in self.bridges)
