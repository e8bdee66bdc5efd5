"""What graphpart's own targets compute, and operators that need more than a plain call."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphpart.errors import UnsupportedOperatorError
from graphpart.runtime.kernels.random import Draw
from graphpart.runtime.kernels.tile_kernels import TILE_KERNELS
from graphpart.trace.dropout import attention_with_dropout, drop
from graphpart.trace.names import resolve


def kernel_of(target: str) -> Callable[..., Any]:
    """The callable for a target: one of ours, or the torch operator."""
    return KERNELS[target] if target in KERNELS else resolve(target)


def random_kernel_of(target: str, where: str) -> Callable[..., Any]:
    """The callable for a random operator; it takes the draw as its first argument.

    Raises:
        UnsupportedOperatorError: if the operator cannot draw from a generator of its own.
    """
    if target not in RANDOM_KERNELS:
        raise UnsupportedOperatorError(
            f"{where}: {target} draws random numbers and takes no generator of its own, so workers could not "
            "repeat them; replace it, for instance with torch.bernoulli or torch.rand and arithmetic"
        )
    return RANDOM_KERNELS[target]


# --- parts of bridges -------------------------------------------------------------------------------------------


def slice_region(tensor: Tensor, runs: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """The sub-tensor at the given runs of each dimension: a view where every dimension has one run."""
    for dim, found in enumerate(runs):
        if len(found) < 2:
            start, stop = found[0] if found else (0, 0)
            if (start, stop) != (0, tensor.shape[dim]):
                tensor = tensor.narrow(dim, start, stop - start)
        else:
            index = torch.cat([torch.arange(a, b, device=tensor.device) for a, b in found])
            tensor = tensor.index_select(dim, index)
    return tensor


def concat(parts: Sequence[Tensor], dim: int, order: Sequence[int] | None) -> Tensor:
    """Parts joined along a dimension; ``order`` sorts indices that interleave."""
    if order is None:
        return torch.cat(list(parts), dim)
    sizes, places = _chunks(tuple(order), tuple(part.shape[dim] for part in parts))
    if len(places) > _MOST_CHUNKS:
        joined = torch.cat(list(parts), dim)
        return joined.index_select(dim, torch.tensor(order, device=joined.device))
    # Views of runs, copied once: cheaper than a concatenation that is then sorted.
    chunks = [
        chunk
        for part, own in zip(parts, sizes, strict=True)
        for chunk in (part.split(list(own), dim) if len(own) > 1 else (part,))
    ]
    return torch.cat([chunks[place] for place in places], dim)


_MOST_CHUNKS = 64


@functools.lru_cache(maxsize=1024)
def _chunks(order: tuple[int, ...], extents: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Parts as runs that stay together: the sizes of each part's runs, and the runs' order in the result."""
    ends = set(itertools.accumulate(extents))
    starts = [at for before, at in itertools.pairwise((-2, *order)) if at != before + 1 or at in ends]
    bounds = [*sorted(starts), len(order)]
    sizes, begin = [], 0
    for extent in extents:
        own = itertools.pairwise(bounds[bounds.index(begin) : bounds.index(begin + extent) + 1])
        sizes.append(tuple(b - a for a, b in own))
        begin += extent
    return sizes, [bounds.index(at) for at in starts]


def sum_parts(parts: Sequence[Tensor]) -> Tensor:
    """The sum of partial values, from the first to the last."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def split(tensor: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """Pieces that tile a dimension; their gradients are joined by one concatenation."""
    return torch.split(tensor, list(sizes), dim)


# --- stand-ins for means and BatchNorm ----------------------------------------------------------------------------


def count_labels(labels: Tensor, ignore_index: int, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
    """Number of labels that aren't ignored, or the sum of their classes' weights."""
    counted = labels != ignore_index
    if weight is None:
        return counted.sum().to(dtype)
    return weight[labels[counted]].sum().to(dtype)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, None, None, Tensor, Tensor]:
    """Training BatchNorm with its new running statistics as results, by the same library call as eager's."""
    mean, var = running_mean.clone(), running_var.clone()
    out = torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, torch.backends.cudnn.enabled)
    return out, None, None, mean, var


def batch_norm_local(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """BatchNorm by the statistics of this part alone."""
    return torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)


def batch_norm_sums(x: Tensor) -> Tensor:
    """Sum and sum of squares per channel, ``[2, channels]`` in float64 so that their difference keeps its digits."""
    wide = x.detach().double()
    dims = [d for d in range(x.dim()) if d != 1]
    return torch.stack([wide.sum(dims), (wide * wide).sum(dims)])


def batch_norm_update(
    sums: Tensor, running_mean: Tensor, running_var: Tensor, count: int, momentum: float
) -> tuple[Tensor, Tensor]:
    """New running statistics from the sums over all parts (unbiased variance, as PyTorch keeps it)."""
    mean = sums[0] / count
    var = (sums[1] - count * mean * mean) / (count - 1)
    return (
        (1 - momentum) * running_mean + momentum * mean.to(running_mean.dtype),
        (1 - momentum) * running_var + momentum * var.to(running_var.dtype),
    )


def centered_squares(x: Tensor, mean: Tensor) -> Tensor:
    """Per channel, the sum of squares about a mean, ``[channels]``."""
    dims = [d for d in range(x.dim()) if d != 1]
    return (x - _by_channel(mean, x)).square().sum(dims)


def batch_norm_apply(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise by given statistics, then scale and shift; all per channel, in the statistics' dtype."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    out = (x - _by_channel(mean, x)) * _by_channel(scale, x)
    return (out if bias is None else out + _by_channel(bias, x)).to(x.dtype)


def batch_norm_running(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, count: int, momentum: float
) -> tuple[Tensor, Tensor]:
    """New running statistics from a batch's mean and biased variance (kept unbiased, as PyTorch does)."""
    mean, var = mean.detach(), var.detach() * (count / max(count - 1, 1))
    return (
        (1 - momentum) * running_mean + momentum * mean.to(running_mean.dtype),
        (1 - momentum) * running_var + momentum * var.to(running_var.dtype),
    )


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


# --- cross-entropy over cut classes -------------------------------------------------------------------------------


def logsumexp_part(scores: Tensor, dim: int) -> Tensor:
    """The logsumexp of a tile's classes, with a dimension in front for the tile: ``[1, ...]``."""
    return torch.logsumexp(scores, dim).unsqueeze(0)


def pick_class(scores: Tensor, labels: Tensor, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
    """The score of each label that is among a tile's classes (the runs), else 0."""
    place = torch.full_like(labels, -1)
    offset = 0
    for start, stop in runs:
        place = torch.where((labels >= start) & (labels < stop), labels - start + offset, place)
        offset += stop - start
    found = scores.gather(dim, place.clamp(min=0).unsqueeze(dim)).squeeze(dim)
    return torch.where(place >= 0, found, torch.zeros((), dtype=found.dtype, device=found.device))


def class_losses(total: Tensor, picked: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Minus the log-probability of each label; 0 where it is ignored."""
    return torch.where(labels == ignore_index, torch.zeros((), dtype=total.dtype, device=total.device), total - picked)


KERNELS: Mapping[str, Callable[..., Any]] = {
    "graphpart.centered_squares": centered_squares,
    "graphpart.batch_norm_apply": batch_norm_apply,
    "graphpart.batch_norm_running": batch_norm_running,
    "graphpart.logsumexp_part": logsumexp_part,
    "graphpart.pick_class": pick_class,
    "graphpart.class_losses": class_losses,
    "graphpart.slice": slice_region,
    "graphpart.concat": concat,
    "graphpart.sum": sum_parts,
    "graphpart.split": split,
    "graphpart.cast": torch.Tensor.to,
    **TILE_KERNELS,
    "graphpart.count_labels": count_labels,
    "graphpart.batch_norm_local": batch_norm_local,
    "graphpart.batch_norm_sums": batch_norm_sums,
    "graphpart.batch_norm_update": batch_norm_update,
    "aten._native_batch_norm_legit_functional.default": batch_norm,
}


# --- random operators: each takes the draw first ------------------------------------------------------------------


def dropout(draw: Draw, x: Tensor, p: float, train: bool | None = True) -> Tensor:
    """Zero elements with probability ``p`` and scale the rest by ``1 / (1 - p)``."""
    if not train or p == 0 or draw.is_off:
        return x
    return drop(x, p, draw.generator(x.device))


def native_dropout(draw: Draw, x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, None]:
    """:func:`dropout` in the shape of ``aten.native_dropout``; nothing reads the mask."""
    return dropout(draw, x, p, train), None


def attention(
    draw: Draw,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with dropout on its weights, as ``scaled_dot_product_attention`` defines it."""
    if dropout_p == 0 or draw.is_off:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    generator = draw.generator(query.device)
    return attention_with_dropout(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, generator=generator
    )


def _recurrent(target: str) -> Callable[..., Any]:
    """Recurrent layers with dropout between them, run one by one."""

    def kernel(
        draw: Draw,
        x: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        p: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        layer = resolve(target)
        if draw.is_off:
            return layer(x, hx, params, has_biases, num_layers, 0.0, train, bidirectional, batch_first)
        generator = draw.generator(x.device)
        states = [hx] if isinstance(hx, Tensor) else hx
        finals = []
        for i in range(num_layers):
            if i:
                x = drop(x, p, generator)
            own = [state.chunk(num_layers)[i] for state in states]
            weights = params[i * len(params) // num_layers : (i + 1) * len(params) // num_layers]
            given = own[0] if isinstance(hx, Tensor) else own
            x, *final = layer(x, given, weights, has_biases, 1, 0.0, train, bidirectional, batch_first)
            finals.append(final)
        return x, *(torch.cat(parts) for parts in zip(*finals, strict=True))

    return kernel


def _like(fill: str) -> Callable[..., Tensor]:
    def kernel(draw: Draw, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = {k: v for k, v in kwargs.items() if k in ("dtype", "device", "memory_format") and v is not None}
        made = torch.empty_like(x, **options)
        return getattr(made, fill)(*args, generator=draw.generator(made.device))

    return kernel


def _sized(fill: str) -> Callable[..., Tensor]:
    def kernel(draw: Draw, size: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        options = {k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}
        made = torch.empty(list(size), **options)
        return getattr(made, fill)(*args, generator=draw.generator(made.device))

    return kernel


def _integers(draw: Draw, low: int, high: int, size: Sequence[int], **kwargs: Any) -> Tensor:
    options = {"dtype": torch.int64, **{k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}}
    made = torch.empty(list(size), **options)
    return made.random_(low, high, generator=draw.generator(made.device))


def _permutation(draw: Draw, n: int, **kwargs: Any) -> Tensor:
    device = kwargs.get("device") or torch.device("cpu")
    return torch.randperm(n, generator=draw.generator(device), device=device)


def _multinomial(draw: Draw, x: Tensor, num_samples: int, replacement: bool = False) -> Tensor:
    return torch.multinomial(x, num_samples, replacement, generator=draw.generator(x.device))


RANDOM_KERNELS: Mapping[str, Callable[..., Any]] = {
    "aten.dropout.default": dropout,
    "aten.native_dropout.default": native_dropout,
    "aten.rrelu.default": lambda draw, *args: torch.ops.aten.rrelu(*args[:4], draw.generator(args[0].device)),
    **{f"aten.{name}.input": _recurrent(f"aten.{name}.input") for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    "aten.scaled_dot_product_attention.default": attention,
    "aten.bernoulli.default": lambda draw, x, **_: torch.bernoulli(x, generator=draw.generator(x.device)),
    "aten.bernoulli.p": _like("bernoulli_"),
    "aten.rand_like.default": _like("uniform_"),
    "aten.randn_like.default": _like("normal_"),
    "aten.uniform.default": _like("uniform_"),
    "aten.normal_functional.default": _like("normal_"),
    "aten.exponential.default": _like("exponential_"),
    "aten.rand.default": _sized("uniform_"),
    "aten.randn.default": _sized("normal_"),
    "aten.randint.default": lambda draw, high, size, **kwargs: _integers(draw, 0, high, size, **kwargs),
    "aten.randint.low": _integers,
    "aten.randperm.default": _permutation,
    "aten.multinomial.default": _multinomial,
}
