"""What one tile of an operator calls: literals of the whole call (shapes, offsets, paddings, groups) made local."""

from __future__ import annotations

from collections.abc import Mapping

from graphpart.ir.graph import Operator
from graphpart.ir.region import Intervals, Region
from graphpart.rules.local import addends, attention, views, windows
from graphpart.rules.local.cut import CutCall, LocalCall, Localize
from graphpart.rules.lookup import names_of

__all__ = ["LocalCall", "local_call"]


def picked_classes(cut: CutCall) -> LocalCall:
    """``graphpart.pick_class``: the classes that the tile holds, as runs."""
    *args, runs = cut.op.args
    own = cut.tile["c"].runs if "c" in cut.tile else runs
    return LocalCall(cut.op.target, (*args, own), cut.op.kwargs, (0, 1))


LOCAL: Mapping[str, Localize] = {
    **addends.LOCAL,
    **attention.LOCAL,
    **views.LOCAL,
    **windows.LOCAL,
    "graphpart.pick_class": picked_classes,
}
"""By operator name: how literals other than the result's shape follow a tile."""


def local_call(op: Operator, tile: Mapping[str, Intervals], operands: tuple[Region, ...]) -> LocalCall:
    """The call that computes one tile from the regions that it reads.

    Args:
        op: the operator.
        tile: index set per cut axis; empty for the whole operator.
        operands: the region of every operand that the tile reads, in order.
    """
    if not tile or op.rule is None:
        return LocalCall(op.target, op.args, op.kwargs, tuple(range(len(operands))))
    results = tuple(op.rule.region(dims, tile) for dims in op.rule.results)
    cut = CutCall(op, op.rule, names_of(op.target), tile, operands, results)
    localize = LOCAL.get(op.target.split(".")[1] if op.target.startswith("aten.") else op.target)
    return localize(cut) if localize is not None else cut.call()
