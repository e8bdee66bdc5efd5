"""TorchDynamo in front of a forward that differentiates: where it is told to go on, and where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch._dynamo import config
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.variables.tensor import TensorVariable
from torch.fx import Graph, Node

from graphpart.trace.patches import replaced


@contextmanager
def followed_derivatives() -> Iterator[None]:
    """TorchDynamo follows ``torch.autograd.grad``, where it can, but does not go past what it would get wrong.

    ``backward()`` in a forward stays Python's: it adds to gradients. A tensor that the forward made and called
    ``requires_grad_()`` on may be part of a result that has gradients of others, too; TorchDynamo breaks the graph
    there, as the compiler behind it would lose the gradient of that tensor, for which nobody can ask here.
    """
    with ExitStack() as stack:
        if hasattr(config, "trace_autograd_ops"):
            for owner, name, replacement in (
                (TensorVariable, "method_backward", _without_following),
                (OutputGraph, "_check_requires_grad_intermediate_outputs", _if_lost),
            ):
                if name in vars(owner):
                    stack.enter_context(replaced(owner, name, replacement))
            stack.enter_context(config.patch(trace_autograd_ops=True))
        yield


def _without_following(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with config.patch(trace_autograd_ops=False):
        return original(*args, **kwargs)


def _if_lost(original: Callable[..., Any], output: Any, results: Sequence[Any], *args: Any) -> None:
    """Look at results whose gradients come from nowhere but such tensors."""
    reached = _reached_from_outside(output.graph)
    lost = [x for x in results if isinstance(x, TensorVariable) and x.as_proxy().node not in reached]
    original(output, lost, *args)


def _reached_from_outside(graph: Graph) -> set[Node]:
    """Values of a graph that have a gradient with respect to what comes into it."""
    reached: set[Node] = set()
    for node in graph.nodes:
        value = node.meta.get("example_value")
        is_graded = isinstance(value, Tensor) and value.requires_grad
        comes_in = is_graded and node.op == "placeholder"
        passes = is_graded or not isinstance(value, Tensor)
        if comes_in or (passes and not reached.isdisjoint(node.all_input_nodes)):
            reached.add(node)
    return reached
