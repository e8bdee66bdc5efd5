"""Partial sums of half-precision values are made, sent and added in float32, as a kernel adds up the whole.

The sum of 2000 times 300 is no float16, though their mean is; and a bfloat16 keeps three digits of a partial sum.
"""

from __future__ import annotations

from dataclasses import replace

from graphpart.ir.graph import Operator, Symbol
from graphpart.rules.local.cut import LocalCall

WIDE = "float32"
"""What partial sums of narrow values are."""

NARROW = frozenset({"float16", "bfloat16"})

QUOTIENT = "graphpart.quotient"
"""``graphpart.quotient(total, count, dtype)``: what a mean comes to."""

_SUMS = frozenset({"sum", "nansum"})
_LOSSES = frozenset({
    "cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "mse_loss", "l1_loss", "smooth_l1_loss",
    "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "soft_margin_loss", "kl_div",
})  # fmt: skip
_PROMOTING = frozenset({"add", "sub", "mul", "div"})


def is_widened(op: Operator) -> bool:
    """Whether parts of an operator's result, where they add up, are wider than the result."""
    return len(op.results) == 1 and op.results[0].dtype in NARROW and (op.target == QUOTIENT or _name(op) in _ALL)


def widened(op: Operator, call: LocalCall) -> LocalCall:
    """A call of such an operator that gives a float32 part."""
    dtype = Symbol("dtype", WIDE)
    if op.target == QUOTIENT:
        return replace(call, args=(*call.args[:2], dtype))
    if _name(op) in _SUMS:
        return replace(call, kwargs={**call.kwargs, "dtype": dtype})
    return replace(call, target="graphpart.wide", args=(call.target, *call.args))


def keeps_wide(op: Operator, ranks: list[int], wide: list[bool]) -> bool:
    """Whether an operator that is linear in float32 parts gives float32 parts of them.

    Args:
        op: the operator.
        ranks: dimensions of each operand.
        wide: which operands are such parts.
    """
    if op.target == QUOTIENT or len(ranks) == 1:
        return True
    highest = max(ranks)  # a scalar does not widen a tensor of more dimensions
    is_widest = any(is_wide and (rank > 0 or highest == 0) for rank, is_wide in zip(ranks, wide, strict=True))
    return _name(op) in _PROMOTING and is_widest


def _name(op: Operator) -> str:
    return op.target.split(".")[1] if op.target.startswith("aten.") else ""


_ALL = _SUMS | _LOSSES
