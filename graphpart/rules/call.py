"""One operator call with its arguments by name, and the axis rule built from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from graphpart.errors import GraphError
from graphpart.ir.axes import AxisRule, Dim, OperandDim, Window
from graphpart.ir.graph import Ref, refs

Dims = tuple[Dim, ...]
"""The dimensions of one tensor."""

OperandDims = tuple[OperandDim, ...]
"""The dimensions of one operand, windows among them."""


@dataclass(frozen=True, slots=True)
class Call:
    """An operator, its arguments and the shapes around it.

    Attributes:
        target: such as ``aten.linear.default``.
        names: the schema's names of the positional arguments; keyword-only ones need none.
        args: positional arguments, tensors as :class:`Ref`.
        kwargs: keyword arguments.
        shape_of: shape of a value by its name.
        results: shapes of the results.
        dtype_of: dtype of a value by its name; empty where it isn't known.
    """

    target: str
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape_of: Callable[[str], tuple[int, ...]]
    results: tuple[tuple[int, ...], ...]
    dtype_of: Callable[[str], str] = lambda name: ""

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name."""
        if name in self.kwargs:
            return self.kwargs[name]
        if name in self.names:
            position = self.names.index(name)
            if position < len(self.args):
                return self.args[position]
        return default

    def has(self, name: str) -> bool:
        """Whether an argument is a tensor (and not None, a number, or left out)."""
        return isinstance(self.get(name), Ref)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor argument."""
        return tuple(self.shape_of(self.get(name).name))

    def shapes(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors in a list argument."""
        return tuple(tuple(self.shape_of(ref.name)) for ref in refs(self.get(name)))

    def rank(self, name: str) -> int:
        """Number of dimensions of a tensor argument."""
        return len(self.shape(name))

    def axis(self, name: str = "dim", default: int = 0, rank: int | None = None) -> int:
        """A dimension argument, counted from the front.

        Args:
            name: the argument.
            default: its default.
            rank: dimensions it counts over; the first tensor argument's by default.
        """
        return self.get(name, default) % (self.rank(self.names[0]) if rank is None else rank)

    def axes(self, name: str = "dim") -> tuple[int, ...]:
        """A list of dimensions, counted from the front; all of them where the argument is missing or empty."""
        rank = self.rank(self.names[0])
        given = self.get(name)
        if given is None or given == [] or given == ():
            return tuple(range(rank))
        return tuple(d % rank for d in ([given] if isinstance(given, int) else given))

    def tensors(self) -> Iterator[tuple[str, int, Ref]]:
        """Every operand in order: argument name, index inside that argument, and the reference."""
        named = [
            (self.names[i] if i < len(self.names) else f"argument {i}", value) for i, value in enumerate(self.args)
        ]
        for name, value in [*named, *self.kwargs.items()]:
            for index, ref in enumerate(refs(value)):
                yield name, index, ref


def names(prefix: str, count: int) -> tuple[str, ...]:
    """``count`` axis names: ``names("d", 3)`` is ``("d0", "d1", "d2")``."""
    return tuple(f"{prefix}{i}" for i in range(count))


def single(axes: Iterable[str]) -> Dims:
    """Dimensions of one axis each."""
    return tuple((a,) for a in axes)


def fresh(shape: Sequence[int], prefix: str = "d") -> Dims:
    """Dimensions for a tensor of this shape, each with its own axis."""
    return single(names(prefix, len(shape)))


def broadcast(shapes: Sequence[tuple[int, ...]], prefix: str = "d") -> tuple[tuple[Dims, ...], Dims]:
    """Dimensions of tensors aligned at the right, and of the shape they broadcast to.

    An extent of 1 against a larger one is left to :func:`make_rule`, which turns it into ``()``.
    """
    rank = max((len(s) for s in shapes), default=0)
    dims = single(names(prefix, rank))
    return tuple(dims[rank - len(s) :] for s in shapes), dims


def make_rule(
    call: Call,
    operands: Mapping[str, Sequence[OperandDims]] | Sequence[OperandDims],
    results: Sequence[Dims],
    *,
    extents: Mapping[str, int] | None = None,
    sums: Iterable[str] = (),
    whole: Iterable[str] = (),
    linear: str = "",
    shape_argument: int | None = None,
    rewritten: Iterable[str] = (),
) -> AxisRule:
    """Bind dimensions to the shapes of a call.

    Axes that neither add up nor appear in every result become whole. An operand's dimension of extent 1
    whose axis is longer elsewhere becomes ``()``.

    Args:
        call: the call.
        operands: dimensions per operand, in order; or per argument name, one entry per tensor in it.
        results: dimensions per result.
        extents: extents known beforehand, such as the factors of a merged dimension.
        sums: axes whose partial results add up.
        whole: axes that must not be cut.
        linear: groups of argument names in which the operator is linear, as in ``"input+bias weight+bias"``.
        shape_argument: see :class:`AxisRule`.
        rewritten: axes that lowering can rewrite the operator for, see :class:`AxisRule`; they count as whole here.

    Raises:
        GraphError: if an extent does not fit, or a tensor argument has no dimensions.
    """
    tensors = list(call.tensors())
    if isinstance(operands, Mapping):
        operands = [_dims_of(call, operands, name, index) for name, index, _ in tensors]
    labels = [f"operand {ref.name!r}" for _, _, ref in tensors] + [f"result {i}" for i in range(len(call.results))]
    shapes = [tuple(call.shape_of(ref.name)) for _, _, ref in tensors] + list(call.results)
    every: list[OperandDims] = [*operands, *results]
    if len(every) != len(shapes):
        raise GraphError(f"{call.target} has {len(shapes)} operands and results, its axis rule {len(every)}")
    found = _settle(call.target, labels, every, shapes, extents or {})
    fitted = [_fit(call.target, *row, found) for row in zip(labels, every, shapes, strict=True)]
    made: tuple[Dims, ...] = tuple(fitted[len(tensors) :])  # type: ignore[arg-type]  # results have no windows
    adding = frozenset(sums)
    missing = {a for a in found if a not in adding and not all(any(a in d for d in dims) for dims in made)}
    exposed = frozenset(rewritten) & found.keys()
    return AxisRule(
        extents=found,
        operands=tuple(fitted[: len(tensors)]),
        results=made,
        sums=adding & found.keys(),
        whole=(frozenset(whole) | exposed) & found.keys() | missing,
        linear=linear_groups(call, linear),
        shape_argument=shape_argument,
        rewritten=exposed,
    )


def _dims_of(call: Call, operands: Mapping[str, Sequence[OperandDims]], name: str, index: int) -> OperandDims:
    if name not in operands or index >= len(operands[name]):
        raise GraphError(f"{call.target}: its axis rule does not know the tensor argument {name!r}")
    return operands[name][index]


def _settle(
    target: str,
    labels: Sequence[str],
    every: Sequence[OperandDims],
    shapes: Sequence[tuple[int, ...]],
    known: Mapping[str, int],
) -> dict[str, int]:
    """Extents of all axes: the largest of the plain dimensions, then one unknown factor per merged dimension."""
    found = dict(known)
    merged: list[tuple[str, tuple[str, ...], int]] = []
    for label, dims, shape in zip(labels, every, shapes, strict=True):
        if len(dims) != len(shape):
            raise GraphError(f"{target}: {label} has {len(shape)} dimensions, its axis rule {len(dims)}")
        for dim, extent in zip(dims, shape, strict=True):
            if isinstance(dim, Window):
                continue
            if len(dim) == 1:
                axis = dim[0]
                before = found.get(axis)
                if before is None or (before == 1 and axis not in known):
                    found[axis] = extent
            elif dim:
                merged.append((label, dim, extent))
    for label, dim, extent in merged:
        open_axes = [a for a in dim if a not in found]
        if len(open_axes) > 1:
            raise GraphError(f"{target}: {label} leaves the extents of {', '.join(open_axes)} open")
        if open_axes:
            found[open_axes[0]] = extent // max(1, prod(found[a] for a in dim if a in found))
    return found


def _fit(target: str, label: str, dims: OperandDims, shape: tuple[int, ...], extents: Mapping[str, int]) -> OperandDims:
    """The dimensions, an operand's broadcast ones emptied; an error where an extent does not fit."""
    fitted: list[OperandDim] = []
    for index, (dim, extent) in enumerate(zip(dims, shape, strict=True)):
        if isinstance(dim, Window):
            if dim.extent != extent:
                raise GraphError(f"{target}: dimension {index} of {label} has extent {extent}, its window {dim.extent}")
            fitted.append(dim)
            continue
        expected = prod(extents[a] for a in dim)
        if expected == extent:
            fitted.append(dim)
        elif extent == 1 and label.startswith("operand"):
            fitted.append(())
        else:
            raise GraphError(
                f"{target}: dimension {index} of {label} has extent {extent}, but axis {' '.join(dim)!r} has {expected}"
            )
    return tuple(fitted)


def linear_groups(call: Call, linear: str) -> tuple[tuple[int, ...], ...]:
    """Operand positions of the groups in ``"a+b c"``; a member left out drops, a number in it drops its group."""
    if not linear or call.kwargs.get("dtype") is not None:
        # A cast rounds, and to integers it truncates: partial values must not pass through it.
        return ()
    positions: dict[str, list[int]] = {}
    for position, (name, _, _) in enumerate(call.tensors()):
        positions.setdefault(name, []).append(position)
    groups = []
    for group in linear.split():
        members = [name for name in group.split("+") if call.get(name) is not None]
        if members and all(name in positions for name in members):
            groups.append(tuple(p for name in members for p in positions[name]))
    return tuple(groups)
