"""Local calls of operators that move elements: offsets, sizes and amounts follow the tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphpart.ir.axes import Window
from graphpart.ir.graph import Symbol
from graphpart.ir.region import Intervals
from graphpart.rules.local.cut import CutCall, LocalCall, Localize, each

TO_THE_END = 2**63 - 1
"""What ``aten.slice`` takes for "to the end"."""


def _dim(cut: CutCall) -> int:
    """The dimension that an operator works along, counted from the front of its first result."""
    return int(cut.get("dim", 0)) % len(cut.results[0].dims)


def _window(cut: CutCall, operand: int, dim: int) -> Window | None:
    """The window through which the tile reads a dimension of an operand; None where it reads it as if uncut."""
    found = cut.rule.operands[operand][dim]
    return found if isinstance(found, Window) and found.axis in cut.tile else None


def sliced(cut: CutCall) -> LocalCall:
    """``slice``: the region begins where the tile does."""
    return cut.call(start=0, end=TO_THE_END) if _window(cut, 0, _dim(cut)) else cut.call()


def narrowed(cut: CutCall) -> LocalCall:
    """``narrow``: the region is what the tile is."""
    dim = _dim(cut)
    return cut.call(start=0, length=len(cut.results[0].dims[dim])) if _window(cut, 0, dim) else cut.call()


def split(cut: CutCall) -> LocalCall:
    """``split`` and ``chunk``: every piece is as large as the tile's part of it."""
    sizes = [region.dims[_dim(cut)] for region in cut.results]
    if isinstance(cut.get("split_size"), int):
        call = cut.call(split_size=len(sizes[0]))
        return replace(call, target="aten.split.Tensor") if "chunk" in call.target else call
    return cut.call(split_size=list(map(len, sizes)))


def joined(cut: CutCall) -> LocalCall:
    """``cat``: without the operands that the tile does not touch; all but those may have given it its dtype."""
    kept = tuple(i for i, region in enumerate(cut.operands) if region.dims[_joined_dim(cut, i)])
    if len(kept) == len(cut.operands):
        return cut.call()
    tensors = cut.get("tensors")
    dtype = Symbol("dtype", cut.op.results[0].dtype)
    return LocalCall("graphpart.cat", ([tensors[i] for i in kept], _dim(cut), dtype), {}, kept)


def _joined_dim(cut: CutCall, operand: int) -> int:
    """The joined dimension of an operand; an empty vector among tensors of higher rank has no other."""
    return min(_dim(cut), len(cut.operands[operand].dims) - 1)


def padded(cut: CutCall) -> LocalCall:
    """``pad`` with a constant: as much as the tile has of the padding; all of it where it touches nothing else."""
    amounts = list(cut.get("pad"))
    rank = len(cut.results[0].dims)
    for dim in range(rank):
        window = _window(cut, 0, dim)
        if window is not None:
            part, begin = cut.tile[window.axis], -window.start
            before, after = Intervals.span(0, begin), Intervals.span(begin + window.extent, TO_THE_END)
            at = 2 * (rank - 1 - dim)
            amounts[at : at + 2] = [len(part & before), len(part & after)]
    if cut.operands[0]:
        return cut.call(pad=amounts)
    made = {"dtype": Symbol("dtype", cut.op.results[0].dtype), "device": Symbol("device", "")}
    return LocalCall("aten.full.default", (cut.results[0].shape, cut.get("value") or 0), made, ())


def unflattened(cut: CutCall) -> LocalCall:
    """``unflatten``: the new dimensions are the tile's."""
    dim = int(cut.get("dim")) % len(cut.rule.operands[0])
    return cut.call(sizes=list(cut.results[0].shape[dim:][: len(cut.get("sizes"))]))


def repeated(cut: CutCall) -> LocalCall:
    """``repeat``: as many copies as the tile has."""
    return cut.call(repeats=[_copies(cut, f"r{i}", count) for i, count in enumerate(cut.get("repeats"))])


def interleaved(cut: CutCall) -> LocalCall:
    """``repeat_interleave`` with a number of copies."""
    if "copies" not in cut.rule.extents:
        return cut.call()
    sized: dict[str, Any] = {"output_size": None} if "output_size" in cut.op.kwargs else {}
    return cut.call(repeats=_copies(cut, "copies", cut.get("repeats")), **sized)


def _copies(cut: CutCall, axis: str, count: int) -> int:
    return len(cut.tile[axis]) if axis in cut.tile else count


def looked_up(cut: CutCall) -> LocalCall:
    """``embedding`` in a part of the vocabulary: rows of zeros for all other words."""
    if "v" not in cut.tile:
        return cut.call()
    args = (cut.get("weight"), cut.get("indices"), cut.tile["v"].runs, cut.rule.extents["v"])
    return LocalCall("graphpart.embedding_part", (*args, cut.get("padding_idx", -1)), {}, (0, 1))


LOCAL: Mapping[str, Localize] = {
    **each("slice slice_copy", sliced),
    **each("narrow narrow_copy", narrowed),
    **each("split split_copy split_with_sizes split_with_sizes_copy chunk", split),
    **each("cat concat concatenate", joined),
    **each("pad constant_pad_nd", padded),
    "unflatten": unflattened,
    "repeat": repeated,
    "repeat_interleave": interleaved,
    "embedding": looked_up,
}
"""By operator name."""
