"""What export gives and cannot stand as it is, in operators that mean the same wherever their operands lie.

Some operators speak of memory: of strides, and of offsets into a storage. A value that came in a message, or was joined
from parts, lies otherwise than the traced one did. So they are given their operand's elements in the traced order, as a
vector; where they would read anything else, they are refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch

from graphpart.errors import UnsupportedOperatorError
from graphpart.ir.graph import Operator, Ref, Symbol, Value
from graphpart.trace.views import reach

Rewrite = Callable[[Operator, torch.fx.Node, Collection[str]], list[Operator]]


class Layout(NamedTuple):
    """How an argument of the model lay in memory; a storage offset of None may be any."""

    strides: tuple[int, ...]
    storage_offset: int | None


def rewrite(op: Operator, node: torch.fx.Node, graded: Collection[str]) -> list[Operator]:
    """The operators that stand in the graph for one node.

    Args:
        op: the node's operator, as exported.
        node: the node, with the fake values of its operands.
        graded: values that may have a gradient.

    Raises:
        UnsupportedOperatorError: if it reads memory that is not its operand's.
    """
    found = _REWRITES.get(op.target)
    return [op] if found is None else found(op, node, graded)


def layout_of_argument(node: torch.fx.Node) -> tuple[str, Layout] | None:
    """Which placeholder's memory a node addresses by strides, and how that has to lie; None if none's."""
    if not isinstance(node.target, torch._ops.OpOverload) or not str(node.target).startswith("aten.as_strided"):
        return None
    root, given = _root(node.args[0]), _argument(node, "storage_offset")  # type: ignore[arg-type]
    if root.op != "placeholder":
        return None
    fake = root.meta["val"]
    return root.name, Layout(fake.stride(), None if given is None else fake.storage_offset())


def _as_strided(op: Operator, node: torch.fx.Node, graded: Collection[str]) -> list[Operator]:
    """``as_strided`` of the vector that the operand's memory holds.

    What lies in the same storage beside the operand is no part of it: autograd gives that no gradient.
    """
    fake = node.args[0].meta["val"]  # type: ignore[union-attr]
    read = _in_memory(node, fake) or _in_order(node, fake)
    if read is None:
        raise _outside(op)
    order, offset, strides = read
    size = tuple(node.args[1])  # type: ignore[arg-type]
    made, vector = _vector(op, fake, order)
    target = "aten.as_strided.default"
    return [*made, replace(op, target=target, args=(Ref(vector.name), size, strides, offset), kwargs={})]


def _as_strided_scatter(op: Operator, node: torch.fx.Node, graded: Collection[str]) -> list[Operator]:
    """``as_strided_scatter`` into the vector that the operand's memory holds, which then takes its shape again."""
    fake = node.args[0].meta["val"]  # type: ignore[union-attr]
    read = _in_memory(node, fake) or _in_order(node, fake)
    if read is None:
        raise _outside(op)
    order, offset, strides = read
    made, vector = _vector(op, fake, order)
    written = replace(vector, name=f"{op.name}.written")
    args = (Ref(vector.name), op.args[1], tuple(node.args[2]), strides, offset)  # type: ignore[arg-type]
    made.append(replace(op, name=written.name, args=args, kwargs={}, results=(written,)))
    shape = tuple(fake.shape[i] for i in order)
    if list(order) == sorted(order):
        return [*made, _reshape(op, written.name, op.results[0], shape)]
    laid = Value(f"{op.name}.laid", shape, vector.dtype)
    back = tuple(order.index(i) for i in range(len(order)))
    made.append(_reshape(replace(op, name=laid.name), written.name, laid, shape))
    return [*made, replace(op, target="aten.permute.default", args=(Ref(laid.name), back), kwargs={})]


def _vector(op: Operator, fake: torch.Tensor, order: Sequence[int]) -> tuple[list[Operator], Value]:
    """Operators that make the first operand a vector, its dimensions in some order."""
    source, made = op.args[0], []
    dtype = str(fake.dtype).removeprefix("torch.")
    if list(order) != sorted(order):
        value = Value(f"{op.name}.ordered", tuple(fake.shape[i] for i in order), dtype)
        args = (source, tuple(order))
        made.append(replace(op, name=value.name, target="aten.permute.default", args=args, kwargs={}, results=(value,)))
        source = Ref(value.name)
    vector = Value(f"{op.name}.memory", (fake.numel(),), dtype)
    return [*made, _reshape(replace(op, name=vector.name), source.name, vector, vector.shape)], vector


def _reshape(op: Operator, source: str, result: Value, shape: tuple[int, ...]) -> Operator:
    return replace(op, target="aten.reshape.default", args=(Ref(source), shape), kwargs={}, results=(result,))


_Read = tuple[tuple[int, ...], int, tuple[int, ...]]
"""Order of dimensions that makes a vector of a tensor; offset and strides in that vector."""


def _in_memory(node: torch.fx.Node, fake: torch.Tensor) -> _Read | None:
    """How a node reads a tensor that has no gaps, by its own strides; None if it has gaps, or that reads beyond it."""
    strides = fake.stride()
    order = tuple(sorted(range(fake.dim()), key=lambda i: (-strides[i], i)))
    dense = [*accumulate((fake.shape[i] for i in order[:0:-1]), operator.mul, initial=1)][: fake.dim()][::-1]
    if any(fake.shape[i] > 1 and fake.stride(i) != stride for i, stride in zip(order, dense, strict=True)):
        return None
    size, strides, offset = _request(node)
    offset -= int(fake.storage_offset())
    is_inside = offset >= 0 and offset + reach(size, strides) <= fake.numel()
    return (order, offset, strides) if prod(size) == 0 or is_inside else None


def _in_order(node: torch.fx.Node, fake: torch.Tensor) -> _Read | None:
    """How a node reads a tensor that has gaps: its strides as so many steps along each of the tensor's dimensions."""
    size, strides, offset = _request(node)
    held = fake.stride()
    dims = sorted((i for i in range(fake.dim()) if fake.shape[i] > 1), key=lambda i: -held[i])
    if any(fake.stride(i) == 0 for i in dims):
        return None
    logical = torch.empty(fake.shape, device="meta").stride()

    def steps(distance: int) -> int:
        found = 0
        for i in dims:
            found += distance // fake.stride(i) * logical[i]
            distance %= fake.stride(i)
        return found

    own = steps(offset - int(fake.storage_offset())), tuple(map(steps, strides))
    if prod(size) == 0:
        return tuple(range(fake.dim())), 0, strides
    places = torch.zeros(fake.numel(), dtype=torch.int64).view(fake.shape)
    for i in range(fake.dim()):
        along = (torch.arange(fake.shape[i]) * fake.stride(i)).view(-1, *[1] * (fake.dim() - 1 - i))
        places = places + along
    places = places.reshape(-1) + int(fake.storage_offset())
    wanted, chosen = _indices(size, strides, offset), _indices(size, own[1], own[0])
    inside = int(chosen.min()) >= 0 and int(chosen.max()) < fake.numel()
    return (tuple(range(fake.dim())), *own) if inside and bool((places[chosen] == wanted).all()) else None


def _indices(size: Sequence[int], strides: Sequence[int], offset: int) -> torch.Tensor:
    found = torch.full((), offset, dtype=torch.int64)
    for n, stride in zip(size, strides, strict=True):
        found = found.unsqueeze(-1) + torch.arange(n) * stride
    return found.reshape(-1)


def _request(node: torch.fx.Node) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Size, strides and place in the storage that a node asks for."""
    size, strides = _argument(node, "size"), _argument(node, "stride")
    given = _argument(node, "storage_offset")
    start = node.args[0].meta["val"].storage_offset() if given is None else given  # type: ignore[union-attr]
    return tuple(size), tuple(strides), start


def _argument(node: torch.fx.Node, name: str) -> Any:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index(name)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name)


def _root(node: torch.fx.Node) -> torch.fx.Node:
    """The first value that has a value's storage: what it is a view of."""
    storage = node.meta["val"].untyped_storage()._cdata
    found = current = node
    while current.op == "call_function" and current.args and isinstance(current.args[0], torch.fx.Node):
        current = current.args[0]
        fake = current.meta.get("val")
        if isinstance(fake, torch.Tensor):
            if fake.untyped_storage()._cdata != storage:
                break
            found = current
    return found


def _outside(op: Operator) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"{op.source_line}: {op.target} addresses memory that is not its operand's, or whose elements lie apart, so "
        "that it would read something else on another device; call it on x.contiguous(), or use slices or unfold"
    )


def _copy(op: Operator, node: torch.fx.Node, graded: Collection[str]) -> list[Operator]:
    """``aten.copy`` has no derivative; it gives its source in the destination's dtype and shape.

    A destination that has a gradient gets one of zeros, as on one device: it is chosen nowhere.
    """
    copied = node.args[1].meta["val"]  # type: ignore[union-attr]
    source, (result,) = op.args[1], op.results
    made: list[Operator] = []
    if copied.dtype != getattr(torch, result.dtype):
        value = Value(f"{op.name}.cast", tuple(copied.shape), result.dtype)
        to, kwargs = "aten._to_copy.default", {"dtype": Symbol("dtype", result.dtype)}
        made.append(replace(op, name=value.name, target=to, args=(source,), kwargs=kwargs, results=(value,)))
        source = Ref(value.name)
    if op.args[0].name not in graded:
        return [*made, replace(op, target="aten.expand.default", args=(source, result.shape), kwargs={})]
    never = Value(f"{op.name}.never", (), "bool")
    kwargs = {"dtype": Symbol("dtype", "bool"), "device": Symbol("device", "")}
    full = replace(op, name=never.name, target="aten.full.default", args=((), False), kwargs=kwargs, results=(never,))
    where = replace(op, target="aten.where.self", args=(Ref(never.name), op.args[0], source), kwargs={})
    return [*made, full, where]


def _through_real(op: Operator, node: torch.fx.Node, graded: Collection[str]) -> list[Operator]:
    """An operator without a derivative for complex values, on their real and imaginary parts side by side."""
    (result,) = op.results
    if not result.dtype.startswith("complex"):
        return [op]
    made: list[Operator] = []
    args = list(op.args)
    for i, argument in enumerate(node.args):
        if not isinstance(argument, torch.fx.Node):
            continue
        shape = tuple(argument.meta["val"].shape)
        steps = (("aten.resolve_conj.default", shape, result.dtype), (_PARTS, (*shape, 2), _REAL[result.dtype]))
        for target, extents, dtype in steps:
            value = Value(f"{op.name}.{target.split('.')[1]}{i}", extents, dtype)
            made.append(replace(op, name=value.name, target=target, args=(args[i],), kwargs={}, results=(value,)))
            args[i] = Ref(value.name)
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dim" in names and names.index("dim") < len(args):
        args[names.index("dim")] %= len(result.shape)
    value = Value(f"{op.name}.parts", (*result.shape, 2), _REAL[result.dtype])
    made.append(replace(op, name=value.name, args=tuple(args), results=(value,)))
    return [*made, replace(op, target="aten.view_as_complex.default", args=(Ref(value.name),), kwargs={})]


_PARTS = "aten.view_as_real.default"
_REAL = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}


def _masked_put(op: Operator, node: torch.fx.Node, graded: Collection[str]) -> list[Operator]:
    """``x[mask] = values`` with one mask: a choice, element by element, if the values' shape does not hang on data."""
    indices: Any = node.args[1]
    given = [i for i, index in enumerate(indices) if isinstance(index, torch.fx.Node)]
    if len(given) != 1 or (len(op.args) > 3 and op.args[3]):
        return [op]
    mask = indices[given[0]].meta["val"]
    shape, values = node.args[0].meta["val"].shape, node.args[2].meta["val"]  # type: ignore[union-attr]
    behind = len(shape) - given[0] - mask.dim()
    if mask.dtype != torch.bool or values.dim() > behind:
        return [op]
    condition, made = op.args[1][given[0]], []
    if behind:
        value = Value(f"{op.name}.mask", (*mask.shape, *[1] * behind), "bool")
        made.append(_reshape(replace(op, name=value.name), condition.name, value, value.shape))
        condition = Ref(value.name)
    return [*made, replace(op, target="aten.where.self", args=(condition, op.args[2], op.args[0]), kwargs={})]


def _masked_scatter(op: Operator, node: torch.fx.Node, graded: Collection[str]) -> list[Operator]:
    """``masked_scatter`` by a mask that was expanded: by the mask as it was, which shows that it takes whole rows."""
    mask = node.args[1]
    assert isinstance(mask, torch.fx.Node)
    if mask.target is not torch.ops.aten.expand.default:
        return [op]
    rows = mask.args[0]
    assert isinstance(rows, torch.fx.Node)
    is_made = rows.op == "call_function" and rows.target is not operator.getitem
    if not is_made or rows.meta["val"].dim() != mask.meta["val"].dim():
        return [op]
    return [replace(op, args=(op.args[0], Ref(rows.name), *op.args[2:]))]


def _tile(op: Operator, node: torch.fx.Node, graded: Collection[str]) -> list[Operator]:
    """``tile`` is ``repeat`` with a number for every dimension."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    repeats = tuple(op.args[1])
    repeats = (1,) * (rank - len(repeats)) + repeats
    return [replace(op, target="aten.repeat.default", args=(op.args[0], repeats))]


_REWRITES: Mapping[str, Rewrite] = {
    "aten.as_strided.default": _as_strided,
    "aten.as_strided_copy.default": _as_strided,
    "aten.as_strided_scatter.default": _as_strided_scatter,
    "aten.copy.default": _copy,
    "aten.index_put.default": _masked_put,
    "aten.masked_scatter.default": _masked_scatter,
    "aten.select_scatter.default": _through_real,
    "aten.slice_scatter.default": _through_real,
    "aten.tile.default": _tile,
    "aten.zero.default": _through_real,
}
