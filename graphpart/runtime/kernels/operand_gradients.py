"""The gradient of each operand of an operator by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OperandGradient:
    """How the gradient of one operand is made, in one call of an operator.

    Attributes:
        reads: positions of the operands whose values it needs.
        make: takes the gradient of the result, the operand's shape, and those values; what it makes shares no memory
            with them.
        add: takes a sum, and what ``make`` takes, and adds the gradient to the sum in place, with no memory of its own;
            None where no operator does that. (Megatron-LM's ``gradient_accumulation_fusion``.)
    """

    reads: tuple[int, ...]
    make: Callable[..., Tensor]
    add: Callable[..., object] | None = None


# --- products -----------------------------------------------------------------------------------------------------


def _rows(tensor: Tensor) -> Tensor:
    """``[..., n]`` as ``[rows, n]``."""
    return tensor.reshape(-1, tensor.shape[-1])


def _added(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of what was added, broadcast."""
    return gradient.sum_to_size(shape) if gradient.shape != shape else gradient.clone()


_NONE = OperandGradient((), _added)
"""Stands for an operand of integers, whose gradient nobody asks for."""


def _first_factor(gradient: Tensor, shape: Sequence[int], second: Tensor) -> Tensor:
    """Of ``first @ second``: matrices, stacks of matrices or vectors."""
    if second.dim() == 1:
        gradient, second = gradient.unsqueeze(-1), second.unsqueeze(-1)
    if len(shape) == 1:
        return (gradient.unsqueeze(-2) @ second.mT).sum_to_size(1, *shape).squeeze(0)
    return (gradient @ second.mT).sum_to_size(shape)


def _second_factor(gradient: Tensor, shape: Sequence[int], first: Tensor) -> Tensor:
    if first.dim() == 1:
        gradient, first = gradient.unsqueeze(0 if len(shape) == 1 else -2), first.unsqueeze(0)
    if len(shape) == 1:
        return _rows(first).mT @ gradient.reshape(-1)
    if len(shape) == 2:
        return _rows(first).mT @ _rows(gradient)
    return (first.mT @ gradient).sum_to_size(shape)


def _add_first_factor(total: Tensor, gradient: Tensor, shape: Sequence[int], second: Tensor) -> None:
    if total.dim() == gradient.dim() == second.dim() == 2:
        total.addmm_(gradient, second.mT)
    else:
        total.add_(_first_factor(gradient, shape, second))


def _add_second_factor(total: Tensor, gradient: Tensor, shape: Sequence[int], first: Tensor) -> None:
    if total.dim() == 2 and first.dim() > 1:
        total.addmm_(_rows(first).mT, _rows(gradient))
    else:
        total.add_(_second_factor(gradient, shape, first))


def _product(first: Tensor, second: Tensor) -> Sequence[OperandGradient] | None:
    if first.is_complex() or second.is_complex():
        return None
    return (
        OperandGradient((1,), _first_factor, _add_first_factor),
        OperandGradient((0,), _second_factor, _add_second_factor),
    )


def _product_plus(addend: Tensor, first: Tensor, second: Tensor) -> Sequence[OperandGradient] | None:
    if first.is_complex():
        return None
    return (
        OperandGradient((), _added),
        OperandGradient((2,), _first_factor, _add_first_factor),
        OperandGradient((1,), _second_factor, _add_second_factor),
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[OperandGradient] | None:
    if weight.dim() != 2 or x.is_complex():
        return None
    return (
        OperandGradient((1,), lambda gradient, shape, weight: gradient @ weight),
        OperandGradient(
            (0,),
            lambda gradient, shape, x: _rows(gradient).mT @ _rows(x),
            lambda total, gradient, shape, x: total.addmm_(_rows(gradient).mT, _rows(x)),
        ),
        OperandGradient((), _added),
    )


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Sequence[OperandGradient]:
    """A product per group of rows; ``ends`` says where each group ends. ``weight`` is ``[groups, inputs, outputs]``."""
    ops = torch.ops.transformers

    def of_rows(gradient: Tensor, shape: Sequence[int], weight: Tensor, ends: Tensor) -> Tensor:
        return ops.grouped_mm_fallback(gradient, weight.mT, ends)

    def add_of_weight(total: Tensor, gradient: Tensor, shape: Sequence[int], x: Tensor, ends: Tensor) -> Tensor:
        start = 0
        for group, end in enumerate(ends.tolist()):
            total[group].addmm_(x[start:end].T, gradient[start:end])
            start = end
        return total

    def of_weight(gradient: Tensor, shape: Sequence[int], x: Tensor, ends: Tensor) -> Tensor:
        return add_of_weight(gradient.new_zeros(shape), gradient, shape, x, ends)

    return OperandGradient((1, 2), of_rows), OperandGradient((0, 2), of_weight, add_of_weight), _NONE


# --- look-ups -----------------------------------------------------------------------------------------------------


def _embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *_: Any) -> Sequence[OperandGradient]:
    def of_weight(gradient: Tensor, shape: Sequence[int], indices: Tensor) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(gradient, indices, shape[0], padding_idx, False)

    def add_of_weight(total: Tensor, gradient: Tensor, shape: Sequence[int], indices: Tensor) -> None:
        if total.is_cuda:  # there, adding by index gives other bits every time
            total.add_(of_weight(gradient, shape, indices))
            return
        is_read = (indices != padding_idx).reshape(-1)
        total.index_add_(0, indices.reshape(-1)[is_read], _rows(gradient)[is_read])

    return OperandGradient((1,), of_weight, add_of_weight), _NONE


# --- convolutions -------------------------------------------------------------------------------------------------


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Sequence[OperandGradient] | None:
    count = weight.dim() - 2
    dilation = _per_dim(dilation, count)
    if isinstance(padding, str):
        spans = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
        padding = [span / 2 if padding == "same" else 0 for span in spans]
        if any(n % 1 for n in padding):  # more behind than in front
            return None
        padding = list(map(int, padding))
    if x.dim() != weight.dim():  # no samples
        return None
    options = (
        *(_per_dim(stride, count), _per_dim(padding, count), dilation),
        *(transposed, _per_dim(output_padding, count), groups),
    )
    backward = torch.ops.aten.convolution_backward

    def of_input(gradient: Tensor, shape: Sequence[int], weight: Tensor) -> Tensor:
        return backward(gradient, _shaped(shape, gradient), weight, None, *options, [True, False, False])[0]

    def of_weight(gradient: Tensor, shape: Sequence[int], x: Tensor) -> Tensor:
        return backward(gradient, x, _shaped(shape, gradient), None, *options, [False, True, False])[1]

    def of_bias(gradient: Tensor, shape: Sequence[int]) -> Tensor:
        return gradient.sum([0, *range(2, gradient.dim())])

    return OperandGradient((1,), of_input), OperandGradient((0,), of_weight), OperandGradient((), of_bias)


def _forward_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Sequence[OperandGradient] | None:
    return _convolution(x, weight, bias, stride, padding, dilation, False, 0, groups)


def _transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Sequence[OperandGradient] | None:
    return _convolution(x, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _per_dim(value: int | Sequence[int], count: int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * count if len(found) == 1 else found


def _shaped(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of which only the shape and dtype are looked at: no page of it is ever touched.

    One that is expanded from a single element would be copied.
    """
    return like.new_empty(shape)


OPERAND_GRADIENTS: Mapping[str, Callable[..., Sequence[OperandGradient] | None]] = {
    "aten.linear.default": _linear,
    **dict.fromkeys(["aten.mm.default", "aten.bmm.default", "aten.matmul.default"], _product),
    "aten.addmm.default": _product_plus,
    "transformers.grouped_mm_fallback.default": _grouped,
    "aten.embedding.default": _embedding,
    **{f"aten.conv{n}d.{overload}": _forward_convolution for n in (1, 2, 3) for overload in ("default", "padding")},
    "aten.conv_transpose1d.default": _transposed_convolution,
    "aten.conv_transpose2d.input": _transposed_convolution,
    "aten.conv_transpose3d.input": _transposed_convolution,
    "aten.convolution.default": _convolution,
}
"""Per target of ``rules.weights``: takes the arguments of a call, operands first, and gives each operand's gradient;
None where this call's have no formula here.
"""
