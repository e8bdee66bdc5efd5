"""Random numbers of a model: dropout as workers draw it, and noise, which is drawn before them.

Dropout takes its numbers from a given generator; only a boolean mask is kept for backward, a byte an element. The
runtime runs it, and the probe sees what it keeps. Noise is random numbers that hang on no tensor's values. It is no
operator of a graph, but comes into it from outside: drawn before each step, in the model's order and from the generator
that the model itself would draw from, so that the numbers are those of one device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphpart.ir.graph import Operator, Ref
from graphpart.trace.names import resolve, to_torch

_LIKE = frozenset({
    "aten.rand_like.default", "aten.randint_like.default", "aten.randint_like.low_dtype", "aten.randn_like.default",
})  # fmt: skip
"""Random operators that take from their operand its shape, its layout and its dtype alone."""

_OVER = frozenset({
    "aten.bernoulli.p", "aten.cauchy.default", "aten.exponential.default", "aten.geometric.default",
    "aten.log_normal.default", "aten.normal_functional.default", "aten.random.default", "aten.random.from",
    "aten.uniform.default",
})  # fmt: skip
"""Those that write over their operand, to which they give a gradient of zeros if it has one."""


def is_random(target: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    """Whether an operator draws random numbers in this call: not with a dropout of 0, nor outside of training."""
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = {a.name: a.default_value for a in target._schema.arguments}
    given.update(zip(given, args, strict=False))
    rate = next((given[name] for name in ("dropout_p", "dropout", "p") if name in given), 1.0)
    return rate != 0.0 and given.get("train", given.get("training", True)) is not False


@dataclass(frozen=True)
class Noise:
    """How some noise is drawn.

    Attributes:
        target: the operator.
        args: its arguments, without the operand.
        kwargs: its keyword arguments.
        like: shape, strides and dtype of its operand; None if it has none.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    like: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None

    def draw(self, device: torch.device) -> Tensor:
        """Numbers from the device's default generator."""
        args = to_torch(self.args, device)
        if self.like is not None:
            shape, strides, dtype = self.like
            args = (torch.empty_strided(shape, strides, dtype=dtype, device=device), *args)
        found: Tensor = resolve(self.target)(*args, **to_torch(self.kwargs, device))
        return found.detach()


def noise_of(op: Operator, node: torch.fx.Node, graded: Collection[str]) -> Noise | None:
    """The noise that an operator draws; None if it is not random, or what it draws hangs on data.

    Args:
        op: the operator.
        node: its node, with the fake values of its operands.
        graded: values that may have a gradient.
    """
    if not op.random or len(op.results) != 1:
        return None
    if not op.operands:
        return Noise(op.target, op.args, op.kwargs, None)
    operand, *args = op.args
    if not isinstance(operand, Ref) or op.operands != (operand.name,):
        return None
    if op.target not in _LIKE and (op.target not in _OVER or operand.name in graded):
        return None
    fake = node.args[0].meta["val"]  # type: ignore[union-attr]
    return Noise(op.target, tuple(args), op.kwargs, (tuple(fake.shape), fake.stride(), fake.dtype))


def drop(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Zero elements with probability ``p`` and scale the rest by ``1 / (1 - p)``."""
    if p == 1:
        return x * 0
    dropped = torch.empty_like(x, requires_grad=False).bernoulli_(1 - p, generator=generator) == 0
    return x.masked_fill(dropped, 0).mul_(1 / (1 - p))


def attention_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attention with dropout on its weights, as ``scaled_dot_product_attention`` defines it."""
    if enable_gqa:
        repeat = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return drop(torch.softmax(scores, -1), dropout_p, generator) @ value
