"""A bias joins one partial result only: a tile of the contracted axis takes it along if it holds index 0."""

from __future__ import annotations

from graphpart.rules.local.cut import CutCall, LocalCall, Localize

CONTRACTED = "k"


def without_bias(cut: CutCall) -> LocalCall:
    """``linear``: the third argument is dropped from every tile but the first."""
    if _is_first(cut) or len(cut.op.operands) < 3:
        return cut.call()
    return LocalCall(cut.op.target, cut.op.args[:2], cut.op.kwargs, (0, 1))


def without_addend(product: str) -> Localize:
    """``addmm`` and its kind: the plain product on every tile but the first."""

    def localize(cut: CutCall) -> LocalCall:
        if _is_first(cut):
            return cut.call()
        if cut.op.kwargs.get("alpha", 1) == 1:
            return LocalCall(product, cut.op.args[1:], {}, (1, 2))
        return LocalCall(cut.op.target, cut.op.args, {**cut.op.kwargs, "beta": 0}, (0, 1, 2))

    return localize


def _is_first(cut: CutCall) -> bool:
    return CONTRACTED not in cut.tile or 0 in cut.tile[CONTRACTED]


LOCAL: dict[str, Localize] = {
    "linear": without_bias,
    "addmm": without_addend("aten.mm.default"),
    "addmv": without_addend("aten.mv.default"),
    "baddbmm": without_addend("aten.bmm.default"),
}
