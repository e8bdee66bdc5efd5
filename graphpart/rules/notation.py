"""One-line axis notation: ``"... k, n k, n -> ... n"``.

Tensors are separated by commas, dimensions by spaces. ``...`` is any number of dimensions, aligned at the
right as in broadcasting; ``1`` is a dimension of extent 1; ``(g r)`` is a dimension that is the product of
axes, outermost first; ``_`` stands for an argument that is not a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from graphpart.errors import GraphError
from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call, Dims, make_rule

ELLIPSIS = "..."


@dataclass(frozen=True, slots=True)
class Notation:
    """A parsed line.

    Attributes:
        operands: per argument, its dimensions; None for one that is not a tensor.
        results: per result, its dimensions. ``("...",)`` in either stands for any number of dimensions.
    """

    operands: tuple[Dims | None, ...]
    results: tuple[Dims, ...]


@cache
def parse(line: str) -> Notation:
    """Read one line.

    Raises:
        GraphError: if it has no arrow, unbalanced parentheses, or two ``...`` in one tensor.
    """
    left, arrow, right = line.partition("->")
    if not arrow:
        raise GraphError(f"axis notation {line!r} has no '->'")
    operands = tuple(None if t.strip() == "_" else _tensor(t, line) for t in left.split(","))
    return Notation(operands, tuple(_tensor(t, line) for t in right.split(",")))


def _tensor(text: str, line: str) -> Dims:
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(" and group is None:
            group = []
        elif token == ")" and group is not None:
            dims.append(tuple(group))
            group = None
        elif token in "()":
            raise GraphError(f"axis notation {line!r} has unbalanced parentheses")
        elif group is not None:
            group.append(token)
        else:
            dims.append(() if token == "1" else (token,))
    if group is not None:
        raise GraphError(f"axis notation {line!r} has unbalanced parentheses")
    if dims.count((ELLIPSIS,)) > 1:
        raise GraphError(f"axis notation {line!r} has two '...' in one tensor")
    return tuple(dims)


def bind(
    call: Call,
    line: str,
    *,
    sums: str = "",
    whole: str = "",
    linear: str = "",
    extents: dict[str, int] | None = None,
    rewritten: str = "",
) -> AxisRule:
    """Bind a line to a call: its operands are the call's arguments, in the order of ``call.names``.

    Args:
        call: the call.
        line: the notation.
        sums: axes that add up, separated by spaces; ``...`` means all that it stands for.
        whole: axes that must not be cut, likewise.
        linear: groups of argument names in which the operator is linear, see ``make_rule``.
        extents: extents that the shapes alone do not tell.
        rewritten: axes that lowering can rewrite the operator for.

    Raises:
        GraphError: if ranks or extents do not fit; the message names the operator and the axis.
    """
    notation = parse(line)
    lengths = {}
    for name, dims in zip(call.names, notation.operands, strict=False):
        if dims is not None and (ELLIPSIS,) in dims and call.has(name):
            lengths[name] = max(0, call.rank(name) - len(dims) + 1)
    longest = max(lengths.values(), default=0)
    batch = tuple(f"b{i}" for i in range(longest))

    def expand(dims: Dims, length: int) -> Dims:
        if (ELLIPSIS,) not in dims:
            return dims
        at = dims.index((ELLIPSIS,))
        return (*dims[:at], *((b,) for b in batch[longest - length :]), *dims[at + 1 :])

    def listed(axes: str) -> list[str]:
        return [name for axis in axes.split() for name in (batch if axis == ELLIPSIS else (axis,))]

    operands = {
        name: (expand(dims, lengths.get(name, 0)),)
        for name, dims in zip(call.names, notation.operands, strict=False)
        if dims is not None and call.has(name)
    }
    results = [expand(dims, longest) for dims in notation.results]
    return make_rule(
        call,
        operands,
        results,
        sums=listed(sums),
        whole=listed(whole),
        linear=linear,
        extents=extents,
        rewritten=listed(rewritten),
    )
