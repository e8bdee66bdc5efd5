"""Reductions: sums cut the reduced axes into partial results, all others keep them whole."""

from __future__ import annotations

from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call, Dims, fresh, make_rule
from graphpart.rules.table import Families, family


def reduced(dims: Dims, gone: tuple[int, ...], keepdim: bool) -> Dims:
    """The dimensions left after a reduction."""
    if keepdim:
        return tuple(() if i in gone else d for i, d in enumerate(dims))
    return tuple(d for i, d in enumerate(dims) if i not in gone)


def reduce(call: Call, adds: bool, linear: str = "", averages: bool = False) -> AxisRule | None:
    """Any reduction over ``dim`` (all dimensions where it is left out); an average can be rewritten as a sum."""
    dims = fresh(call.shape("self"))
    gone = call.axes("dim") if dims else ()
    result = reduced(dims, gone, bool(call.get("keepdim", False)))
    axes = [dims[i][0] for i in gone]
    return make_rule(
        call,
        {"self": [dims]},
        [result] * len(call.results),
        sums=axes if adds else (),
        linear=linear,
        rewritten=axes if averages else (),
    )


def _rows(targets: str, arguments: str, adds: bool = False, linear: str = "", averages: bool = False) -> Families:
    return family(targets, arguments, lambda call: reduce(call, adds, linear, averages))


def histogram(call: Call) -> AxisRule | None:
    """``histc``: counts add up where the range is given; without one it comes from the data."""
    low, high = call.get("min", 0), call.get("max", 0)
    dims = fresh(call.shape("self"))
    sums = [d[0] for d in dims] if low != high else []
    return make_rule(call, {"self": [dims]}, [(("bin",),)], sums=sums, whole=["bin"])


def pick(call: Call) -> AxisRule | None:
    """``topk``, ``kthvalue``, ``mode``: their axis is read whole and comes out with another extent, or not at all."""
    dims = fresh(call.shape("self"))
    dim = call.axis("dim", -1)
    other = (("k",),) if len(call.results[0]) == len(dims) else ()
    result = (*dims[:dim], *other, *dims[dim + 1 :])
    return make_rule(call, {"self": [dims]}, [result] * len(call.results), whole=["k"])


FAMILIES: Families = {
    **_rows("sum", "self dim keepdim", adds=True, linear="self"),
    **_rows("nansum count_nonzero", "self dim keepdim", adds=True),
    # A mean's parts do not add up; lowering turns it into a sum and a division.
    **_rows("mean", "self dim keepdim", linear="self", averages=True),
    **_rows(
        "amax amin aminmax prod any all argmax argmin max min logsumexp nanmean median nanmedian", "self dim keepdim"
    ),
    **_rows("var std var_mean std_mean", "self dim unbiased keepdim"),
    **_rows("var.default std.default var_mean.default std_mean.default", "self unbiased"),
    **_rows("norm linalg_vector_norm", "self ord dim keepdim"),
    **family("histc", "self bins min max", histogram),
    **family("topk kthvalue", "self k dim", pick),
    **family("mode", "self dim", pick),
    **family("multinomial", "self num_samples", pick),
}
