"""Operators that work element by element, and those that also run along one axis."""

from __future__ import annotations

from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call, broadcast, fresh, make_rule, names
from graphpart.rules.table import Families, family


def pointwise(call: Call, linear: str = "") -> AxisRule | None:
    """Any operator torch tags pointwise: operands broadcast, results have the common shape."""
    operands, result = broadcast([tuple(call.shape_of(ref.name)) for _, _, ref in call.tensors()])
    return make_rule(call, operands, [result] * len(call.results), linear=linear)


def _linear(targets: str, arguments: str, linear: str) -> Families:
    """Rows for pointwise operators that are linear in some of their arguments."""
    return family(targets, arguments, lambda call: pointwise(call, linear))


def division(call: Call) -> AxisRule | None:
    """``div``: linear in the dividend unless it rounds."""
    return pointwise(call, "" if call.get("rounding_mode") else "self")


def masked(call: Call) -> AxisRule | None:
    """``masked_fill``: linear where it fills with zero."""
    zero = not call.has("value") and call.get("value") == 0
    return pointwise(call, "self" if zero else "")


def expand_as(call: Call) -> AxisRule | None:
    """``expand_as``: the second operand lends its shape only."""
    return pointwise(call, "self")


def retyped(call: Call) -> AxisRule | None:
    """``type_as``: the second operand lends its dtype only, but has to be there; in parts if it looks alike."""
    dims = fresh(call.shape("self"))
    alike = call.shape("other") == call.shape("self")
    return make_rule(call, {"self": [dims], "other": [dims if alike else fresh(call.shape("other"), "s")]}, [dims])


def prelu(call: Call) -> AxisRule | None:
    """``prelu``: one slope, or one per channel (dimension 1)."""
    dims = fresh(call.shape("self"))
    if call.shape("weight") == (1,) or call.rank("self") < 2:
        return make_rule(call, {"self": [dims], "weight": [((),) * call.rank("weight")]}, [dims])
    return make_rule(call, {"self": [dims], "weight": [(dims[1],)]}, [dims])


def along(call: Call, linear: str = "", default: int | None = -1, hidden: str = "dim") -> AxisRule | None:
    """Operators whose results look like their operand and that need one axis, or several, whole."""
    rank = call.rank("self")
    given = call.get(hidden, default)
    whole = [given] if isinstance(given, int) else given or range(rank)
    axes = names("d", rank)
    dims = fresh(call.shape("self"))
    own = [axes[d % rank] for d in whole] if rank else []
    return make_rule(call, {"self": [dims]}, [dims] * len(call.results), whole=own, linear=linear)


def _along(targets: str, arguments: str, linear: str = "", default: int | None = -1, hidden: str = "dim") -> Families:
    return family(targets, arguments, lambda call: along(call, linear, default, hidden))


def triangle(call: Call) -> AxisRule | None:
    """``tril`` and ``triu``: the matrix whole, stacks of matrices cut."""
    dims = fresh(call.shape("self"))
    return make_rule(call, {"self": [dims]}, [dims], whole=[d[0] for d in dims[-2:]], linear="self")


def gated(call: Call) -> AxisRule | None:
    """``glu``: the cut dimension is (half, rest); each tile holds its part of both halves."""
    dim = call.axis("dim", -1)
    result = fresh(call.results[0])
    operand = (*result[:dim], ("half", *result[dim]), *result[dim + 1 :])
    return make_rule(call, {"self": [operand]}, [result], extents={"half": 2})


def similarity(call: Call) -> AxisRule | None:
    """``cosine_similarity``: operands broadcast, one axis is summed inside a quotient."""
    operands, dims = broadcast([call.shape("x1"), call.shape("x2")])
    dim = call.axis("dim", 1, rank=len(dims))
    return make_rule(call, operands, [(*dims[:dim], *dims[dim + 1 :])])


FAMILIES: Families = {
    # Tagged pointwise, and linear.
    **_linear("add.Tensor sub.Tensor rsub.Tensor subtract.Tensor", "self other", "self+other"),
    **_linear("mul.Tensor mul.Scalar multiply.Tensor", "self other", "self other"),
    **_linear("neg positive clone alias detach contiguous lift_fresh lift_fresh_copy real imag conj_physical",
              "self", "self"),
    **_linear("lerp", "self end weight", "self+end"),
    **_linear("addcmul", "self tensor1 tensor2", "self+tensor1 self+tensor2"),
    **_linear("addcdiv", "self tensor1 tensor2", "self+tensor1"),
    **family("div true_divide divide", "self other", division),
    **family("masked_fill", "self mask value", masked),
    # Pointwise in fact, although torch does not say so.
    **family("max.other min.other", "self other", pointwise),
    **family("where.ScalarOther where.ScalarSelf where.Scalar", "condition self other", pointwise),
    **family("__and__ __or__ __xor__ __lshift__ __rshift__ floor_divide isclose float_power", "self other", pointwise),
    **family("_to_copy to _conj conj resolve_conj resolve_neg log_sigmoid hardswish special_expit isreal "
             "fill copy bernoulli normal_functional dropout native_dropout alpha_dropout _prelu_kernel "
             "special_erf special_erfc rrelu polar complex", "self other value p", pointwise),
    **family("zeros_like ones_like empty_like full_like rand_like randn_like randint_like",
             "self fill_value high", pointwise),
    **family("expand_as", "self other", expand_as),
    **_linear("broadcast_tensors", "tensors", "tensors"),
    **family("type_as to.other", "self other", retyped),
    **family("prelu", "self weight", prelu),
    # Along an axis.
    **_along("softmax _softmax log_softmax _log_softmax logcumsumexp cumprod cummax cummin", "self dim"),
    **_along("cumsum", "self dim", linear="self"),
    **_along("sort argsort", "self dim descending"),
    **_along("flip", "self dims", linear="self", default=None, hidden="dims"),
    **_along("roll", "self shifts dims", linear="self", default=None, hidden="dims"),
    **family("tril triu", "self diagonal", triangle),
    **family("glu", "self dim", gated),
    **family("cosine_similarity", "x1 x2 dim eps", similarity),
}  # fmt: skip
