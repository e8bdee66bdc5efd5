"""Operands whose gradient can be made apart from the others', later: the weights of products, convolutions, look-ups.

The gradient of a product's weight needs the other factor and the result's gradient and nothing else, so it can wait
while the gradients of activations travel on (zero-bubble schedules: Qi et al., ICLR 2024, section 2). What is cheap,
such as the scale of a norm, or has one kernel for all its gradients, such as recurrent layers, is not in the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from graphpart.ir.graph import Ref, refs
from graphpart.ir.program import Step

WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "aten.linear.default": (1, 2),
    "aten.mm.default": (0, 1),
    "aten.bmm.default": (0, 1),
    "aten.matmul.default": (0, 1),
    "aten.addmm.default": (0, 1, 2),
    "aten.conv1d.default": (1, 2),
    "aten.conv2d.default": (1, 2),
    "aten.conv3d.default": (1, 2),
    "aten.conv1d.padding": (1, 2),
    "aten.conv2d.padding": (1, 2),
    "aten.conv3d.padding": (1, 2),
    "aten.conv_transpose1d.default": (1, 2),
    "aten.conv_transpose2d.input": (1, 2),
    "aten.conv_transpose3d.input": (1, 2),
    "aten.convolution.default": (1, 2),
    "aten.embedding.default": (0,),
    "graphpart.embedding_part": (0,),
    "transformers.grouped_mm_fallback.default": (1,),
}
"""Per target, the positions of operands that can be weights (of a product either factor can; biases are weights)."""

PADDED = "graphpart.padded"
NUM_PADDED = 3
"""``graphpart.padded`` calls the operator that is its first argument with all but its first three arguments."""

CARRIERS = frozenset(
    [
        *("aten._to_copy.default", "aten.to.dtype", "aten.clone.default", "aten.alias.default"),
        *("aten.contiguous.default", "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"),
        *("aten.t.default", "aten.transpose.int", "aten.permute.default", "aten.expand.default"),
        *("aten.unsqueeze.default", "aten.squeeze.dim", "aten.select.int", "aten.slice.Tensor", "aten.split.Tensor"),
        *("aten.split_with_sizes.default", "aten.unbind.int", "aten.cat.default"),
        *("graphpart.cast", "graphpart.concat", "graphpart.split"),
    ]
)
"""Operators that pass a weight on, cast or in part, and whose own backward needs no values: it can run in two goes."""


def carried(steps: Sequence[Step], weights: Collection[str]) -> dict[str, frozenset[str]]:
    """Locals that hold weights or parts of them, each with the weights that it is made from.

    Args:
        steps: of one segment.
        weights: the weights among its inputs.
    """
    found = {name: frozenset([name]) for name in weights}
    for step in filter(_carries, steps):
        first = step.args[0] if step.args else None
        if isinstance(first, Ref) and first.name not in found:
            continue
        names = [ref.name for ref in refs(step.args)]  # carriers take no tensor by keyword
        if names and found.keys() >= set(names):
            sources = frozenset[str]().union(*(found[name] for name in names))
            found.update((name, sources) for name in step.results if name)
    return found


def deferrable(steps: Sequence[Step], carried: Mapping[str, frozenset[str]]) -> dict[int, tuple[int, ...]]:
    """Steps that read a weight where its gradient can be made apart, with the positions of those arguments.

    A weight that is multiplied by a parameter (learned queries, say) is left out: an update of that parameter would
    have to wait for the weight's gradient, which nothing else tells.

    Args:
        steps: of one segment.
        carried: its locals that hold weights.
    """
    found = {}
    for i, step in enumerate(steps):
        if possible := _positions(step):
            given = [p for p, ref in enumerate(step.args) if isinstance(ref, Ref) and ref.name in carried]
            if given and set(given) <= set(possible):
                found[i] = tuple(given)
    return found


def deferred_weights(steps: Sequence[Step], weights: Collection[str]) -> frozenset[str]:
    """Those of a segment's weights whose gradient can be made apart, at least a part of it."""
    if not weights:
        return frozenset()
    locals_ = carried(steps, weights)
    read = (steps[i].args[p].name for i, positions in deferrable(steps, locals_).items() for p in positions)
    return frozenset[str]().union(*(locals_[name] for name in read))


def _carries(step: Step) -> bool:
    # A concatenation in an order of its own may look indices up, which its backward keeps.
    return step.target in CARRIERS and not (step.target == "graphpart.concat" and step.args[2] is not None)


def _positions(step: Step) -> tuple[int, ...]:
    """Positions of arguments that can be weights, in this call."""
    if step.kwargs:  # scaled products
        return ()
    target, shift = (step.args[0], NUM_PADDED) if step.target == PADDED else (step.target, 0)
    if target == "aten.embedding.default" and any(step.args[3:]):  # scaled by frequency over the batch, or sparse
        return ()
    return tuple(p + shift for p in WEIGHTS.get(target, ()) if p + shift < len(step.args))
