"""How a table row of an operator family is written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call
from graphpart.rules.notation import bind

Rule = Callable[[Call], AxisRule | None]


@dataclass(frozen=True, slots=True)
class Family:
    """What a family of operators shares.

    Attributes:
        names: the schema's names of its positional arguments.
        rule: makes the axis rule of a call, or None where that call has none.
    """

    names: tuple[str, ...]
    rule: Rule


Families = Mapping[str, Family]
"""By operator name, ``linear`` or, for one overload, ``max.other``; other libraries' with their namespace."""


def family(targets: str, names: str, rule: Rule) -> dict[str, Family]:
    """Rows for operators whose rule a function makes.

    Args:
        targets: operator names, separated by spaces.
        names: names of their positional arguments, separated by spaces.
        rule: the function.
    """
    row = Family(tuple(names.split()), rule)
    return dict.fromkeys(targets.split(), row)


def line(
    targets: str,
    names: str,
    notation: str,
    *,
    sums: str = "",
    whole: str = "",
    linear: str = "",
    rewritten: str = "",
) -> dict[str, Family]:
    """Rows for operators whose rule is one line of notation.

    Args:
        targets: operator names, separated by spaces.
        names: names of their positional arguments.
        notation: the line; its tensors are those arguments, in order.
        sums: axes whose partial results add up.
        whole: axes that must not be cut.
        linear: groups of argument names in which they are linear.
        rewritten: axes that lowering can rewrite the operator for.
    """

    def rule(call: Call) -> AxisRule | None:
        return bind(call, notation, sums=sums, whole=whole, linear=linear, rewritten=rewritten)

    return family(targets, names, rule)
