"""Writes out what :mod:`graphpart.trace.derivatives.mark` has marked: the graph then has the backward as operators.

They are operators as any others, which autograd differentiates again where the loss depends on them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from graphpart.errors import UnsupportedOperatorError
from graphpart.trace.derivatives.mark import DERIVATIVE
from graphpart.trace.origin import source_line

_aten = torch.ops.aten
_NORMS: Any = get_decompositions(
    [
        getattr(_aten, name + kind)
        for name in ("native_layer_norm", "native_group_norm", "_fused_rms_norm")
        for kind in ("", "_backward")
    ]
)
"""Their backward gives None in the place of what nobody asked for, which no graph holds. It is written in other
operators together with the forward, whose mean and deviation have no derivative as results, but in its backward.
"""
_STOPS = (_aten.detach.default, _aten.detach_.default)
"""Through these no gradient passes."""


def write_out(graph: Graph) -> None:
    """Replace every :data:`DERIVATIVE` of a functional graph, the first one first, so that one may be of another.

    Raises:
        UnsupportedOperatorError: if an operator between cannot be differentiated so.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is DERIVATIVE:
            _ChainRule(graph, node).replace()


class _ChainRule:
    """One derivative.

    Args:
        graph: the graph.
        mark: its node.
    """

    outputs: Sequence[Node]
    inputs: Sequence[Node]
    seeds: Sequence[Node]

    def __init__(self, graph: Graph, mark: Node) -> None:
        self.graph, self.mark = graph, mark
        given: Any = mark.args
        self.outputs, self.inputs, self.seeds = given
        self.gradients: dict[Any, Node] = {}  # what has come so far for a value, or for one of several by its number
        before = list(graph.nodes)
        self.order = before[: before.index(mark)]

    def replace(self) -> None:
        """Put the gradients in the place of the mark."""
        reached = self._reached()
        with self.graph.inserting_before(self.mark):
            for output, seed in zip(self.outputs, self.seeds, strict=True):
                if output in reached:
                    self._add(output, seed)
            for node in reversed(self.order):
                if node in reached and node.op == "call_function" and node.target is not operator.getitem:
                    self._through(node, reached)
            for item in list(self.mark.users):
                index: Any = item.args[1]
                wanted = self.inputs[index]
                if wanted in self.gradients:
                    made = self._call(_aten.alias.default, self.gradients[wanted])
                else:
                    made = self._call(_aten.zeros_like.default, wanted)
                made.meta = {**self.mark.meta, "val": made.meta["val"]}
                item.replace_all_uses_with(made)
                name = item.name
                self.graph.erase_node(item)
                made._rename(name)  # outputs of the program are known by their names
        self.graph.erase_node(self.mark)

    def _reached(self) -> set[Node]:
        """Values through which a gradient flows from the outputs to the inputs, the inputs among them."""
        reached = set(self.inputs)
        for node in self.order:
            if node in reached or node.op != "call_function" or node.target in _STOPS:
                continue
            if _is_differentiable(node) and not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        return reached

    def _through(self, node: Node, reached: set[Node]) -> None:
        """Hand the gradient of an operator's results on to its operands."""
        single = isinstance(node.meta["val"], Tensor)
        for item in () if single else tuple(node.users):  # one of several results may have been taken twice
            if item in self.gradients:
                self._add((node, item.args[1]), self.gradients[item])
        results = [(0, node)] if single else [(i, (node, i)) for i in range(len(node.meta["val"]))]
        came = {i: self.gradients[x] for i, x in results if x in self.gradients}
        operands = [x for x in node.all_input_nodes if x in reached and _is_differentiable(x)]
        if node.target is DERIVATIVE or not came or not operands:
            return
        if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
            raise _refused(node, "cannot be differentiated inside of a forward: it draws numbers, or is no operator")
        rule = _rule(node, single, list(came), operands)
        self._insert(rule, node, operands, list(came.values()))

    def _insert(self, rule: GraphModule, node: Node, operands: Sequence[Node], came: Sequence[Node]) -> None:
        """Copy what one operator's derivative consists of; what the graph has computed already is taken from there."""
        others = [x for x in node.all_input_nodes if x not in operands]
        given = iter((*operands, *others, *came))
        copies: dict[Node, Any] = {}
        for inner in rule.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(given)
            elif inner.op == "output":
                for operand, gradient in zip(operands, inner.args[0], strict=True):
                    self._add(operand, copies[gradient])
            elif inner.op == "get_attr":
                raise _refused(node, "has a derivative with constants of its own")
            else:
                if None in pytree.tree_leaves(inner.meta["val"], is_leaf=lambda x: x is None):
                    raise _refused(node, f"cannot be differentiated inside of a forward, by {inner.target}")
                args, kwargs = torch.fx.map_arg((inner.args, inner.kwargs), copies.__getitem__)
                if inner.target is node.target and args == node.args and kwargs == node.kwargs:
                    copies[inner] = node
                else:
                    copies[inner] = self.graph.call_function(inner.target, args, kwargs)
                    copies[inner].meta = {**node.meta, "val": inner.meta["val"]}

    def _add(self, value: Any, gradient: Node) -> None:
        before = self.gradients.get(value)
        self.gradients[value] = gradient if before is None else self._call(_aten.add.Tensor, before, gradient)

    def _call(self, target: Any, *args: Node) -> Node:
        made = self.graph.call_function(target, args)
        fake = args[0].meta["val"]
        made.meta = {**self.mark.meta, "val": torch.empty_like(fake)}
        return made


def _rule(node: Node, single: bool, indices: Sequence[int], operands: Sequence[Node]) -> GraphModule:
    """The graph of one operator's derivative: takes operands, other values it reads, and gradients of some results."""
    others = [x for x in node.all_input_nodes if x not in operands]
    fakes = [x.meta["val"] for x in (*operands, *others)]
    values = node.meta["val"]
    seeds = [values if single else values[i] for i in indices]
    number = len(operands)

    def derivative(*given: Any) -> Any:
        rest = dict(zip(others, given[number : number + len(others)], strict=True))

        def run(*wanted: Any) -> Any:
            known = {**rest, **dict(zip(operands, wanted, strict=True))}
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            return (result,) if single else tuple(result[i] for i in indices)

        pulled: Any = torch.func.vjp(run, *given[:number])
        pull = pulled[1]
        return pull(tuple(given[number + len(others) :]))

    try:
        rule: GraphModule = make_fx(derivative, _NORMS, tracing_mode="fake")(*fakes, *seeds)
    except Exception as reason:
        said = str(reason).strip().splitlines() or [type(reason).__name__]
        raise _refused(node, f"cannot be differentiated inside of a forward: {said[0]}") from reason
    rule.graph.eliminate_dead_code()
    return rule


def _is_differentiable(node: Node) -> bool:
    """Whether a value, or one of several, may have a gradient."""
    found = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
    return any(x.is_floating_point() or x.is_complex() for x in found)


def _refused(node: Node, why: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(f"{source_line(node)}: {node.target} {why}")
