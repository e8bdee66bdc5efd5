"""Pipelines small enough to follow by hand, as programs made without a model."""

from __future__ import annotations

from dataclasses import replace

from graphpart.ir.program import Backward, Bridge, Program, Segment, Wire
from graphpart.ir.region import Region
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of


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
    """The forward pass: stage s makes ``a{s}`` of each microbatch from ``a{s - 1}`` and its parameter ``w{s}``."""
    microbatches: list[int | None] = list(range(num_microbatches))
    wires = [_wire(f"a-1.m{m}", "input", 0, m, "") for m in range(num_microbatches)]
    segments, bridges = [], []
    num_stages = num_devices * num_chunks
    for stage in range(num_stages):
        device, source = stage % num_devices, (stage - 1) % num_devices
        wires.append(_wire(f"w{stage}", "parameter", device, None, ""))
        for m in [None] if stage == barrier else microbatches:
            whole_before = stage - 1 == barrier and barrier is not None
            before = [None] if whole_before else microbatches if m is None else [m]
            values = tuple(f"a{stage - 1}{_end(of)}" for of in before)
            made, name = f"a{stage}{_end(m)}", f"s{stage}{_end(m)}"
            wires.append(_wire(made, "segment", device, m, name))
            reach = {made: frozenset(values if stage else ()) | {f"w{stage}"}}
            segments.append(Segment(name, device, m, stage, (), (*values, f"w{stage}"), (made,), reach))
            if stage and source != device and (not whole_before or m in (None, 0)):
                bridges += [Bridge(value, source, device, 4, len(bridges) + i) for i, value in enumerate(values)]
    return Program(
        num_devices,
        num_microbatches,
        (1,) * num_microbatches,
        tuple(wires),
        tuple(segments),
        tuple(bridges),
        tuple(f"a{num_stages - 1}{_end(m)}" for m in ([None] if barrier == num_stages - 1 else microbatches)),
        (),
    )


def pipeline_backward(program: Program) -> Backward:
    """The backward pass from every output; gradients of parameters may be made apart."""
    backward = backward_of(program, [name for name in program.outputs if name])
    apart = {
        name: replace(work, weights=tuple(n for n in work.inputs if program.wire[n].origin == "parameter"))
        for name, work in backward.segments.items()
    }
    return replace(backward, segments=apart)


def _end(microbatch: int | None) -> str:
    return "" if microbatch is None else f".m{microbatch}"


def _wire(name: str, origin: str, device: int, microbatch: int | None, segment: str) -> Wire:
    differentiable = origin != "input"
    region = Region.full((1,))
    return Wire(name, name, region, (1,), "float32", 4, origin, device, microbatch, segment, differentiable)
