"""Rules and costs for operators of other libraries, registered by their users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graphpart.errors import GraphError
from graphpart.rules.notation import parse
from graphpart.rules.table import Family, line

Flops = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], float]
"""Takes the shapes of all tensor operands and of all results; gives floating-point operations."""


@dataclass(frozen=True, slots=True)
class FlopsRule:
    """What a registered operator costs; None where it wasn't told."""

    forward: Flops | None
    backward: Flops | None


RULES: dict[str, Family] = {}
COSTS: dict[str, FlopsRule] = {}


def register_rule(
    operator: Any,
    notation: str,
    *,
    sums: str = "",
    whole: str = "",
    flops: Flops | None = None,
    backward_flops: Flops | None = None,
) -> None:
    """Tell graphpart how a custom operator may be cut, and what it costs.

    ``register_rule("mylib::gated_linear", "... k, n k, n k -> ... n", sums="k", flops=...)`` says that the operator
    can be cut along every axis but ``k`` into parts of the result, and along ``k`` into partial results that add up.

    Args:
        operator: its name, ``"mylib::name"``, or the operator itself (``torch.ops.mylib.name`` or what
            ``torch.library.custom_op`` returned).
        notation: the dimensions of its arguments, in the order of its schema, then of its results: tensors separated by
            commas, dimensions by spaces, ``...`` for any number of them, ``1`` for a dimension of extent 1,
            ``(a b)`` for a product of axes, ``_`` for an argument that is no tensor.
        sums: axes that are in no result and whose partial results add up, separated by spaces.
        whole: axes that must not be cut (one that is normalised or sorted over).
        flops: FLOPs of the forward from operand shapes and result shapes; by default one per element.
        backward_flops: FLOPs of its gradients; by default twice the forward's.

    Raises:
        GraphError: if the notation cannot be read, or names an axis in ``sums`` or ``whole`` that it doesn't have.
    """
    name = operator if isinstance(operator, str) else _name(operator)
    if "::" not in name:
        raise GraphError(f"{name!r} is no operator's name; write it with its library, as in 'mylib::{name}'")
    parsed = parse(notation)
    tensors = [dims for dims in (*parsed.operands, *parsed.results) if dims is not None]
    axes = {axis for dims in tensors for dim in dims for axis in dim}
    for axis in (*sums.split(), *whole.split()):
        if axis not in axes:
            raise GraphError(
                f"{name}: the notation {notation!r} has no axis {axis!r}; it has {', '.join(sorted(axes))}"
            )
    names = " ".join(f"argument{i}" for i in range(len(parsed.operands)))
    key = name.replace("::", ".")
    RULES.update(line(key, names, notation, sums=sums, whole=whole))
    COSTS[key] = FlopsRule(flops, backward_flops)


def _name(operator: Any) -> str:
    for attribute in ("_qualname", "_qualified_op_name"):
        found = getattr(operator, attribute, None)
        if isinstance(found, str):
            return found
    schema = getattr(operator, "_schema", None)
    if schema is not None:
        return str(schema.name)
    raise GraphError(f"{operator!r} is no operator; give its name as 'library::name'")


def registered_flops(
    target: str, operand_shapes: Sequence[Sequence[int]], result_shapes: Sequence[Sequence[int]], trains: bool
) -> tuple[float, float] | None:
    """FLOPs of a registered operator, forward and backward; None where none were registered."""
    cost = COSTS.get(".".join(target.split(".")[:2]))
    if cost is None or cost.forward is None:
        return None
    forward = float(cost.forward(operand_shapes, result_shapes))
    if not trains:
        return forward, 0.0
    return forward, float(cost.backward(operand_shapes, result_shapes)) if cost.backward else 2 * forward
