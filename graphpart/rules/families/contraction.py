"""Products: linear, matmul, einsum, attention, recurrent layers."""

from __future__ import annotations

from graphpart.ir.axes import AxisRule, Dim
from graphpart.rules.call import Call, Dims, fresh, make_rule, names, single
from graphpart.rules.notation import bind
from graphpart.rules.table import Families, family, line


def matmul(call: Call) -> AxisRule | None:
    """``aten.matmul``: vectors, matrices, or stacks of matrices on either side."""
    left = "k" if call.rank("self") == 1 else "... m k"
    right = "k" if call.rank("other") == 1 else "... k n"
    rows = "" if call.rank("self") == 1 else "m"
    columns = "" if call.rank("other") == 1 else "n"
    stack = "..." if max(call.rank("self"), call.rank("other")) > 2 else ""
    return bind(call, f"{left}, {right} -> {stack} {rows} {columns}", sums="k", linear="self other")


def einsum(call: Call) -> AxisRule | None:
    """``aten.einsum``: its equation is the notation already."""
    equation = call.get("equation").replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = sorted({c for c in inputs if c.isalpha()})
        output = ("..." if "..." in inputs else "") + "".join(c for c in letters if inputs.count(c) == 1)
    shapes = call.shapes("tensors")
    lengths = [len(s) - len(t.replace("...", "")) for s, t in zip(shapes, terms, strict=True)]
    longest = max(n if "..." in t else 0 for n, t in zip(lengths, terms, strict=True))
    batch = names("b", longest)

    def dims(term: str, length: int) -> Dims:
        head, dots, tail = term.partition("...")
        return single([*head, *(batch[longest - length :] if dots else ()), *tail])

    if any(len(set(t.replace("...", ""))) < len(t.replace("...", "")) for t in terms):
        return None  # a repeated letter takes a diagonal
    operands = [dims(t, n) for t, n in zip(terms, lengths, strict=True)]
    result = dims(output, longest)
    kept = {axis for dim in result for axis in dim}
    sums = {axis for tensor in operands for dim in tensor for axis in dim} - kept
    made = make_rule(call, operands, [result], sums=sums)
    return AxisRule(
        made.extents, made.operands, made.results, made.sums, made.whole, tuple((i,) for i in range(len(terms)))
    )


def attention(call: Call) -> AxisRule | None:
    """``scaled_dot_product_attention``: batch, heads, queries and value features.

    A causal mask follows the queries, unless dropout draws in the middle of it.

    With grouped queries, query head ``g * r + i`` reads key head ``g``: heads are ``(g r)``, key heads ``g``.
    Features ``d`` stay whole: they are summed inside a softmax, and set the default scale.
    """
    extents = None
    query_heads, key_heads = "", ""
    if call.get("enable_gqa", False):
        heads, groups = call.shape("query")[-3], call.shape("key")[-3]
        if groups != call.shape("value")[-3] or heads % groups:
            return None
        query_heads, key_heads, extents = "(g r) ", "g ", {"g": groups, "r": heads // groups}
    mask = f"... {query_heads}l t"
    if call.has("attn_mask") and call.rank("attn_mask") == 2:
        mask = "l t"
    line = f"... {query_heads}l d, ... {key_heads}t d, ... {key_heads}t e, {mask} -> ... {query_heads}l e"
    whole = "d t l" if call.get("is_causal", False) and call.get("dropout_p", 0.0) else "d t"
    linear = "" if call.get("dropout_p", 0.0) else "value"
    return bind(call, line, whole=whole, linear=linear, extents=extents)


def recurrent(call: Call) -> AxisRule | None:
    """``lstm.input``, ``gru.input`` and ``rnn_*.input``: only the batch axis can be cut."""
    sequence: tuple[Dim, ...] = (("b",), ("t",)) if call.get("batch_first") else (("t",), ("b",))
    if call.rank("input") != 3:
        return None
    states = [(("l",), ("b",), (f"h{i}",)) for i in range(len(call.shapes("hx")))]
    weights = [fresh(shape, f"p{i}_") for i, shape in enumerate(call.shapes("params"))]
    results = [(*sequence, ("o",)), *states]
    return make_rule(
        call,
        {"input": [(*sequence, ("f",))], "hx": states, "params": weights},
        results,
        whole=["t", "l", "o", "h0", "h1"],
    )


def cell(call: Call) -> AxisRule | None:
    """``lstm_cell``, ``gru_cell`` and ``rnn_*_cell``: samples cut; all features meet in every gate."""
    if call.rank("input") != 2:
        return None
    states: list[Dims] = [(("b",), (f"h{i}",)) for i in range(len(call.shapes("hx")))]
    weights = {name: [fresh(call.shape(name), name)] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call.has(name)}
    whole = [f"h{i}" for i in range(len(states))]
    results: list[Dims] = [(("b",), (f"h{i}",)) for i in range(len(call.results))]
    return make_rule(call, {"input": [(("b",), ("f",))], "hx": states, **weights}, results, whole=whole)


def stack_of_products(call: Call) -> AxisRule | None:
    """``baddbmm``: an addend that broadcasts, then a product per matrix."""
    return _with_addend(call, (("b",), ("m",), ("k",)), (("b",), ("k",), ("n",)))


def product_plus(call: Call) -> AxisRule | None:
    """``addmm``: an addend that broadcasts, then a product."""
    return _with_addend(call, (("m",), ("k",)), (("k",), ("n",)))


def vector_plus(call: Call) -> AxisRule | None:
    """``addmv``: an addend that broadcasts, then a matrix times a vector."""
    return _with_addend(call, (("m",), ("k",)), (("k",),))


def _with_addend(call: Call, left: Dims, right: Dims) -> AxisRule:
    """The addend joins one of the partial results, see ``rules.addends``."""
    addend, first, second = call.names[:3]
    result = tuple(d for d in (*left[:-1], *right[len(left) - 2 :]) if d != ("k",))
    own = result[len(result) - call.rank(addend) :]
    linear = f"{addend}+{first} {addend}+{second}"
    operands = {addend: [own], first: [left], second: [right]}
    return make_rule(call, operands, [result], sums=["k"], linear=linear)


def outer_sum(call: Call) -> AxisRule | None:
    """``cdist``: distances between all pairs of two sets of points."""
    return bind(call, "... p m, ... q m -> ... p q")


def tensor_grid(call: Call) -> AxisRule | None:
    """``meshgrid`` with ``ij`` indexing: every result has one axis per operand."""
    if call.get("indexing", "ij") != "ij":
        return None
    axes = names("d", len(call.shapes("tensors")))
    operands = [single([a]) if s else () for a, s in zip(axes, call.shapes("tensors"), strict=True)]
    return make_rule(call, {"tensors": operands}, [single(axes)] * len(call.results))


FAMILIES: Families = {
    **line("linear", "input weight bias", "... k, n k, n -> ... n", sums="k",
           linear="input+bias weight+bias"),
    **line("mm", "self mat2", "m k, k n -> m n", sums="k", linear="self mat2"),
    **line("bmm", "self mat2", "b m k, b k n -> b m n", sums="k", linear="self mat2"),
    **line("mv", "self vec", "m k, k -> m", sums="k", linear="self vec"),
    **line("dot vdot", "self tensor", "k, k ->", sums="k", linear="self tensor"),
    **line("outer", "self vec2", "m, n -> m n", linear="self vec2"),
    **line("_grouped_mm", "self mat2 offs bias", "m k, g k n, g -> m n", sums="k", whole="m g",
           linear="self mat2"),
    **line("transformers.grouped_mm_fallback", "input weight offs", "m k, g k n, g -> m n", sums="k", whole="m g",
           linear="input weight"),
    **family("matmul", "self other", matmul),
    **family("addmm", "self mat1 mat2", product_plus),
    **family("addmv", "self mat vec", vector_plus),
    **family("baddbmm", "self batch1 batch2", stack_of_products),
    **family("einsum", "equation tensors", einsum),
    **family("scaled_dot_product_attention", "query key value attn_mask dropout_p is_causal", attention),
    **family("lstm.input gru.input rnn_tanh.input rnn_relu.input",
             "input hx params has_biases num_layers dropout train bidirectional batch_first", recurrent),
    **family("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", "input hx w_ih w_hh b_ih b_hh", cell),
    **family("cdist", "x1 x2 p compute_mode", outer_sum),
    **family("meshgrid", "tensors indexing", tensor_grid),
}  # fmt: skip
