"""Torch objects by the names the graph knows them under."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphpart.ir.graph import Symbol


def resolve(target: str) -> torch._ops.OpOverload:
    """The torch operator of a target such as ``aten.linear.default``."""
    namespace, name, overload = target.rsplit(".", 2)
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def to_torch(arguments: Any, device: torch.device | str = "cpu") -> Any:
    """Nested arguments with every :class:`~graphpart.ir.graph.Symbol` replaced by the torch object it names.

    Args:
        arguments: numbers, strings, symbols, tensors, and tuples, lists or mappings of them.
        device: what a ``device`` symbol stands for.
    """
    if isinstance(arguments, Symbol):
        return torch.device(device) if arguments.kind == "device" else getattr(torch, arguments.name)
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(to_torch(a, device) for a in arguments)
    if isinstance(arguments, Mapping):
        return {k: to_torch(v, device) for k, v in arguments.items()}
    return arguments
