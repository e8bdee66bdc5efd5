"""Pipelines small enough to follow by hand, as programs made without a model."""

from __future__ import annotations

from graphpart.ir.program import Backward, Bridge, Program, Segment, SegmentBackward, Wire
from graphpart.ir.region import Region
from graphpart.ir.workload import Workload


def pipeline(
    num_devices: int,
    num_microbatches: int,
    *,
    num_chunks: int = 1,
    barrier: int | None = None,
    train: bool = True,
    split: bool = False,
    updates: bool = False,
) -> Workload:
    """A chain of ``num_devices * num_chunks`` stages with a parameter each, given to devices round robin.

    Args:
        num_devices: devices.
        num_microbatches: parts of the batch.
        num_chunks: stages of a device.
        barrier: a stage that the step runs once, for all microbatches together.
        train: whether there is a backward pass.
        split: whether gradients of weights are tasks of their own.
        updates: whether devices update their parameters.
    """
    program = pipeline_program(num_devices, num_microbatches, num_chunks, barrier)
    return Workload(program, pipeline_backward(program) if train else None, split, updates)


def pipeline_program(num_devices: int, num_microbatches: int, num_chunks: int, barrier: int | None) -> Program:
    """The forward pass."""
    wires, segments, bridges = [], [], []
    before: list[tuple[str, int]] = []  # what the stage before made: wires and their device
    num_stages = num_devices * num_chunks
    for stage in range(num_stages):
        device = stage % num_devices
        wires.append(_wire(f"w{stage}", "parameter", device, None, ""))
        made = []
        for m in [None] if stage == barrier else range(num_microbatches):
            end = "" if m is None else f".m{m}"
            name = f"s{stage}{end}"
            reads = [w for w, of in before if m is None or of in (m, -1)]
            outputs = [f"a{stage}{end}"]
            if not before:
                reads = [f"x{end}"] if m is not None else [f"x.m{i}" for i in range(num_microbatches)]
                wires.extend(_wire(x, "input", 0, m, "") for x in reads)
            for read in reads:
                source = next(w.device for w in wires if w.name == read)
                if before and source != device and not any((b.wire, b.destination) == (read, device) for b in bridges):
                    bridges.append(Bridge(read, source, device, 4, len(bridges)))
            wires.append(_wire(outputs[0], "segment", device, m, name))
            reads.append(f"w{stage}")
            reach = {outputs[0]: frozenset(r for r in reads if not r.startswith("x"))}
            segments.append(Segment(name, device, m, stage, (), tuple(reads), tuple(outputs), reach))
            made.append((outputs[0], -1 if m is None else m))
        before = made
    sizes = (1,) * num_microbatches
    outputs = tuple(name for name, _ in before)
    return Program(num_devices, num_microbatches, sizes, tuple(wires), tuple(segments), tuple(bridges), outputs, ())


def pipeline_backward(program: Program) -> Backward:
    """The backward pass; gradients of parameters may be made apart."""
    live = tuple(name for name in program.outputs if name)
    work, contributors = {}, {}
    for segment in reversed(program.segments):
        inputs = tuple(name for name in segment.inputs if not name.startswith("x"))
        work[segment.name] = SegmentBackward(segment.outputs, inputs, tuple(n for n in inputs if n.startswith("w")))
        for name in inputs:
            contributors.setdefault(name, []).append(segment.name)
    ordered = {name: tuple(s for s in program.readers[name] if s in found) for name, found in contributors.items()}
    devices = {name: tuple(sorted({program.segment[s].device for s in found})) for name, found in ordered.items()}
    bridges = [
        Bridge(b.wire, b.destination, b.source, 4, len(program.bridges) + i) for i, b in enumerate(program.bridges)
    ]
    sources = tuple(w.name for w in program.wires if w.origin == "parameter")
    return Backward(live, work, ordered, devices, tuple(bridges), sources)


def _wire(name: str, origin: str, device: int, microbatch: int | None, segment: str) -> Wire:
    differentiable = origin != "input"
    region = Region.full((1,))
    return Wire(name, name, region, (1,), "float32", 4, origin, device, microbatch, segment, differentiable)
