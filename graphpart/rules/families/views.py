"""Operators that move elements about: reshapes, permutations, slices, joins."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

from graphpart.ir.axes import AxisRule, Window
from graphpart.rules.call import Call, Dims, OperandDims, broadcast, fresh, make_rule, names, single
from graphpart.rules.factor import factor
from graphpart.rules.table import Families, family


def view(call: Call, shape_argument: int | None = 1) -> AxisRule | None:
    """Reshapes: the axes are the common factors of both shapes."""
    factors = factor(call.shape("self"), call.results[0])
    return make_rule(
        call,
        {"self": [factors.source], "other": [factors.target]},
        [factors.target],
        extents=factors.extents,
        whole=factors.whole,
        linear="self",
        shape_argument=shape_argument if shape_argument is not None and shape_argument < len(call.args) else None,
    )


def flatten(call: Call) -> AxisRule | None:
    """``flatten``, ``view_as``: reshapes without a size argument."""
    return view(call, None)


def unflatten(call: Call) -> AxisRule | None:
    """``unflatten``: a dimension becomes several, whose sizes follow the tile."""
    dim = call.axis("dim", 0)
    dims = fresh(call.shape("self"))
    new = names("n", len(call.results[0]) - len(dims) + 1)
    return make_rule(
        call,
        {"self": [(*dims[:dim], new, *dims[dim + 1 :])]},
        [(*dims[:dim], *single(new), *dims[dim + 1 :])],
        extents=dict(zip(new, call.results[0][dim:], strict=False)),
        linear="self",
    )


def expand(call: Call) -> AxisRule | None:
    """``expand``: new extents are axes of the result only."""
    (dims, _), result = broadcast([call.shape("self"), call.results[0]])
    return make_rule(call, {"self": [dims]}, [result], linear="self", shape_argument=1 if len(call.args) > 1 else None)


def _rearrange(call: Call, order: list[int]) -> AxisRule:
    dims = fresh(call.shape("self"))
    return make_rule(call, {"self": [dims]}, [tuple(dims[i] for i in order)], linear="self")


def permute(call: Call) -> AxisRule | None:
    """``permute``."""
    rank = call.rank("self")
    return _rearrange(call, [d % rank for d in call.get("dims")])


def transpose(call: Call) -> AxisRule | None:
    """``transpose`` and its other names; ``t``, ``mT`` and ``adjoint`` swap the last two dimensions."""
    rank = call.rank("self")
    order = list(range(rank))
    if rank >= 2:
        first, second = call.axis("dim0", -2), call.axis("dim1", -1)
        order[first], order[second] = order[second], order[first]
    return _rearrange(call, order)


def reverse(call: Call) -> AxisRule | None:
    """``numpy_T``."""
    return _rearrange(call, list(range(call.rank("self")))[::-1])


def movedim(call: Call) -> AxisRule | None:
    """``movedim``."""
    rank = call.rank("self")
    source, destination = (
        [d % rank for d in ([given] if isinstance(given, int) else given)]
        for given in (call.get("source"), call.get("destination"))
    )
    rest = iter(d for d in range(rank) if d not in source)
    return _rearrange(call, [source[destination.index(i)] if i in destination else next(rest) for i in range(rank)])


def unsqueeze(call: Call) -> AxisRule | None:
    """``unsqueeze``."""
    dims = fresh(call.shape("self"))
    dim = call.axis("dim", 0, rank=len(dims) + 1)
    return make_rule(call, {"self": [dims]}, [(*dims[:dim], (), *dims[dim:])], linear="self")


def squeeze(call: Call) -> AxisRule | None:
    """``squeeze``: a named axis longer than 1 stays whole, as a tile of extent 1 would be squeezed too."""
    shape = call.shape("self")
    asked = call.axes("dim") if shape else ()
    gone = {d for d in asked if shape[d] == 1}
    axes = names("d", len(shape))
    dims = tuple(() if i in gone else (axis,) for i, axis in enumerate(axes))
    result = tuple(d for i, d in enumerate(dims) if i not in gone)
    return make_rule(call, {"self": [dims]}, [result], whole=[axes[d] for d in asked], linear="self")


def _without(dims: Dims, *gone: int) -> Dims:
    return tuple(d for i, d in enumerate(dims) if i not in gone)


def select(call: Call) -> AxisRule | None:
    """``select`` and ``unbind``: the dimension goes, and is needed whole."""
    dims = fresh(call.shape("self"))
    result = _without(dims, call.axis("dim", 0))
    return make_rule(call, {"self": [dims]}, [result] * len(call.results), linear="self")


def resize(call: Call, dims_of: list[int], linear: str = "self") -> AxisRule:
    """Results whose listed dimensions have other extents; these are whole on both sides."""
    dims = fresh(call.shape("self"))
    results = [
        tuple((f"n{i}_{number}",) if i in dims_of else d for i, d in enumerate(dims))
        for number in range(len(call.results))
    ]
    new = [d[0] for result in results for i, d in enumerate(result) if i in dims_of]
    return make_rule(call, {"self": [dims]}, results, whole=new, linear=linear)


def split(call: Call) -> AxisRule | None:
    """``split`` and ``chunk``: all pieces are multiples of one extent; a tile holds its part of each multiple.

    A fused q-k-v projection is ``(parts d) -> d, d, d``: a tile of ``d`` reads three runs. A projection of q and of
    k and v together is ``(parts d) -> d, (p1 d)``.
    """
    dim = call.axis("dim", 0)
    sizes = [shape[dim] for shape in call.results]
    common = max(gcd(*sizes), 1)
    extents = {f"p{i}": size // common for i, size in enumerate(sizes) if size != common}
    extents |= {"parts": sum(sizes) // common, f"d{dim}": common}
    dims = fresh(call.shape("self"))
    own = dims[dim]

    def put(front: tuple[str, ...]) -> Dims:
        return (*dims[:dim], (*front, *own), *dims[dim + 1 :])

    results = [put((f"p{i}",) if f"p{i}" in extents else ()) for i in range(len(sizes))]
    return make_rule(call, {"self": [put(("parts",))]}, results, extents=extents, linear="self")


def _windowed(call: Call, windows: Mapping[int, tuple[int, int]], linear: str) -> AxisRule:
    """A result of which some dimensions read shifted ones of the operand: per such dimension, stride and start."""
    shape = call.shape("self")
    result = fresh(call.results[0])
    operand = tuple(
        Window(dim[0], shape[i], windows[i][0], windows[i][1]) if i in windows else dim for i, dim in enumerate(result)
    )
    return make_rule(call, {"self": [operand]}, [result], linear=linear)


def narrow(call: Call) -> AxisRule | None:
    """``narrow``: a tile of its dimension reads that much further on."""
    dim = call.axis("dim", 0)
    if call.has("start"):
        return None
    return _windowed(call, {dim: (1, call.get("start") % max(call.shape("self")[dim], 1))}, "self")


def slice_(call: Call) -> AxisRule | None:
    """``slice``: a tile of its dimension reads that much further on, and ``step`` times as far."""
    dim = call.axis("dim", 0)
    extent, step = call.shape("self")[dim], call.get("step", 1)
    if step == 1 and extent == call.results[0][dim]:
        return _windowed(call, {}, "self")
    start = slice(call.get("start"), None).indices(extent)[0]
    return _windowed(call, {dim: (step, start)}, "self")


def cat(call: Call) -> AxisRule | None:
    """``cat``: a tile of the joined dimension reads from the operands that it touches, as far as it touches them."""
    rank = len(call.results[0])
    dim = call.axis("dim", 0, rank=rank)
    dims = fresh(call.results[0])
    operands: list[OperandDims] = []
    offset = 0
    for shape in call.shapes("tensors"):
        if shape == (0,) and rank > 1:  # cat ignores an empty vector, whatever the rank of the others
            operands.append((Window(dims[dim][0], 0),))
            continue
        operands.append((*dims[:dim], Window(dims[dim][0], shape[dim], start=-offset), *dims[dim + 1 :]))
        offset += shape[dim]
    return make_rule(call, {"tensors": operands}, [dims], linear="tensors")


def stack(call: Call) -> AxisRule | None:
    """``stack``: the new dimension is whole."""
    dims = fresh(call.results[0])
    dim = call.axis("dim", 0, rank=len(dims))
    operands = [_without(dims, dim)] * len(call.shapes("tensors"))
    return make_rule(call, {"tensors": operands}, [dims], whole=dims[dim], linear="tensors")


def pad(call: Call) -> AxisRule | None:
    """``pad``: a tile reads what it has of the operand; amounts run from the last dimension, two each.

    Where the padding repeats or mirrors the operand, padded dimensions are whole.
    """
    amounts = call.get("pad")
    rank = call.rank("self")
    padded = [rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    if call.get("mode", "constant") != "constant":
        return resize(call, padded)
    windows = {dim: (1, -amounts[2 * (rank - 1 - dim)]) for dim in padded}
    return _windowed(call, windows, "self" if not call.get("value") else "")


def repeat(call: Call) -> AxisRule | None:
    """``repeat``: a dimension becomes (copies, original)."""
    repeats = call.get("repeats")
    dims = fresh(call.shape("self"))
    copies = names("r", len(repeats))
    own = ((),) * (len(repeats) - len(dims)) + dims
    result = tuple((copy, *dim) for copy, dim in zip(copies, own, strict=True))
    extents = dict(zip(copies, repeats, strict=True))
    return make_rule(call, {"self": [dims]}, [result], extents=extents, linear="self")


def repeat_interleave(call: Call) -> AxisRule | None:
    """``repeat_interleave`` with a number: a dimension becomes (original, copies); with counts it is whole."""
    given = call.get("dim")
    dims = fresh(call.shape("self"))
    extents = dict(zip((d[0] for d in dims), call.shape("self"), strict=True))
    at = slice(None) if given is None else slice(given % len(dims), given % len(dims) + 1)
    merged = tuple(axis for dim in dims[at] for axis in dim)
    before, after = dims[: at.start or 0], dims[at.stop :] if at.stop else ()
    if call.has("repeats"):
        whole = ["n", "r", *merged]
        return make_rule(
            call, {"self": [dims], "repeats": [(("r",),)]}, [(*before, ("n",), *after)], whole=whole, linear="self"
        )
    result: Dims = (*before, (*merged, "copies"), *after)
    extents["copies"] = call.get("repeats")
    return make_rule(call, {"self": [dims]}, [result], extents=extents, linear="self")


def diff(call: Call) -> AxisRule | None:
    """``diff``: neighbours along its dimension meet, which stays whole in all operands."""
    dims = fresh(call.shape("self"))
    dim = call.axis("dim", -1)

    def named(axis: str) -> list[Dims]:
        return [(*dims[:dim], (axis,), *dims[dim + 1 :])]

    operands = {"self": [dims], "prepend": named("before"), "append": named("after")}
    return make_rule(call, operands, named("n"), whole=["n"], linear="self+prepend+append")


def diagonal(call: Call) -> AxisRule | None:
    """``diagonal``: both dimensions whole, the diagonal last."""
    dims = fresh(call.shape("self"))
    gone = call.axis("dim1", 0), call.axis("dim2", 1)
    return make_rule(call, {"self": [dims]}, [(*_without(dims, *gone), ("n",))], whole=["n"], linear="self")


def unfold(call: Call) -> AxisRule | None:
    """``unfold``: windows along one dimension, which is whole; their positions come last."""
    dims = fresh(call.shape("self"))
    dim = call.axis("dimension", 0)
    result = (*dims[:dim], ("n",), *dims[dim + 1 :], ("window",))
    return make_rule(call, {"self": [dims]}, [result], whole=["n", "window"], linear="self")


def put(call: Call) -> AxisRule | None:
    """``slice_scatter`` and ``select_scatter``: the dimension written to is whole."""
    dims = fresh(call.shape("self"))
    dim = call.axis("dim", 0)
    kept: Any = (("n",),) if call.rank("src") == len(dims) else ()
    source = (*dims[:dim], *kept, *dims[dim + 1 :])
    return make_rule(call, {"self": [dims], "src": [source]}, [dims], whole=[*dims[dim], "n"], linear="self+src")


def as_real(call: Call) -> AxisRule | None:
    """``view_as_real``: the real and the imaginary part stand side by side, in a last dimension."""
    dims = fresh(call.shape("self"))
    return make_rule(call, {"self": [dims]}, [(*dims, ("part",))], whole=["part"], linear="self")


def as_complex(call: Call) -> AxisRule | None:
    """``view_as_complex``: the reverse."""
    dims = fresh(call.results[0])
    return make_rule(call, {"self": [(*dims, ("part",))]}, [dims], linear="self")


FAMILIES: Families = {
    **family("view_as_real view_as_real_copy", "self", as_real),
    **family("view_as_complex view_as_complex_copy", "self", as_complex),
    **family("view.default reshape _unsafe_view _reshape_copy view_copy", "self size", view),
    **family("flatten", "self start_dim end_dim", flatten),
    **family("view_as reshape_as", "self other", flatten),
    **family("unflatten", "self dim sizes", unflatten),
    **family("expand broadcast_to expand_copy", "self size", expand),
    **family("permute permute_copy", "self dims", permute),
    **family("transpose swapaxes swapdims transpose_copy t t_copy mT", "self dim0 dim1", transpose),
    **family("numpy_T", "self", reverse),
    **family("movedim moveaxis", "self source destination", movedim),
    **family("unsqueeze unsqueeze_copy", "self dim", unsqueeze),
    **family("squeeze squeeze_copy", "self dim", squeeze),
    **family("select select_copy", "self dim index", select),
    **family("unbind unbind_copy", "self dim", select),
    **family("split split_copy split_with_sizes split_with_sizes_copy chunk", "self split_size dim", split),
    **family("narrow narrow_copy", "self dim start length", narrow),
    **family("slice slice_copy", "self dim start end step", slice_),
    **family("cat concat concatenate", "tensors dim", cat),
    **family("stack", "tensors dim", stack),
    **family("pad", "self pad mode value", pad),
    **family("constant_pad_nd", "self pad value", pad),
    **family("repeat", "self repeats", repeat),
    **family("repeat_interleave.self_int repeat_interleave.self_Tensor", "self repeats dim", repeat_interleave),
    **family("diff", "self n dim prepend append", diff),
    **family("diagonal diagonal_copy", "self offset dim1 dim2", diagonal),
    **family("unfold unfold_copy", "self dimension size step", unfold),
    **family("slice_scatter", "self src dim start end step", put),
    **family("select_scatter", "self src dim index", put),
}
