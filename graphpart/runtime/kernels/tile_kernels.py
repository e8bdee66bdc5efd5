"""What tiles compute where the operator's plain call on their regions would not do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphpart.trace.names import resolve


def cat(tensors: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
    """Some of a concatenation's tensors, in the dtype that all of them have together."""
    return torch.cat([tensor.to(dtype) for tensor in tensors], dim)


def embedding_part(
    weight: Tensor,
    indices: Tensor,
    runs: Sequence[tuple[int, int]],
    num_words: int,
    padding_idx: int,
    *,
    look_up: Callable[..., Tensor] = torch.ops.aten.embedding.default,
) -> Tensor:
    """Look up words in the rows of a part of the vocabulary; words outside it give zeros.

    Args:
        weight: those rows, ``[len of runs, features]``.
        indices: words, in the numbering of the whole vocabulary.
        runs: which words the part has.
        num_words: size of the whole vocabulary.
        padding_idx: the word that gets no gradient; negative for none.
        look_up: takes weight, rows and the row that gets no gradient.

    Raises:
        IndexError: if a word is not in the whole vocabulary (on CPU; CUDA asserts).
    """
    starts, stops = torch.tensor(runs, dtype=indices.dtype, device=indices.device).T.contiguous()
    before = torch.cumsum(stops - starts, 0) - (stops - starts)
    run = (torch.searchsorted(starts, indices, right=True) - 1).clamp(min=0)
    inside = (indices >= starts[run]) & (indices < stops[run])
    own = torch.where(inside, indices - starts[run] + before[run], 0)
    own = own.where((indices >= 0) & (indices < num_words), -1)  # which the look-up refuses
    skipped = [start for start, stop in runs if start <= padding_idx < stop]
    offset = sum(min(stop, padding_idx) - start for start, stop in runs if start < padding_idx)
    rows = look_up(weight, own, offset if skipped else -1)
    return rows.masked_fill(~inside.unsqueeze(-1), 0)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[tuple[int, int]],
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Causal attention of some of the queries: query ``i`` sees the keys up to ``i``.

    Args:
        query: ``[..., heads, len of runs, features]``.
        key: all keys, ``[..., heads, keys, features]``.
        value: all values.
        runs: which queries these are.
        scale: of the scores; the features' default if left out.
        enable_gqa: whether several heads of queries share one of keys.
    """
    seen = min(runs[-1][1], key.shape[-2])
    rows = torch.cat([torch.arange(start, stop, device=query.device) for start, stop in runs])
    mask = rows.unsqueeze(-1) >= torch.arange(seen, device=query.device)
    key, value = key.narrow(-2, 0, seen), value.narrow(-2, 0, seen)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)


def padded(
    target: str | Callable[..., Any], amounts: Sequence[int], fill: float, tensor: Tensor, *args: Any, **kwargs: Any
) -> Tensor | tuple[Tensor, ...]:
    """An operator on its first operand padded: a tile's windows may hang over one edge and not over the other.

    Args:
        target: the operator, or what is called in its place.
        amounts: elements before and after, from the last dimension, as ``torch.nn.functional.pad`` takes them.
        fill: the value of the padding.
        tensor: the first operand.
        args: the operator's other arguments.
        kwargs: its keyword arguments.
    """
    operator = resolve(target) if isinstance(target, str) else target
    return operator(torch.nn.functional.pad(tensor, list(amounts), value=fill), *args, **kwargs)


def wide(target: str, *args: Any, **kwargs: Any) -> Tensor:
    """An operator on its half-precision operands as float32."""

    def widened(value: Any) -> Any:
        is_narrow = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if is_narrow else value

    return resolve(target)(*map(widened, args), **{name: widened(value) for name, value in kwargs.items()})


def quotient(total: Tensor, count: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A mean from a sum, which may be wider than it."""
    return (total / count).to(dtype)


TILE_KERNELS: Mapping[str, Callable[..., Any]] = {
    "graphpart.cat": cat,
    "graphpart.causal_attention": causal_attention,
    "graphpart.embedding_part": embedding_part,
    "graphpart.padded": padded,
    "graphpart.quotient": quotient,
    "graphpart.wide": wide,
}
