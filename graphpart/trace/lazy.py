"""Parameters that a forward makes: a trace would leave ones without values behind, so they are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from graphpart.errors import UnsupportedOperatorError


@contextmanager
def no_new_parameters(model: nn.Module) -> Iterator[None]:
    """While tracing, refuse a forward that makes parameters; those of the trace are taken away again.

    Raises:
        UnsupportedOperatorError: naming the parameter.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise UnsupportedOperatorError(f"{name!r} gets its shape in the first forward; call the model once before")
    before = {id(module): frozenset(module._parameters) for module in model.modules()}
    made: list[str] = []
    try:
        yield
    finally:
        for path, module in model.named_modules():
            for name in sorted(set(module._parameters) - before.get(id(module), frozenset())):
                del module._parameters[name]
                made.append(f"{path}.{name}".lstrip("."))
    if made:
        raise UnsupportedOperatorError(
            f"parameter {made[0]!r} is made by the forward; make it in __init__, or call the model once before it is "
            "partitioned"
        )
