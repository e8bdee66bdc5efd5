"""The backward pass of a program: which gradients flow, found without running anything."""

from __future__ import annotations

from collections.abc import Collection

from graphpart.ir.gc_pause import no_collection
from graphpart.ir.program import Backward, Bridge, Program, SegmentBackward
from graphpart.lower.collectives import mirror_collectives
from graphpart.rules.weights import carried, deferred_weights


def live_outputs(program: Program) -> list[str]:
    """The outputs that a backward goes back from, if nobody says which: the losses, or without one all that it can."""
    wires = [program.wire[name] for name in dict.fromkeys(program.outputs) if name is not None]
    differentiable = [wire for wire in wires if wire.differentiable and wire.segment]
    scalars = [wire.name for wire in differentiable if wire.shape == ()]
    return scalars or [wire.name for wire in differentiable]


def trained_outputs(program: Program) -> list[str]:
    """What a fused step goes back from: the loss, its graph's first output, even if the model has a loss besides."""
    live = live_outputs(program)
    return live[:1] if live and program.wire[live[0]].shape == () else live


def terms_of(program: Program, output: str) -> tuple[str, ...]:
    """The wires that an output is the sum of: it has the same gradient as each of them.

    A loss over microbatches is the sum of their parts, and the backward of each part may start before the others have
    been computed. An output that is no such sum is its own only term.

    Args:
        program: the lowered program.
        output: a wire.
    """
    segment = program.segment.get(program.wire[output].segment)
    step = next((s for s in segment.steps if output in s.results), None) if segment is not None else None
    if segment is None or step is None or step.target != "graphpart.sum":
        return (output,)
    names = [ref.name for ref in step.args[0]]
    if not set(names) <= set(segment.inputs):
        return (output,)
    return tuple(dict.fromkeys(term for name in names for term in terms_of(program, name)))


def parts_of(program: Program, output: str) -> tuple[str, ...]:
    """The wires that an output is put together from, microbatch by microbatch.

    A loss that is made of each part alone, as most are, lets its backward start before the others have been computed.
    What is put together from anything else is its own only part.

    Args:
        program: the lowered program.
        output: a wire.
    """
    segment = program.segment.get(program.wire[output].segment)
    if segment is None or program.wire[output].microbatch is not None:
        return (output,)
    made_by = {name: step for step in segment.steps for name in step.results}
    found: dict[str, None] = {}
    names = [output]
    while names:
        name = names.pop()
        step = made_by.get(name)
        if step is not None and step.target in ("graphpart.concat", "graphpart.sum"):
            names += [ref.name for ref in reversed(step.args[0])]
        elif step is not None or program.wire[name].segment == "":
            return (output,)
        else:
            found.update(dict.fromkeys(parts_of(program, name)))
    return tuple(found)


@no_collection()
def backward_of(program: Program, live: Collection[str]) -> Backward:
    """The mirrored bridges and backward work for one set of outputs that get a gradient.

    The gradient of a weight can be made apart where ``rules.weights`` knows how: that is for weights of products,
    convolutions and look-ups, read as they are, in part, or through a cast.

    A wire gets a gradient if it is differentiable and some reader passes one on; a segment has backward work if
    one of its outputs gets a gradient. Nothing else is sent, so no receiver waits for a message that never comes.

    Args:
        program: the lowered program.
        live: wires for which the caller gives a gradient: of program outputs, or the terms of one.
    """
    has_gradient = {name for name in live if program.wire[name].differentiable}
    weights = weight_wires(program)
    useful = _useful(program)
    contributors: dict[str, list[str]] = {}
    work: dict[str, SegmentBackward] = {}
    for segment in reversed(program.segments):
        outputs = tuple(name for name in segment.outputs if name in has_gradient and name in useful)
        if not outputs:
            continue
        reached = frozenset[str]().union(*(segment.reach[name] for name in outputs))
        inputs = tuple(name for name in segment.inputs if name in reached and name in useful)
        if not inputs:
            continue
        apart = deferred_weights(segment.steps, weights.intersection(segment.inputs))
        work[segment.name] = SegmentBackward(outputs, inputs, tuple(name for name in inputs if name in apart))
        for name in inputs:
            has_gradient.add(name)
            contributors.setdefault(name, []).append(segment.name)
    ordered = {}
    for name, segments in contributors.items():
        among = frozenset(segments)
        ordered[name] = tuple([reader for reader in program.readers[name] if reader in among])
    devices = {name: tuple(sorted({program.segment[s].device for s in found})) for name, found in ordered.items()}
    bridges: list[Bridge] = []
    for name, found in devices.items():
        wire = program.wire[name]
        if wire.origin != "input":
            for device in found:
                if device != wire.device:
                    tag = len(program.bridges) + len(bridges)
                    bridges.append(Bridge(name, device, wire.device, wire.size_bytes, tag))
    return Backward(
        live=tuple(sorted(name for name in live if program.wire[name].differentiable)),
        segments=work,
        contributors=ordered,
        gradient_devices=devices,
        bridges=tuple(bridges),
        collectives=mirror_collectives(program.collectives, program.bridges, bridges),
        sources=tuple(n for n in (w.name for w in program.wires if not w.segment) if n in has_gradient),
    )


def _useful(program: Program) -> set[str]:
    """Wires whose gradient becomes one of a source; nobody would ask for that of others."""
    found = {wire.name for wire in program.wires if not wire.segment and wire.differentiable}
    for segment in program.segments:
        found.update(name for name, reached in segment.reach.items() if not found.isdisjoint(reached))
    return found


def weight_wires(program: Program) -> frozenset[str]:
    """Wires of trainable parameters, of parts of them, and of casts that segments make of them for others to read."""
    found = {w.name for w in program.wires if w.origin == "parameter" and w.differentiable}
    for segment in program.segments:
        if read := found.intersection(segment.inputs):
            found.update(carried(segment.steps, read).keys() & set(segment.outputs))
    return frozenset(found)
