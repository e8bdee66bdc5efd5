"""Arguments and results as flat lists: what torch's pytrees hold, and dataclasses, registered or not."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphpart.errors import TraceError

Leaves = list[Any]

CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, range, type, enum.Enum, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
"""Types of arguments that a trace can take for given: they cannot change, and hold no tensor."""


class _Fields:
    """A dataclass, or an object with tensors inside, on its way through a pytree."""

    def __init__(self, kind: type, values: dict[str, Any]) -> None:
        self.kind = kind
        self.values = values


def _build(values: Any, context: Any) -> Any:
    kind, names = context
    made = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # also where the dataclass is frozen
    return made


pytree.register_pytree_node(
    _Fields,
    lambda node: (list(node.values.values()), (node.kind, tuple(node.values))),
    _build,
    flatten_with_keys_fn=lambda node: (
        [(pytree.GetAttrKey(name), value) for name, value in node.values.items()],
        (node.kind, tuple(node.values)),
    ),
)


def flatten(tree: Any, is_node: Callable[[Any], bool] | None = None) -> tuple[Leaves, pytree.TreeSpec]:
    """Leaves of nested containers, and what :func:`unflatten` needs to put them back.

    Args:
        tree: the containers.
        is_node: which objects are containers beside those that torch knows; dataclasses by default.
    """
    leaves, spec = pytree.tree_flatten(tree)
    if any(map(is_node or _is_dataclass, leaves)):
        leaves, spec = pytree.tree_flatten(_open(tree, is_node or _is_dataclass))
    return leaves, spec


def unflatten(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The containers, with other leaves."""
    return pytree.tree_unflatten(leaves, spec)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors of a result, those inside of objects too."""
    return [x for x in flatten(tree, holds_tensors)[0] if isinstance(x, torch.Tensor)]


def holds_tensors(leaf: Any) -> bool:
    """Whether an object is a dataclass or has tensors somewhere inside, as a cache of keys and values has."""
    return _is_dataclass(leaf) or _has_tensor(leaf, set())


def _has_tensor(value: Any, seen: set[int]) -> bool:
    if isinstance(value, torch.Tensor) or id(value) in seen or isinstance(value, (torch.nn.Module, type)):
        return False
    seen.add(id(value))
    inside = [x for part in getattr(value, "__dict__", {}).values() for x in pytree.tree_leaves(part)]
    return any(isinstance(x, torch.Tensor) or _has_tensor(x, seen) for x in inside)


def leaf_names(args: tuple[Any, ...], kwargs: dict[str, Any], *beside: dict[str, Any]) -> list[str]:
    """Per leaf of ``(args, kwargs, *beside)``, its place as one writes it: ``args[0]``, ``labels``, ``labels['x']``."""
    tree = _open((args, kwargs, *beside), _is_dataclass)
    return [_written(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that a trace cannot hold on to.

    Raises:
        TraceError: naming the argument and its type.
    """
    leaves, _ = flatten((args, kwargs))
    for name, leaf in zip(leaf_names(args, kwargs), leaves, strict=True):
        if not isinstance(leaf, (torch.Tensor, *CONSTANTS)):
            raise TraceError(
                f"the argument {name} is a {type(leaf).__module__}.{type(leaf).__qualname__}, which may hold tensors "
                "that a graph would not see change. Give tensors, numbers, strings, and lists, tuples, dicts or "
                "dataclasses of them, or register the type with torch.utils._pytree.register_pytree_node"
            )


def _is_dataclass(leaf: Any) -> bool:
    return hasattr(type(leaf), "__dataclass_fields__")


def _open(tree: Any, is_node: Callable[[Any], bool]) -> Any:
    def visit(leaf: Any) -> Any:
        if not is_node(leaf):
            return leaf
        names = [f.name for f in dataclasses.fields(leaf)] if _is_dataclass(leaf) else list(leaf.__dict__)
        return _Fields(type(leaf), {name: _open(getattr(leaf, name), is_node) for name in names})

    return pytree.tree_map(visit, tree)


def _written(path: tuple[Any, ...]) -> str:
    head, *rest = path
    if getattr(head, "idx", 0) == 0:
        return "args" + "".join(pytree.keystr((key,)) for key in rest)
    first = getattr(rest[0], "key", rest[0])
    return str(first) + "".join(pytree.keystr((key,)) for key in rest[1:])
