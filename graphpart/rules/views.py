"""Operators that move elements about: reshapes, permutations, slices, joins."""

from __future__ import annotations

from typing import Any

from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call, Dims, broadcast, fresh, make_rule, names, single
from graphpart.rules.factor import factor
from graphpart.rules.family import Families, family


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
    """``unflatten``: the sizes of the new dimensions are literals, so these stay whole."""
    dim = call.axis("dim", 0)
    dims = fresh(call.shape("self"))
    new = names("n", len(call.results[0]) - len(dims) + 1)
    return make_rule(
        call,
        {"self": [(*dims[:dim], new, *dims[dim + 1 :])]},
        [(*dims[:dim], *single(new), *dims[dim + 1 :])],
        extents=dict(zip(new, call.results[0][dim:], strict=False)),
        whole=new,
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


def cut(call: Call) -> AxisRule | None:
    """``split``, ``chunk`` and ``narrow``: sizes are literals, so the dimension is whole."""
    return resize(call, [call.axis("dim", 0)])


def slice_(call: Call) -> AxisRule | None:
    """``slice``: whole along its dimension, unless it takes everything."""
    dim = call.axis("dim", 0)
    everything = call.get("step", 1) == 1 and call.shape("self")[dim] == call.results[0][dim]
    return resize(call, [] if everything else [dim])


def cat(call: Call) -> AxisRule | None:
    """``cat``: the joined dimension is whole in every operand and in the result."""
    shapes = call.shapes("tensors")
    rank = len(call.results[0])
    dim = call.axis("dim", 0, rank=rank)
    dims = fresh(call.results[0])
    operands = [
        # cat ignores an empty vector, whatever the rank of the others.
        (("e",),) if s == (0,) and rank > 1 else (*dims[:dim], (f"c{i}",), *dims[dim + 1 :])
        for i, s in enumerate(shapes)
    ]
    return make_rule(call, {"tensors": operands}, [dims], whole=dims[dim], linear="tensors")


def stack(call: Call) -> AxisRule | None:
    """``stack``: the new dimension is whole."""
    dims = fresh(call.results[0])
    dim = call.axis("dim", 0, rank=len(dims))
    operands = [_without(dims, dim)] * len(call.shapes("tensors"))
    return make_rule(call, {"tensors": operands}, [dims], whole=dims[dim], linear="tensors")


def pad(call: Call) -> AxisRule | None:
    """``pad``: padded dimensions are whole; amounts run from the last dimension, two each."""
    amounts = call.get("pad")
    rank = call.rank("self")
    padded = [rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    fills = call.get("mode", "constant") == "constant" and (call.get("value") or 0) != 0
    return resize(call, padded, "" if fills else "self")


def repeat(call: Call) -> AxisRule | None:
    """``repeat``: a dimension becomes (copies, original); the number of copies is a literal."""
    repeats = call.get("repeats")
    dims = fresh(call.shape("self"))
    copies = names("r", len(repeats))
    own = ((),) * (len(repeats) - len(dims)) + dims
    result = tuple((copy, *dim) for copy, dim in zip(copies, own, strict=True))
    extents = dict(zip(copies, repeats, strict=True))
    return make_rule(call, {"self": [dims]}, [result], extents=extents, whole=copies, linear="self")


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
    return make_rule(call, {"self": [dims]}, [result], extents=extents, whole=["copies"], linear="self")


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


FAMILIES: Families = {
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
    **family("split split_copy split_with_sizes split_with_sizes_copy chunk", "self split_size dim", cut),
    **family("narrow narrow_copy", "self dim start length", cut),
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
