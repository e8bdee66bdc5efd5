"""Floating-point operations of an operator, from shapes alone.

Own formulas, because torch's counter reads 0 for attention on CPU and for custom operators. A product of
``m x k`` with ``k x n`` counts ``2 m k n`` (multiply and add).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TypeVar

from graphpart.ir.axes import AxisRule
from graphpart.rules.register import registered_flops

Shape = Sequence[int]
Shapes = Sequence[Shape]
T = TypeVar("T")


def flops(
    target: str,
    rule: AxisRule | None,
    operand_shapes: Shapes,
    result_shapes: Shapes,
    wants_grad: Sequence[bool] = (),
) -> tuple[float, float]:
    """Work of one forward and one backward pass.

    Args:
        target: such as ``aten.linear.default``.
        rule: its axis rule, if it has one.
        operand_shapes: shape of every tensor operand, in order.
        result_shapes: shape of every result.
        wants_grad: per operand, whether its gradient is wanted; none is where it is left out.

    Returns:
        Forward and backward FLOPs. Backward is one product of the forward's size per operand of a product
        that wants a gradient; attention's is 2.5 times its forward (five products for two, since the scores
        are computed again: FlashAttention-2, Dao 2023, section 4.1).
    """
    registered = registered_flops(target, operand_shapes, result_shapes, any(wants_grad))
    if registered is not None:
        return registered
    wants = [*wants_grad, *[False] * (len(operand_shapes) - len(wants_grad))]
    name = target.split(".")[1] if target.count(".") else target
    elements = float(sum(prod(s) for s in result_shapes))
    if name in PRODUCTS:
        forward = PRODUCTS[name](rule, operand_shapes, result_shapes)
        factors = _factors(name, operand_shapes)
        addends = sum(w for i, w in enumerate(wants) if i not in factors)
        return forward, forward * sum(wants[i] for i in factors) + elements * addends
    if name == "scaled_dot_product_attention":
        forward = _attention(operand_shapes, result_shapes)
        return forward, 2.5 * forward if any(wants[:3]) else 0.0
    if name in FREE:
        return 0.0, 0.0
    largest = float(max((prod(s) for s in [*operand_shapes, *result_shapes]), default=0))
    if name in PER_ELEMENT:
        once, back = PER_ELEMENT[name]
        return once * largest, back * largest * any(wants)
    if rule is None or rule.sums:
        return largest, largest * any(wants)
    return elements, elements * sum(wants)


def _extents(rule: AxisRule | None, operands: Shapes, results: Shapes) -> float:
    """Every point of the iteration space is one multiplication and one addition."""
    if rule is None:
        return 2.0 * prod(results[0]) * (operands[0][-1] if operands[0] else 1)
    return 2.0 * prod(rule.extents.values())


def _with_addend(rule: AxisRule | None, operands: Shapes, results: Shapes) -> float:
    """The first factor comes second."""
    return 2.0 * prod(results[0]) * operands[1][-1]


def _convolution(rule: AxisRule | None, operands: Shapes, results: Shapes) -> float:
    """Each result element meets ``channels / groups`` times the kernel; the weight's shape holds both."""
    return 2.0 * prod(results[0]) * prod(operands[1][1:])


def _transposed(rule: AxisRule | None, operands: Shapes, results: Shapes) -> float:
    """Each operand element is spread over the kernel."""
    return 2.0 * prod(operands[0]) * prod(operands[1][1:])


def _either(rule: AxisRule | None, operands: Shapes, results: Shapes) -> float:
    """``aten.convolution`` is one or the other; a transposed one's weight leads with the operand's channels."""
    transposed = rule is not None and rule.operands[1][0] in rule.operands[0]
    return (_transposed if transposed else _convolution)(rule, operands, results)


def _grouped(rule: AxisRule | None, operands: Shapes, results: Shapes) -> float:
    """Each row meets one expert's weight."""
    return 2.0 * prod(results[0]) * operands[0][-1]


def _recurrent(rule: AxisRule | None, operands: Shapes, results: Shapes) -> float:
    """Every step multiplies with every weight matrix."""
    steps = prod(operands[0][:-1])
    return 2.0 * steps * sum(prod(s) for s in operands[1:] if len(s) == 2)


def _attention(operands: Shapes, results: Shapes) -> float:
    """``2 b h s t (d + e)``: scores and weighted values. A causal mask is not discounted."""
    query, key, value = operands[:3]
    return 2.0 * prod(results[0][:-1]) * key[-2] * (query[-1] + value[-1])


def _factors(name: str, operands: Shapes) -> list[int]:
    """Positions of the operands that are factors of the product, not addends."""
    if name in ("addmm", "addmv", "baddbmm"):
        return [1, 2]
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return [0, next((i for i, s in enumerate(operands) if i and len(s) == 2), 0)]
    return list(range(len(operands))) if name == "einsum" else [0, 1]


def _each(names: str, value: T) -> dict[str, T]:
    return dict.fromkeys(names.split(), value)


PRODUCTS: Mapping[str, Callable[[AxisRule | None, Shapes, Shapes], float]] = {
    **_each("linear matmul mm bmm mv dot vdot einsum cdist", _extents),
    **_each("addmm addmv baddbmm", _with_addend),
    **_each("conv1d conv2d conv3d", _convolution),
    **_each("conv_transpose1d conv_transpose2d conv_transpose3d", _transposed),
    "convolution": _either,
    **_each("_grouped_mm grouped_mm_fallback", _grouped),
    **_each("lstm gru rnn_tanh rnn_relu", _recurrent),
}

PER_ELEMENT: Mapping[str, tuple[float, float]] = {
    # Passes over the larger of operand and result, forward and backward.
    **_each("layer_norm native_layer_norm group_norm native_group_norm instance_norm", (5.0, 10.0)),
    **_each("rms_norm _fused_rms_norm", (4.0, 8.0)),
    **_each("batch_norm batch_norm_local _native_batch_norm_legit_functional native_batch_norm", (5.0, 10.0)),
    "_native_batch_norm_legit_no_training": (2.0, 4.0),
    **_each("softmax _softmax log_softmax _log_softmax logsumexp logsumexp_part", (5.0, 4.0)),
    "cross_entropy_loss": (6.0, 3.0),
    **_each("nll_loss nll_loss_nd nll_loss_forward nll_loss2d", (1.0, 1.0)),
    **_each("var std var_mean std_mean centered_squares", (3.0, 3.0)),
    "batch_norm_sums": (3.0, 0.0),
    "batch_norm_apply": (3.0, 6.0),
    "count_labels": (1.0, 0.0),
    **_each("mean amax amin prod any all argmax argmin max min norm linalg_vector_norm", (1.0, 1.0)),
}
"""FLOPs an element, forward and backward: the arithmetic of the definitions, counted by hand."""

FREE = frozenset(
    _each(
        "view reshape _unsafe_view view_as reshape_as flatten unflatten expand expand_as permute transpose t mT "
        "numpy_T movedim unsqueeze squeeze select unbind slice narrow split split_with_sizes chunk diagonal unfold "
        "alias detach clone contiguous _to_copy to copy lift_fresh_copy cat stack flip roll pad constant_pad_nd repeat "
        "repeat_interleave embedding index index_select gather scatter index_put slice_scatter select_scatter "
        "masked_select one_hot tril triu zeros ones full empty arange eye scalar_tensor zeros_like ones_like full_like "
        "empty_like new_zeros new_ones new_full new_empty fill meshgrid pixel_shuffle pixel_unshuffle im2col "
        "pick_class",
        None,
    )
)
"""Operators that move or make elements without arithmetic: their cost is memory traffic, or nothing."""
