"""What a trace depends on that is told at once; guards tell the rest. Calls with other keys never share a trace."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec

from graphpart.trace.hooks import global_hook_ids, hook_ids


class TraceKey(NamedTuple):
    """What a trace depends on.

    Attributes:
        spec: tree of the arguments.
        leaves: per leaf, shape, dtype, whether it requires a gradient and kind of device; a constant's type and value.
        hooks: per module, its hooks.
        trainable: per parameter and buffer, whether it requires a gradient.
        modes: what :func:`modes_of` says, and the hooks of all modules.
        methods: of the classes of modules, which TorchDynamo takes to stay as they are.
        loss: whether there is a loss behind the model, and whether the model's own result is wanted besides.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    hooks: tuple[Any, ...]
    trainable: tuple[bool, ...]
    modes: tuple[Any, ...]
    methods: tuple[types.FunctionType, ...]
    loss: tuple[bool, bool]


def call_key(
    module: nn.Module,
    tensors: Iterable[Tensor],
    leaves: Sequence[Any],
    spec: TreeSpec,
    kinds: Iterable[str],
    loss: tuple[bool, bool],
) -> TraceKey:
    """The key of one call.

    Args:
        module: the model.
        tensors: its parameters and buffers.
        leaves: flattened arguments.
        spec: their tree.
        kinds: kinds of the devices in use.
        loss: whether there is a loss behind the model, and whether the model's own result is wanted besides.
    """
    return TraceKey(
        spec,
        tuple(
            (x.shape, x.dtype, x.requires_grad, x.device.type) if isinstance(x, Tensor) else (type(x), x)
            for x in leaves
        ),
        tuple(hook_ids(m) for m in module.modules()),
        tuple(t.requires_grad for t in tensors),
        (*modes_of(kinds), global_hook_ids()),
        methods_of(module),
        loss,
    )


def modes_of(kinds: Iterable[str]) -> tuple[Any, ...]:
    """Autocast by kind of device, grad modes, and dtype and device of new tensors, as they are now."""
    autocast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    new = torch.get_default_dtype(), torch.get_default_device()
    return autocast, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), new


def methods_of(module: nn.Module) -> tuple[types.FunctionType, ...]:
    """What classes of modules define; torch's own are left out."""
    classes = dict.fromkeys(one for kind in {type(m): None for m in module.modules()} for one in kind.__mro__)
    own = [one for one in classes if not one.__module__.startswith("torch.") and one is not object]
    return tuple(value for one in own for value in vars(one).values() if type(value) is types.FunctionType)


def what_varies(keys: Sequence[TraceKey], names: Sequence[str], module: nn.Module) -> str:
    """What tells the last of some keys from the others, in words.

    Args:
        keys: keys of earlier calls, and the last.
        names: per leaf of the last call, its place in the call.
        module: the model, for the names of its modules.
    """
    last = keys[-1]
    alike = [key for key in keys if key.spec == last.spec]
    if len(alike) < 2:
        return "the structure of the arguments"
    differing = [(len({key.leaves[i] for key in alike}), i) for i in range(len(last.leaves))]
    most, i = max(differing, default=(1, 0))
    if most > 1:
        what = "shape" if isinstance(last.leaves[i][0], torch.Size) else "value"
        found = list(dict.fromkeys(key.leaves[i] for key in alike))[-4:]
        examples = ", ".join(str(tuple(leaf[0])) if what == "shape" else repr(leaf[1]) for leaf in found)
        return f"the {what} of {names[i]} ({examples}, …)"
    for i, (path, _) in enumerate(module.named_modules()):
        if len({key.hooks[i : i + 1] for key in alike}) > 1:
            return f"the hooks of module {path!r}" if path else "the hooks of the model"
    if len({key.methods for key in alike}) > 1:
        return "the methods of the model's classes"
    return "what requires a gradient, the grad mode or autocast"
