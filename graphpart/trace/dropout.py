"""Dropout, and attention with dropout, as workers compute them: the runtime runs them, the probe sees what they keep.

Both take their numbers from a given generator. Only a boolean mask is kept for backward, a byte an element.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
