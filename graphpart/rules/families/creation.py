"""Operators that make tensors from numbers."""

from __future__ import annotations

from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call, fresh, make_rule
from graphpart.rules.table import Families, family


def filled(call: Call) -> AxisRule | None:
    """Every element alike (or drawn alike): any part of the result can be made alone."""
    return make_rule(call, [], [fresh(call.results[0])], shape_argument=_size(call))


def filled_like(call: Call) -> AxisRule | None:
    """``new_zeros`` and its kind: the operand lends its dtype only, but has to be there; in parts if it looks alike."""
    result = fresh(call.results[0])
    operand = result if call.shape("self") == call.results[0] else fresh(call.shape("self"), "s")
    return make_rule(call, {"self": [operand]}, [result], shape_argument=_size(call))


def _size(call: Call) -> int | None:
    at = call.names.index("size")
    return at if at < len(call.args) else None


def counted(call: Call) -> AxisRule | None:
    """The values tell their position: made whole."""
    dims = fresh(call.results[0])
    return make_rule(call, [], [dims], whole=[d[0] for d in dims])


FAMILIES: Families = {
    **family("zeros ones empty rand randn full", "size fill_value", filled),
    **family("randint", "high size", filled),
    **family("randint.low", "low high size", filled),
    **family("new_zeros new_ones new_empty new_full", "self size fill_value", filled_like),
    **family("arange linspace logspace eye scalar_tensor randperm tril_indices triu_indices", "", counted),
}
