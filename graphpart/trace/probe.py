"""What each operator keeps for its backward and what carries a gradient, found by running it on fakes; and its rule."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from graphpart.errors import UnsupportedOperatorError
from graphpart.ir.axes import AxisRule
from graphpart.ir.forms import form_of
from graphpart.ir.graph import Operator, Source, map_refs
from graphpart.rules import rule_for
from graphpart.rules.flops import flops
from graphpart.trace.names import resolve, to_torch
from graphpart.trace.randomness import attention_with_dropout, drop


def probe(operators: Sequence[Operator], sources: Sequence[Source]) -> list[Operator]:
    """Run every operator once on fake tensors and note what autograd does.

    Fills ``Value.requires_grad`` of the results, and ``saved`` and ``saved_extra_bytes`` of the operators:
    storages are counted once over the whole graph, and those of parameters, buffers and constants never.

    Args:
        operators: in topological order.
        sources: what they read.

    Returns:
        The operators with those fields set.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        recorder = _Recorder(sources)
        return [recorder.run(op) for op in operators]


def annotate(operators: Sequence[Operator], sources: Sequence[Source]) -> list[Operator]:
    """Add gradients, saved bytes, axis rules and FLOPs; operators of one form share their rule.

    Args:
        operators: in topological order.
        sources: what they read.
    """
    operators = probe(operators, sources)
    values = {v.name: v for v in (*(s.value for s in sources), *(v for op in operators for v in op.results))}
    wants_grad = {s.value.name: s.trainable for s in sources}
    wants_grad.update((v.name, v.requires_grad) for op in operators for v in op.results)
    known: dict[Hashable, tuple[AxisRule | None, float, float]] = {}
    annotated = []
    for op in operators:
        wanted = tuple([wants_grad[name] for name in op.operands])
        form = (form_of(op, values), wanted)
        if form not in known:
            operands, results = [values[name].shape for name in op.operands], [v.shape for v in op.results]
            rule = rule_for(
                op.target,
                op.args,
                op.kwargs,
                lambda name: values[name].shape,
                results,
                _is_pointwise(op.target),
                lambda name: values[name].dtype,
            )
            forward, backward = flops(op.target, rule, operands, results, wanted)
            known[form] = rule, forward, backward if any(v.requires_grad for v in op.results) else 0.0
        rule, forward, backward = known[form]
        annotated.append(replace(op, rule=rule, flops_forward=forward, flops_backward=backward))
    return annotated


def _is_pointwise(target: str) -> bool:
    return torch.Tag.pointwise in resolve(target).tags


class _Recorder:
    """Fake values by name, and the name that stands for each storage."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.storage_name: dict[int, str] = {}
        self.keep_alive: list[Any] = []  # storages are told apart by address, so none may be freed meanwhile
        for source in sources:
            value = source.value
            fake = torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="cpu")
            if source.trainable and (fake.is_floating_point() or fake.is_complex()):
                fake.requires_grad_()
            self.values[value.name] = fake
            self.storage_name[_key(fake)] = value.name if source.kind == "input" else ""

    def run(self, op: Operator) -> Operator:
        args = map_refs(op.args, lambda ref: self.values[ref.name])
        kwargs = map_refs(op.kwargs, lambda ref: self.values[ref.name])
        packed: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            packed.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call = _STAND_INS.get(op.target) if op.random else None
            try:
                out = (call or resolve(op.target))(*to_torch(args), **to_torch(kwargs))
            except (DataDependentOutputException, DynamicOutputShapeException) as reason:
                raise UnsupportedOperatorError(
                    f"operator {op} looks at the values of tensors while it runs ({reason}), which a graph does not "
                    "have; compute it outside of the model"
                ) from reason
        results = out if isinstance(out, (tuple, list)) else () if out is None else (out,)
        tensors = [t for t in results if t is not None]
        values = []
        for value, tensor in zip(op.results, tensors, strict=True):
            self.values[value.name] = tensor
            self.storage_name.setdefault(_key(tensor), value.name)
            values.append(replace(value, requires_grad=tensor.requires_grad))
        saved, extra = self._account(packed)
        return replace(op, results=tuple(values), saved=saved, saved_extra_bytes=extra)

    def _account(self, packed: Sequence[torch.Tensor]) -> tuple[tuple[str, ...], int]:
        saved: dict[str, None] = {}
        extra = 0
        for tensor in packed:
            key = _key(tensor)
            if key not in self.storage_name:
                extra += tensor.untyped_storage().nbytes()
                self.storage_name[key] = ""
                self.keep_alive.append(tensor)
            elif self.storage_name[key]:
                saved[self.storage_name[key]] = None
        return tuple(saved), extra


def _dropout(x: torch.Tensor, p: float, train: bool = True) -> torch.Tensor:
    return drop(x, p) if train and p else x


# Random operators keep what the runtime's own kernels keep.
_STAND_INS: dict[str, Callable[..., Any]] = {
    "aten.dropout.default": _dropout,
    "aten.scaled_dot_product_attention.default": attention_with_dropout,
}


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
