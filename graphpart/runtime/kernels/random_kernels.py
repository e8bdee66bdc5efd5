"""Kernels of random operators: each takes its draw first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from graphpart.errors import UnsupportedOperatorError
from graphpart.runtime.kernels.random import Draw
from graphpart.trace.names import resolve
from graphpart.trace.randomness import attention_with_dropout, drop

FUSED_ATTENTION = frozenset({"cuda"})
"""Kinds of devices whose own kernel computes attention with dropout."""


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
    """Attention with dropout on its weights, as ``scaled_dot_product_attention`` defines it.

    On GPUs it is torch's own kernel, which keeps its seed in place of the mask. On CPUs torch has none with dropout,
    and its default generator would make the workers wait for each other, so that it is written out.
    """
    if dropout_p == 0 or draw.is_off:
        dropout_p = 0.0
    elif query.device.type not in FUSED_ATTENTION:
        generator = draw.generator(query.device)
        return attention_with_dropout(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, generator=generator
        )
    with draw.on_default(query.device) if dropout_p else nullcontext():
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
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
