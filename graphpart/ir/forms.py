"""Operators of one form do the same to values of other names, as those of repeated blocks do."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from graphpart.ir.graph import Graph, Operator, Ref


def forms(graph: Graph) -> Mapping[str, int]:
    """Per operator, the number of its form: what operators have but for the names of values and their place.

    Operators of one form have equal targets, literals, axis rules, and shapes, dtypes and gradients of operands and
    results, and use operands twice alike. Whatever follows from these alone is the same for all of them.

    Args:
        graph: whose operators are looked at.
    """
    numbers: dict[Hashable, int] = {}
    found = {}
    for op in graph.operators:
        form = _form(graph, op)
        try:
            found[op.name] = numbers.setdefault(form, len(numbers))
        except TypeError:  # it has a literal that cannot be compared so
            found[op.name] = numbers.setdefault(op.name, len(numbers))
    return found


def _form(graph: Graph, op: Operator) -> Hashable:
    at = {name: i for i, name in enumerate(dict.fromkeys(op.operands))}
    tensors = [*(graph.values[name] for name in at), *op.results]
    kinds = tuple([(value.shape, value.dtype, value.requires_grad) for value in tensors])
    return op.target, _literal(op.args, at), _literal(op.kwargs, at), op.rule, kinds, len(at), op.random


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
