"""A graph in parts, so that what cannot be lowered is kept apart from what can."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

_OPENS = ("_enter_autocast", "_enter_inference_mode", "_saved_tensors_hooks_disable", "_increment_nesting")
_CLOSES = ("_exit_autocast", "_exit_inference_mode", "_saved_tensors_hooks_enable", "_decrement_nesting")


def islands_in(graph: GraphModule, stopped_at: str) -> frozenset[str]:
    """Operators that have to run as they are, by name: a graph of their own, or sizes that depend on data.

    Args:
        graph: what could not be traced whole.
        stopped_at: the operator at which that failed, if it is known.
    """
    if any(node.op == "call_function" and node.target is torch.autograd.grad for node in graph.graph.nodes):
        return frozenset(node.name for node in graph.graph.nodes)  # it goes back through all that came before it
    found = {node.name for node in graph.graph.nodes if _is_island(node)} | _behind_autograd(graph)
    return frozenset(found | ({stopped_at} if stopped_at else set()))


def _is_island(node: Node) -> bool:
    if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
        return "checkpoint" not in node.target.name()
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if getattr(node.target, "__name__", "") == "_autograd_grad":  # of torch.func; within one of its levels
        return True
    read = [argument.meta.get("example_value") for argument in node.all_input_nodes]
    return any(_depends_on_data(value) for value in pytree.tree_leaves((node.meta.get("example_value"), read)))


def _behind_autograd(graph: GraphModule) -> set[str]:
    """``x.data``, the same memory behind autograd's back, and what views that or writes into it."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        own = _memory_of(node)
        is_other_face = any(not own.isdisjoint(_memory_of(n)) for n in node.all_input_nodes if n in found)
        if getattr(node.target, "__name__", "") == "_get_data_attr" or is_other_face:
            found.add(node)
    return {node.name for node in found}


def _depends_on_data(value: object) -> bool:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    return isinstance(value, Tensor) and any(isinstance(extent, torch.SymInt) for extent in value.shape)


def split(graph: GraphModule, islands: Collection[str]) -> tuple[GraphModule, dict[str, bool]]:
    """The graph as a sequence of parts, in its own order.

    A region of autocast, of a level of ``torch.func``, or of another grad mode than the graph's own, is not cut: one
    with an island in it is an island.

    Args:
        graph: the graph.
        islands: operators that have to run as they are, by name.

    Returns:
        A graph that calls the parts, and per part whether it is an island.
    """
    part_of: dict[str, int] = {}
    is_island: list[bool] = []
    for nodes in _indivisible(graph.graph.nodes):
        island = any(node.name in islands for node in nodes)
        if not is_island or is_island[-1] != island:
            is_island.append(island)
        part_of.update((node.name, len(is_island) - 1) for node in nodes)
    return _parted(graph, part_of, is_island)


def halved(graph: GraphModule) -> tuple[GraphModule, dict[str, bool]] | None:
    """The graph as two parts, as :func:`split` gives them, to find out which cannot be lowered; None if it is small."""
    groups = _indivisible(graph.graph.nodes)
    if len(groups) < SMALL:
        return None
    return _parted(graph, {n.name: int(2 * i >= len(groups)) for i, g in enumerate(groups) for n in g}, [False, False])


SMALL = 4
"""Operators of a graph that is not worth the search for what is wrong with it."""


def _parted(
    graph: GraphModule, part_of: Mapping[str, int], is_island: Sequence[bool]
) -> tuple[GraphModule, dict[str, bool]]:
    parent = split_module(graph, graph, lambda node: part_of[node.name], keep_original_order=True)
    kinds = {f"submod_{i}": island for i, island in enumerate(is_island)}
    return parent, {name: kinds[name] for name, _ in parent.named_children() if name in kinds}


def _indivisible(nodes: Iterable[Node]) -> list[list[Node]]:
    """The operators of a graph in order, those of one region together, and all between a tensor and its writes."""
    nodes = [node for node in nodes if node.op not in ("placeholder", "output", "get_attr")]
    glued = _glued(nodes)
    found: list[list[Node]] = []
    depth, is_other = 0, False
    own_mode: bool | None = None  # the grad mode that the graph begins in, once it is seen to change
    for i, node in enumerate(nodes):
        if depth == 0 and not is_other and i not in glued:
            found.append([])
        found[-1].append(node)
        name = getattr(node.target, "__name__", str(node.target))
        depth += name.endswith(_OPENS) - name.endswith(_CLOSES)
        if name.endswith("_set_grad_enabled"):
            own_mode = not node.args[0] if own_mode is None else own_mode
            is_other = node.args[0] is not own_mode
    return found


def _glued(nodes: Sequence[Node]) -> set[int]:
    """Which operators no part may begin with: a part gives what it makes away, so that a later write is not seen there.

    All from where memory is first made or viewed to where it is last written are one.
    """
    made: dict[int, int] = {}
    found: set[int] = set()
    for i, node in enumerate(nodes):
        for memory in _memory_of(node):
            made.setdefault(memory, i)
        for memory in _written(node):
            found.update(range(made.setdefault(memory, i) + 1, i + 1))
    return found


def _memory_of(node: Node) -> set[int]:
    """What tells the memory of a node's tensors from other memory."""
    values = pytree.tree_leaves(node.meta.get("example_value"))
    tensors = [_unwrapped(x) for x in values if isinstance(x, Tensor)]
    return {x.untyped_storage()._cdata for x in tensors if x.layout == torch.strided}


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor below the levels of ``torch.func`` that it was made in."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _written(node: Node) -> set[int]:
    """The memory that an operator writes, or may write."""
    name = str(getattr(node.target, "__name__", node.target))
    module = str(getattr(node.target, "__module__", ""))
    in_place = name.endswith("_") and not name.endswith("__")
    in_place |= "setitem" in name or (module == "_operator" and name.startswith("i") and name not in _NOT_IN_PLACE)
    first, out = next(iter(node.args), None), node.kwargs.get("out")
    changed = [x for x in (first, out) if isinstance(x, Node) and (in_place or x is out)]
    written = set().union(*map(_memory_of, changed))
    if module.startswith("torch.nn.functional"):  # with inplace=True, in one way or another
        written |= _memory_of(node) & set().union(*map(_memory_of, node.all_input_nodes))
    return written


_NOT_IN_PLACE = frozenset({"index", "indexOf", "inv", "invert", "is_", "is_not", "itemgetter"})
