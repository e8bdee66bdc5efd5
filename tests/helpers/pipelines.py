"""Programs made without a model: pipelines small enough to follow by hand, and random ones."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

from graphpart.ir.axes import AxisRule
from graphpart.ir.graph import Graph, Operator, Ref, Source, Value
from graphpart.ir.placement import Placement
from graphpart.ir.program import Backward, Bridge, Program, Segment, Wire
from graphpart.ir.region import Region
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of, lower


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
    return Workload(program, backward_apart(program) if train else None, split, updates)


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
        Graph("Pipeline", (), (), ()),
        num_devices,
        num_microbatches,
        (1,) * num_microbatches,
        tuple(wires),
        tuple(segments),
        tuple(bridges),
        tuple(f"a{num_stages - 1}{_end(m)}" for m in ([None] if barrier == num_stages - 1 else microbatches)),
        (),
    )


def unchecked(program: Program, **changes: Any) -> Program:
    """A program that breaks what programs keep, for tests of what has to notice by itself."""
    made = object.__new__(Program)
    made.__dict__.update({each.name: getattr(program, each.name) for each in fields(Program)} | changes)
    return made


def random_workload(
    rng: random.Random, *, train: bool = True, split: bool = False, updates: bool = False
) -> tuple[Workload, Graph]:
    """A random graph of operators on random devices, lowered; some operators wait for the whole batch."""
    batch, num_devices = rng.randint(1, 6), rng.randint(1, 4)
    graph = random_graph(rng, batch, rng.randint(1, 20))
    placement = Placement.whole(graph, {op.name: rng.randrange(num_devices) for op in graph.operators})
    homes = {name: rng.randrange(num_devices) if rng.random() < 0.3 else home for name, home in placement.homes.items()}
    program = lower(
        graph, Placement(placement.tiles, homes), num_devices, num_microbatches=rng.randint(1, min(batch, 5))
    )
    return Workload(program, backward_apart(program) if train else None, split, updates), graph


def random_graph(rng: random.Random, batch: int, num_operators: int) -> Graph:
    """Operators that read earlier values, and now and then a parameter, of their own or of another."""
    sources = [Source(Value("x", (batch, 4), "float32"), "input", ("args[0]",))]
    operators: list[Operator] = []
    for i in range(num_operators):
        reads = [f"o{rng.randrange(i)}" for _ in range(rng.randint(1, 2))] if i else ["x"]
        if rng.random() < 0.6:
            trainable = rng.random() < 0.8
            sources.append(Source(Value(f"w{i}", (4,), "float32", trainable), "parameter", (f"w{i}",), trainable))
        weights = [s.value.name for s in sources[1:]]
        if weights and rng.random() < 0.7:
            reads.append(rng.choice(weights))
        dims = tuple((("n",),) if name.startswith("w") else (("b",), ("n",)) for name in reads)
        rule = AxisRule({"b": batch, "n": 4}, dims, ((("b",), ("n",)),)) if rng.random() < 0.97 else None
        grad = any(name.startswith("w") for name in reads) or any(o.name in reads for o in operators if _trains(o))
        value = Value(f"o{i}", (batch, 4), "float32", grad)
        operators.append(
            Operator(f"o{i}", "aten.toy.default", tuple(map(Ref, reads)), results=(value,), rule=rule, flops_forward=1)
        )
    used = {name for op in operators for name in op.operands}
    outputs = tuple(Ref(op.name) for op in operators if op.name not in used)
    sources = [s for s in sources if s.value.name in used]
    return Graph("Random", tuple(sources), tuple(operators), outputs, sample_dims={"x": 0})


def _trains(op: Operator) -> bool:
    return op.results[0].requires_grad


def backward_apart(program: Program) -> Backward:
    """The backward pass from every output; gradients of parameters may be made apart."""
    live = [name for name in dict.fromkeys(program.outputs) if name and program.wire[name].segment]
    backward = backward_of(program, live)
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
