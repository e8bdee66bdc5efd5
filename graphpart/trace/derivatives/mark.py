"""``torch.autograd.grad`` in a forward: export cannot follow what runs there, so one operator stands for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from graphpart.errors import UnsupportedOperatorError
from graphpart.trace.origin import user_line
from graphpart.trace.patches import replaced

_LIBRARY = torch.library.Library("graphpart", "FRAGMENT")
_LIBRARY.define("derivative(Tensor[] outputs, Tensor[] inputs, Tensor[] seeds) -> Tensor[]")


@torch.library.impl(_LIBRARY, "derivative", "CompositeExplicitAutograd")
def _like_inputs(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor]) -> list[Tensor]:
    """Of the inputs' shapes; no values, as it never runs but on fake tensors."""
    return [torch.empty_like(x) for x in inputs]


DERIVATIVE = torch.ops.graphpart.derivative.default
"""Takes outputs, what they are differentiated by, and a weight for each output; gives a tensor for each input."""


@contextmanager
def marked_derivatives() -> Iterator[None]:
    """While tracing, ``torch.autograd.grad`` becomes :data:`DERIVATIVE`.

    What it calls is replaced, and not ``grad`` itself, on which code that imported it holds.

    Raises:
        UnsupportedOperatorError: from inside the traced forward, where it does more than that.
    """

    def marked(
        original: Callable[..., Any],
        outputs: Sequence[Any],
        seeds: Sequence[Any],
        retain_graph: bool,
        create_graph: bool,
        inputs: Sequence[Any],
        allow_unreachable: bool = False,
        accumulate_grad: bool = False,
    ) -> Any:
        given = (*outputs, *inputs, *seeds)
        if any(isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given):
            return original(outputs, seeds, retain_graph, create_graph, inputs, allow_unreachable, accumulate_grad)
        if accumulate_grad:
            raise _refused("backward() in a forward adds to gradients behind the graph's back; use torch.autograd.grad")
        if not all(isinstance(x, Tensor) and x.layout == torch.strided for x in given) or any(map(_is_batched, given)):
            raise _refused("torch.autograd.grad of edges, with is_grads_batched or of sparse tensors is no graph")
        if create_graph and not torch.is_grad_enabled():
            raise _refused("create_graph=True under torch.no_grad() is more than a graph can hold")
        reached = _reached(outputs, inputs)
        if not all(reached) and not allow_unreachable:
            raise RuntimeError(
                "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True "
                "if this is the desired behavior."
            )
        used = [x for x, is_reached in zip(inputs, reached, strict=True) if is_reached]
        found = iter(DERIVATIVE(list(outputs), used, list(seeds)) if used else ())
        results = [next(found) if is_reached else None for is_reached in reached]
        return tuple(x if x is None or create_graph else x.detach() for x in results)

    with replaced(torch.autograd, "_engine_run_backward", marked):
        yield


def _refused(why: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(f"{user_line()}: {why}")


def _is_batched(tensor: Tensor) -> bool:
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def _reached(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[bool]:
    """Which inputs autograd comes to from the outputs."""
    wanted = [_edge(x) for x in inputs]
    seen: set[tuple[Node, int]] = set()
    todo = [_edge(x) for x in outputs if x.requires_grad]
    while todo:
        node, index = todo.pop()
        if (node, index) in seen:
            continue
        visited = any(known is node for known, _ in seen)
        seen.add((node, index))
        if not visited:
            todo += [(n, i) for n, i in node.next_functions if n is not None]
    return [edge in seen for edge in wanted]


def _edge(tensor: Tensor) -> tuple[Node, int]:
    """Where a tensor comes from, or its own accumulator of gradients."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr
