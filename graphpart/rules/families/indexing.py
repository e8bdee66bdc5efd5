"""Operators that look things up: embeddings, gathers, index lists."""

from __future__ import annotations

from graphpart.ir.axes import AxisRule, Dim
from graphpart.ir.graph import Ref, refs
from graphpart.rules.call import Call, Dims, broadcast, fresh, make_rule
from graphpart.rules.notation import bind
from graphpart.rules.table import Families, family, line


def embedding(call: Call) -> AxisRule | None:
    """``embedding``: indices and features cut; parts of the vocabulary give rows of zeros for what they lack.

    Gradients scaled by frequency need to see all indices. Sparse ones add up, but parts of them cannot
    be joined, nor sent.
    """
    if call.get("sparse", False):
        return bind(call, "v d, ... -> ... d", whole="d")
    scaled = call.get("scale_grad_by_freq", False)
    return bind(call, "v d, ... -> ... d", sums="" if scaled else "v", whole="..." if scaled else "", linear="weight")


def index_select(call: Call) -> AxisRule | None:
    """``index_select``: any part of the index can be looked up alone; what it looks into is whole."""
    dims = fresh(call.shape("self"))
    dim = call.axis("dim", 0)
    result = (*dims[:dim], ("i",), *dims[dim + 1 :])
    index: Dims = (("i",),) if call.rank("index") else ()
    return make_rule(call, {"self": [dims], "index": [index]}, [result], linear="self")


def _beside(call: Call, dims: Dims, other: tuple[int, ...], dim: int, prefix: str) -> Dims:
    """Dimensions of a tensor that reads ``self`` from the front: shared axes where the extents agree."""
    shape = call.shape("self")
    return tuple((f"{prefix}{i}",) if i == dim or n != shape[i] else dims[i] for i, n in enumerate(other))


def gather(call: Call) -> AxisRule | None:
    """``gather``: along its dimension the index is cut and the operand is whole; elsewhere they share axes."""
    if not call.rank("self"):
        return None
    dims = fresh(call.shape("self"))
    dim = call.axis("dim", 0)
    index = _beside(call, dims, call.shape("index"), dim, "i")
    # Where the index is shorter it reads the first rows only, which a part of it would not.
    short = [d[0] for i, d in enumerate(index) if i != dim and d != dims[i]]
    return make_rule(call, {"self": [dims], "index": [index]}, [index], whole=short, linear="self")


def scatter(call: Call, linear: str = "") -> AxisRule | None:
    """``scatter``: along its dimension all is whole; elsewhere axes are shared where the extents agree."""
    if not call.rank("self"):
        return None
    dims = fresh(call.shape("self"))
    dim = call.axis("dim", 0)
    index = _beside(call, dims, call.shape("index"), dim, "i")
    operands = {"self": [dims], "index": [index]}
    shared = {i for i, d in enumerate(index) if d == dims[i]}
    if call.has("src"):
        source = _beside(call, dims, call.shape("src"), dim, "s")
        operands["src"] = [source]
        shared &= {i for i, d in enumerate(source) if d == dims[i]}
    whole = [d[0] for i, d in enumerate(dims) if i not in shared]
    return make_rule(call, operands, [dims], whole=whole, linear=linear)


def scatter_add(call: Call) -> AxisRule | None:
    """``scatter_add``: as ``scatter``, and jointly linear."""
    return scatter(call, "self+src")


def index(call: Call) -> AxisRule | None:
    """``x[i, :, j]``: indexed dimensions are whole, the others pass, the index's own axes are cut.

    The index's axes stand where the first indexed dimension was, or in front if indexed dimensions are apart
    (NumPy's advanced indexing).
    """
    if _is_masked(call):
        return None
    dims = fresh(call.shape("self"))
    operands, result = _lookup(call, dims)
    return make_rule(call, {"self": [dims], "indices": operands}, [result], linear="self")


def _is_masked(call: Call) -> bool:
    """Whether some index is a mask, which takes as many dimensions as it has, and gives as many rows as it says."""
    return any(call.dtype_of(ref.name) in ("bool", "uint8") for ref in refs(call.get("indices")))


def _lookup(call: Call, dims: Dims) -> tuple[list[Dims], Dims]:
    indices = call.get("indices")
    indexed = [i for i, item in enumerate(indices) if isinstance(item, Ref)]
    operands, found = broadcast(call.shapes("indices"), "i")
    kept = [(i, d) for i, d in enumerate(dims) if i not in indexed]
    apart = bool(indexed) and indexed[-1] - indexed[0] + 1 != len(indexed)
    first = 0 if apart or not indexed else indexed[0]
    before: tuple[Dim, ...] = tuple(d for i, d in kept if i < first)
    after = tuple(d for i, d in kept if i >= first)
    return list(operands), (*before, *found, *after)


def index_put(call: Call) -> AxisRule | None:
    """``x[i, :, j] = values``: only dimensions that are not indexed can be cut; none under a mask."""
    if _is_masked(call):
        return None
    dims = fresh(call.shape("self"))
    operands, written = _lookup(call, dims)
    indexed = [i for i, item in enumerate(call.get("indices")) if isinstance(item, Ref)]
    values = written[len(written) - call.rank("values") :]
    own = [d[0] for i, d in enumerate(dims) if i in indexed]
    linear = "self+values" if call.get("accumulate", False) else ""
    return make_rule(
        call,
        {"self": [dims], "indices": operands, "values": [values]},
        [dims],
        whole=[*own, *(axis for dim in written for axis in dim if axis.startswith("i"))],
        linear=linear,
    )


def masked_scatter(call: Call) -> AxisRule | None:
    """``masked_scatter``: which element goes where hangs on the whole mask; rows that it takes as such can be cut."""
    dims, marks = fresh(call.shape("self")), call.shape("mask")
    source: Dims = fresh(call.shape("source"), "s")
    mask = dims[len(dims) - len(marks) :]
    if len(marks) == len(dims) and marks[-1] == 1 and call.shape("source")[-1:] == call.shape("self")[-1:]:
        source = (*source[:-1], dims[-1])
    shared = set(source) & set(dims)
    whole = [d[0] for d in (*dims, *source) if d not in shared]
    return make_rule(call, {"self": [dims], "mask": [mask], "source": [source]}, [dims], whole=whole)


def one_hot(call: Call) -> AxisRule | None:
    """``one_hot``: the new dimension is whole; without a number of classes the data gives it, and all is."""
    dims = fresh(call.shape("self"))
    whole = ["c", *(d[0] for d in dims if call.get("num_classes", -1) < 0)]
    return make_rule(call, {"self": [dims]}, [(*dims, ("c",))], whole=whole)


FAMILIES: Families = {
    **family("embedding", "weight indices padding_idx scale_grad_by_freq sparse", embedding),
    **line("bucketize", "self boundaries", "..., v -> ..."),
    **line("take", "self index", "v, ... -> ...", linear="self"),
    **family("index_select", "self dim index", index_select),
    **family("gather", "self dim index", gather),
    **family("scatter", "self dim index src", scatter),
    **family("scatter_add", "self dim index src", scatter_add),
    **family("scatter_reduce", "self dim index src", scatter),
    **family("index.Tensor", "self indices", index),
    **family("index_put", "self indices values accumulate", index_put),
    **family("masked_scatter", "self mask source", masked_scatter),
    **family("one_hot", "self num_classes", one_hot),
}
