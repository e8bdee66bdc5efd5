"""Operators of one form do the same to values of other names, as those of repeated blocks do."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from graphpart.ir.graph import Graph, Operator, Ref, Value


def forms(graph: Graph) -> Mapping[str, int]:
    """Per operator, the number of its form, see :func:`form_of`.

    Args:
        graph: whose operators are looked at.
    """
    numbers: dict[Hashable, int] = {}
    return {op.name: numbers.setdefault(form_of(op, graph.values), len(numbers)) for op in graph.operators}


def form_of(op: Operator, values: Mapping[str, Value]) -> Hashable:
    """All that an operator has but for the names of values and its place in the model.

    Operators of one form have equal targets, literals, axis rules, and shapes, dtypes and gradients of operands and
    results, and use operands twice alike. Whatever follows from these alone is the same for all of them. One with a
    literal that cannot be compared is alone of its form.

    Args:
        op: the operator.
        values: those that it reads, by name.
    """
    at = {name: i for i, name in enumerate(dict.fromkeys(op.operands))}
    tensors = [*(values[name] for name in at), *op.results]
    kinds = tuple([(value.shape, value.dtype, value.requires_grad) for value in tensors])
    form = (op.target, _literal(op.args, at), _literal(op.kwargs, at), op.rule, kinds, len(at), op.random)
    try:
        hash(form)
    except TypeError:
        return op.name
    return form


def _literal(argument: Any, at: Mapping[str, int]) -> Hashable:
    """An argument as what can be compared: references by position, and no two types alike (1 is no ``True``)."""
    if isinstance(argument, Ref):
        return Ref, at[argument.name]
    if isinstance(argument, (tuple, list)):
        return type(argument), tuple([_literal(item, at) for item in argument])
    if isinstance(argument, Mapping):
        return dict, tuple([(key, _literal(item, at)) for key, item in argument.items()])
    if isinstance(argument, slice):
        return slice, tuple([_literal(item, at) for item in (argument.start, argument.stop, argument.step)])
    if isinstance(argument, (float, complex)):  # by its text, since 0.0 equals -0.0, and nan not even itself
        return type(argument), repr(argument)
    return type(argument), argument
