"""What a trace takes for granted of the memory of its arguments, checked at every call before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphpart.errors import ArgumentError, UnsupportedOperatorError
from graphpart.trace import Traced
from graphpart.trace.views import reach


class MemoryCheck:
    """Checks the arguments of calls that share one trace.

    A graph has no memory: a change in place reaches the argument that it was made to and no other, and strides are
    those of the traced argument.

    Args:
        traced: the trace.
        tensors: the model's parameters and buffers, by value name.
    """

    def __init__(self, traced: Traced, tensors: Mapping[str, Tensor]) -> None:
        self._names = {i: traced.graph.source[name].names[0] for name, i in traced.input_index.items()}
        self._layouts = {traced.input_index[name]: layout for name, layout in traced.layouts.items()}
        changed = [source for source, _ in traced.graph.mutations]
        self._changed_inputs = [traced.input_index[name] for name in changed if name in traced.input_index]
        self._changed_buffers = [name for name in changed if name in tensors]
        self._tensors = tensors  # which may be replaced

    def check(self, leaves: Sequence[Any]) -> None:
        """Check the arguments of one call.

        Args:
            leaves: flattened arguments.

        Raises:
            UnsupportedOperatorError: if the model changes a tensor in place that shares its memory with another.
            ArgumentError: if an argument that the model addresses by strides lies otherwise than the traced one.
        """
        for i, layout in self._layouts.items():
            if leaves[i].stride() != layout.strides or layout.storage_offset not in (None, leaves[i].storage_offset()):
                raise ArgumentError(
                    f"the model addresses the memory of {self._names[i]} by strides {layout.strides} (as_strided), and "
                    f"this one has strides {leaves[i].stride()} and begins at element {leaves[i].storage_offset()} of "
                    "its storage; pass x.contiguous().clone()"
                )
        if self._changed_inputs or self._changed_buffers:
            self._check_apart(leaves)

    def _check_apart(self, leaves: Sequence[Any]) -> None:
        spans = {i: span for i in self._names if (span := _span(leaves[i])) is not None}
        for i in self._changed_inputs:
            others = {f"the argument {self._names[j]}": span for j, span in spans.items() if j != i}
            others |= {f"the model's {name!r}": span for name, span in _spans(self._tensors.items())}
            self._refuse_overlap(f"its argument {self._names[i]}", spans.get(i), others)
        if spans:
            low, high = min(start for start, _ in spans.values()), max(stop for _, stop in spans.values())
            for name, span in _spans((name, self._tensors[name]) for name in self._changed_buffers):
                if span[0] < high and low < span[1]:
                    others = {f"the argument {self._names[j]}": other for j, other in spans.items()}
                    self._refuse_overlap(f"its buffer {name!r}", span, others)

    def _refuse_overlap(
        self, changed: str, span: tuple[int, int] | None, others: Mapping[str, tuple[int, int]]
    ) -> None:
        for other, (start, stop) in others.items():
            if span is not None and start < span[1] and span[0] < stop:
                raise UnsupportedOperatorError(
                    f"the model changes {changed} in place, and {other} shares its memory, so that on one device both "
                    "would change; pass a clone of one of them"
                )


def _spans(named: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, tuple[int, int]]]:
    for name, tensor in named:
        if (span := _span(tensor)) is not None:
            yield name, span


def _span(tensor: Any) -> tuple[int, int] | None:
    """First and last address of a plain tensor's elements; None if it has no memory of its own kind."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or not tensor.numel():
        return None
    start = tensor.data_ptr()
    return (start, start + reach(tensor.shape, tensor.stride()) * tensor.element_size()) if start else None
