"""One tile of one operator, and the call that computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphpart.ir.axes import AxisRule
from graphpart.ir.graph import Operator
from graphpart.ir.region import Intervals, Region


@dataclass(frozen=True, slots=True)
class LocalCall:
    """The call that computes one tile.

    Attributes:
        target: what it computes, one of torch's operators or of graphpart's own.
        args: positional arguments. Tensors are the whole call's references; each stands for the region of its
            operand that the tile reads.
        kwargs: keyword arguments, likewise.
        operands: which operands of the whole call the references stand for, in order. An operand of which the tile
            reads nothing may be missing.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CutCall:
    """One tile of one operator.

    Attributes:
        op: the operator, as called on whole tensors.
        rule: its axis rule.
        names: the schema's names of its positional arguments, as far as its rule knows them.
        tile: index set per cut axis.
        operands: the region of every operand that the tile reads, in order.
        results: the region of every result that it makes.
    """

    op: Operator
    rule: AxisRule
    names: tuple[str, ...]
    tile: Mapping[str, Intervals]
    operands: tuple[Region, ...]
    results: tuple[Region, ...]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument of the whole call by its schema name."""
        if name in self.op.kwargs:
            return self.op.kwargs[name]
        at = self.names.index(name)
        return self.op.args[at] if at < len(self.op.args) else default

    def call(self, **changed: Any) -> LocalCall:
        """The whole call with some of its arguments changed, by schema name; its references stay."""
        args = list(self.op.args)
        kwargs = dict(self.op.kwargs)
        if self.rule.shape_argument is not None:
            args[self.rule.shape_argument] = self.results[0].shape
        for name, value in changed.items():
            at = self.names.index(name) if name in self.names else len(args)
            if name not in kwargs and at < len(args):
                args[at] = value
            else:
                kwargs[name] = value
        return LocalCall(self.op.target, tuple(args), kwargs, tuple(range(len(self.operands))))


Localize = Callable[[CutCall], LocalCall]
"""Makes the local call of an operator whose literals follow the tile."""


def each(targets: str, localize: Localize) -> dict[str, Localize]:
    """Table rows for operators, names separated by spaces, whose local calls one function makes."""
    return dict.fromkeys(targets.split(), localize)
