"""Follow the sample axis through a graph: which operators a microbatch can cut, and which must see all samples."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from graphpart.errors import MicrobatchError
from graphpart.ir.axes import AxisRule, OperandDim, Window
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.region import Intervals, Run


@dataclass(frozen=True, slots=True)
class SamplePosition:
    """Where the sample axis sits inside a larger one: ``index = (o * batch + sample) * inner + i``.

    Attributes:
        outer: extent of what runs more slowly than the samples.
        inner: extent of what runs faster.
    """

    outer: int = 1
    inner: int = 1

    def expand(self, samples: Intervals, batch: int) -> Intervals:
        """Indices of the larger axis that belong to some samples."""
        return Intervals.full(self.outer).nest(samples, batch).nest(Intervals.full(self.inner), self.inner)

    def project(self, indices: Intervals, batch: int) -> Intervals:
        """The samples that some of these indices of the larger axis belong to."""
        found = []
        for start, stop in indices.runs:
            low, high = start // self.inner, (stop - 1) // self.inner + 1
            if high - low >= batch:
                return Intervals.full(batch)
            if low // batch == (high - 1) // batch:
                found.append((low % batch, (high - 1) % batch + 1))
            else:  # the run wraps around from one outer index to the next
                found += [(low % batch, batch), (0, (high - 1) % batch + 1)]
        return Intervals.of(found)


@dataclass(frozen=True, slots=True)
class SampleDim:
    """The dimension of a value that runs over samples, and where in it."""

    dim: int
    position: SamplePosition


@dataclass(frozen=True, slots=True)
class SampleAxis:
    """The axis of an operator that runs over samples, and where in it."""

    axis: str
    position: SamplePosition


@dataclass(frozen=True)
class Samples:
    """The sample axis of a graph.

    Attributes:
        batch: number of samples; 0 if no input carries any.
        dims: per value that carries samples, where.
        axes: per operator that a microbatch can cut, along which axis.
        barriers: per operator that carries samples and can't be cut, why.
        rewritten: per such operator that can be rewritten into others that can be cut, the axis of its samples.
    """

    batch: int
    dims: Mapping[str, SampleDim] = field(default_factory=dict)
    axes: Mapping[str, SampleAxis] = field(default_factory=dict)
    barriers: Mapping[str, str] = field(default_factory=dict)
    rewritten: Mapping[str, str] = field(default_factory=dict)


def follow_samples(graph: Graph) -> Samples:
    """Propagate the sample axis from the inputs through every operator's axis rule.

    Raises:
        MicrobatchError: if inputs disagree on the number of samples.
    """
    dims: dict[str, SampleDim] = {}
    batches = {}
    for name, dim in graph.sample_dims.items():
        batches[name] = graph.values[name].shape[dim]
        dims[name] = SampleDim(dim, SamplePosition())
    if len(set(batches.values())) > 1:
        raise MicrobatchError(f"the inputs carry different numbers of samples: {batches}; give sample_dims")
    batch = next(iter(batches.values()), 0)
    if batch <= 1:  # nothing to cut; and an extent of 1 could sit anywhere
        return Samples(batch)
    axes: dict[str, SampleAxis] = {}
    barriers: dict[str, str] = {}
    rewritten: dict[str, str] = {}
    for op in graph.operators:
        if not any(name in dims for name in op.operands):
            continue
        found = _operator_axis(op, dims, batch)
        if isinstance(found, str):
            barriers[op.name] = found
            continue
        assert op.rule is not None
        if op.rule.can_cut(found.axis):
            axes[op.name] = found
        else:
            barriers[op.name] = f"its axis {found.axis!r} of samples cannot be cut"
            if found.axis in op.rule.rewritten:
                rewritten[op.name] = found.axis
        for value, result in zip(op.results, op.rule.results, strict=True):
            position = _position_in(op.rule, result, found)
            if position is not None:
                dims[value.name] = position
    return Samples(batch, dims, axes, barriers, rewritten)


def _operator_axis(op: Operator, dims: Mapping[str, SampleDim], batch: int) -> SampleAxis | str:
    """The operator's axis of samples, or why it has none."""
    if op.rule is None:
        return op.note or "it has no axis rule"
    found: set[SampleAxis] = set()
    for name, operand in zip(op.operands, op.rule.operands, strict=True):
        if name in dims:
            axis = _axis_at(op.rule, operand, dims[name], batch)
            if axis is None:
                return f"it merges the samples of {name!r} with another axis"
            found.add(axis)
    if len(found) > 1:
        return "its operands carry samples along different axes"
    (axis,) = found
    if any(sum(axis.axis in dim for dim in _products(tensor)) > 1 for tensor in op.rule.operands + op.rule.results):
        return "it uses the samples along two dimensions"
    return axis


def _products(dims: tuple[OperandDim, ...]) -> list[tuple[str, ...]]:
    """Dimensions as products of axes; a window, which carries no samples, as none."""
    return [() if isinstance(dim, Window) else dim for dim in dims]


def _axis_at(rule: AxisRule, dims: tuple[OperandDim, ...], at: SampleDim, batch: int) -> SampleAxis | None:
    """Which axis of a dimension holds the samples: they must lie inside one axis."""
    inner = at.position.inner
    dim = dims[at.dim]
    if isinstance(dim, Window):  # samples that are sliced or joined are no longer the batch's
        return None
    for axis in reversed(dim):
        extent = rule.extents[axis]
        if extent % (batch * inner) == 0:
            return SampleAxis(axis, SamplePosition(extent // (batch * inner), inner))
        if inner % extent != 0:
            return None
        inner //= extent
    return None


def _position_in(rule: AxisRule, dims: tuple[OperandDim, ...], sample: SampleAxis) -> SampleDim | None:
    """Where the samples end up in a tensor with these dimensions."""
    for i, dim in enumerate(_products(dims)):
        if sample.axis in dim:
            at = dim.index(sample.axis)
            before = prod(rule.extents[a] for a in dim[:at])
            after = prod(rule.extents[a] for a in dim[at + 1 :])
            return SampleDim(i, SamplePosition(before * sample.position.outer, sample.position.inner * after))
    return None


def cut_samples(batch: int, num_microbatches: int, sets: Sequence[Intervals] = ()) -> tuple[Intervals, ...]:
    """Nearly equal microbatches: 7 samples in 3 parts are 3, 2, 2.

    Samples that are cut in space as well are cut alike in each such set, so that in every microbatch each device has
    its share: 8 samples on two devices, in 2 parts, are 0, 1, 4, 5 and 2, 3, 6, 7.

    Args:
        batch: number of samples.
        num_microbatches: number of parts.
        sets: the sets of samples that tiles are cut to in space.

    Raises:
        MicrobatchError: if there are fewer samples than microbatches.
    """
    if num_microbatches < 1:
        raise MicrobatchError(f"num_microbatches is {num_microbatches}; it has to be at least 1")
    if num_microbatches > 1 and batch == 0:
        raise MicrobatchError(
            f"{num_microbatches} microbatches were asked for, but no tensor input carries samples along a dimension; "
            "name it with sample_dims={'args[0]': 0}, or use num_microbatches=1"
        )
    if num_microbatches > max(batch, 1):
        raise MicrobatchError(
            f"a batch of {batch} samples cannot be cut into {num_microbatches} microbatches; "
            f"use num_microbatches <= {max(batch, 1)}, or larger batches"
        )
    bounds = sorted({0, batch, *(edge for found in sets for run in found.runs for edge in run)})
    together: dict[tuple[bool, ...], list[Run]] = {}
    for start, stop in itertools.pairwise(bounds):
        one = Intervals.span(start, start + 1)
        together.setdefault(tuple(one <= found for found in sets), []).append((start, stop))
    parts: list[list[Run]] = [[] for _ in range(num_microbatches)]
    sizes = [0] * num_microbatches
    for group in together.values():
        # A group's larger parts go to the microbatches that have least so far.
        size, larger = divmod(sum(stop - start for start, stop in group), num_microbatches)
        favoured = set(sorted(range(num_microbatches), key=lambda m: sizes[m])[:larger])
        left = list(reversed(group))
        for m in range(num_microbatches):
            wanted = size + (m in favoured)
            sizes[m] += wanted
            while wanted:
                start, stop = left.pop()
                taken = min(wanted, stop - start)
                parts[m].append((start, start + taken))
                wanted -= taken
                if start + taken < stop:
                    left.append((start + taken, stop))
    return tuple(map(Intervals.of, parts))
