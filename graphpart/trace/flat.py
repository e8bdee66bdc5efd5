"""The model as a function of tensors alone, so that export meets neither containers nor other arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec

from graphpart.trace.hooks import Onlooker, watched_hooks
from graphpart.trace.tree import flatten, leaf_names, unflatten


class Flat(nn.Module):
    """A model that takes the tensors among its arguments by name and returns the tensors of its result.

    It shares the model's submodules, parameters and buffers, so that these keep their names.

    Attributes:
        leaves: flattened ``(args, kwargs)``.
        names: per leaf, its place in the call.
        results: after a call, the flattened result and what onlooking hooks were given; None where there is a tensor.
        is_tensor: after a call, where there is one.
        out_spec: after a call, the tree of both.
        onlookers: after a call, the hooks to call with values.

    Args:
        model: the model.
        args: positional arguments; other things than tensors are constants.
        kwargs: keyword arguments.
    """

    leaves: list[Any]
    names: list[str]
    results: list[Any]
    is_tensor: list[bool]
    out_spec: TreeSpec
    onlookers: tuple[Onlooker, ...]

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training
        leaves, spec = flatten((args, kwargs))
        names = leaf_names(args, kwargs)
        self.__dict__.update(model=model, leaves=leaves, names=names, in_spec=spec)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors to call it with. None appears twice: export would merge ``input_ids=x, labels=x`` into one."""
        found: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        parameters = _positional_names(self.__dict__["model"])
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, torch.Tensor):
                apart = leaf.detach().clone().requires_grad_(leaf.requires_grad) if id(leaf) in seen else leaf
                seen.add(id(leaf))
                name = parameters.get(self.names[i], self.names[i])
                found[name if name not in found else f"{name}_{i}"] = apart
        return found

    def forward(self, **tensors: torch.Tensor) -> list[torch.Tensor]:
        """Call the model."""
        given = iter(tensors.values())
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = unflatten(leaves, self.__dict__["in_spec"])
        model = self.__dict__["model"]
        with watched_hooks(model) as looks:
            result = model(*args, **kwargs)
        results, spec = flatten((result, [seen for _, seen in looks]))
        self.__dict__.update(
            results=[None if isinstance(x, torch.Tensor) else x for x in results],
            is_tensor=[isinstance(x, torch.Tensor) for x in results],
            out_spec=spec,
            onlookers=tuple(onlooker for onlooker, _ in looks),
        )
        return [x for x in results if isinstance(x, torch.Tensor)]


def _positional_names(model: nn.Module) -> dict[str, str]:
    """What the model calls its positional arguments: ``args[0]`` is ``input_ids``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    return {f"args[{i}]": name for i, name in enumerate(found)}
