"""The model as a function of tensors alone, so that export meets neither containers nor other arguments."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec

from graphpart.errors import UnsupportedOperatorError
from graphpart.trace.hooks import Looks, Onlooker, watched_hooks
from graphpart.trace.loss import Loss
from graphpart.trace.tree import flatten, holds_tensors, leaf_names, unflatten
from graphpart.trace.views import View, views_among


class FlatCall:
    """One call of a model by the tensors among its arguments, for the tensors of its result.

    Attributes:
        leaves: flattened ``(args, kwargs, arguments of the loss)``.
        names: per leaf, its place in the call.
        results: once called, the flattened result and what onlooking hooks were given; None where there is a tensor.
        is_tensor: once called, where there is one.
        out_spec: once called, the tree of both.
        onlookers: once called, the hooks to call with values.
        views: once called, per result that is a view, of what.

    Args:
        model: the model.
        args: positional arguments; other things than tensors are constants.
        kwargs: keyword arguments.
        loss: a loss behind the model; the result is then the loss, and the model's own if that is wanted.
        watches_hooks: whether forward hooks are tried out first, for those that only look on to be called later.
        keeps_identity: whether a tensor that is given twice is one object to the model, which may ask.
    """

    results: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    out_spec: TreeSpec
    onlookers: tuple[Onlooker, ...]
    views: Mapping[int, View]

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Loss | None = None,
        watches_hooks: bool = True,
        keeps_identity: bool = False,
    ) -> None:
        self.model = model
        self.keeps_identity = keeps_identity
        self.watches_hooks = watches_hooks
        self.loss = loss
        beside = {} if loss is None else loss.arguments
        self.leaves, self._in_spec = flatten((args, kwargs, beside))
        self.names = leaf_names(args, kwargs, beside)
        self._own = dict(self._named())

    def _named(self) -> list[tuple[str, torch.Tensor]]:
        """Parameters and buffers: the model's own, and while it is exported what stands for them."""
        model = self.model
        return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors to call it with. No two share memory: export would merge ``input_ids=x, labels=x`` into one."""
        found: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        parameters = _positional_names(self.model)
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()._cdata if leaf.layout == torch.strided else id(leaf)
                apart = _apart(leaf) if storage in seen else leaf
                seen.add(storage)
                name = re.sub(r"\W+", "_", parameters.get(self.names[i], self.names[i])).strip("_")
                taken = name in found or keyword.iskeyword(name)
                found[f"{name}_{i}" if taken else name] = apart
        return found

    def module(self) -> nn.Module:
        """A module to export; it shares the model's submodules, parameters and buffers, so that these keep names."""
        return _Flat(self)

    def __call__(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Call the model."""
        given = iter(tensors.values())
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        if self.keeps_identity:
            first = {id(leaf): i for i, leaf in reversed(list(enumerate(self.leaves)))}
            leaves = [leaves[first[id(x)]] if isinstance(x, torch.Tensor) else x for x in self.leaves]
        for stand_in, tensor in zip(leaves, self.leaves, strict=True):
            with_attributes(stand_in, tensor)
        for name, stand_in in self._named():
            with_attributes(stand_in, self._own[name])
        args, kwargs, beside = unflatten(leaves, self._in_spec)
        watching: AbstractContextManager[Looks] = watched_hooks(self.model) if self.watches_hooks else nullcontext([])
        with watching as looks:
            result = self.model(*args, **kwargs)
        if self.loss is not None:
            result = self.loss(result, beside)
        results, self.out_spec = flatten((result, [seen for _, seen in looks]), holds_tensors)
        if any(isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) for x in results):
            raise UnsupportedOperatorError(
                f"{type(self.model).__name__} gives a number that depends on data, which a graph does not have; keep "
                "it a tensor"
            )
        self.is_tensor = tuple(isinstance(x, torch.Tensor) for x in results)
        self.results = tuple(None if isinstance(x, torch.Tensor) else x for x in results)
        self.onlookers = tuple(onlooker for onlooker, _ in looks)
        self.views = views_among(results, leaves)
        return [x for x in results if isinstance(x, torch.Tensor)]


class _Flat(nn.Module):
    def __init__(self, call: FlatCall) -> None:
        super().__init__()
        model = call.model
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training
        # Plain tensors among its attributes keep their names, too.
        self.__dict__.update((k, v) for k, v in vars(model).items() if isinstance(v, torch.Tensor))
        self.__dict__["_graphpart_call"] = call  # no submodule has this name

    def forward(self, **tensors: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self.__dict__["_graphpart_call"](tensors)
        return found


def with_attributes(stand_in: Any, tensor: Any) -> Any:
    """What stands for a tensor, with the attributes that users gave the tensor, which code may look for."""
    if isinstance(tensor, torch.Tensor) and vars(tensor) and stand_in is not tensor:
        own = vars(stand_in)
        own.update((name, value) for name, value in vars(tensor).items() if name not in own)
    return stand_in


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that lies in memory of its own as this one does in its."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    overlaps = any(extent > 1 and stride == 0 for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    made = tensor.detach().clone() if overlaps else made.copy_(tensor.detach())
    return made.requires_grad_(tensor.requires_grad)


def _positional_names(model: nn.Module) -> dict[str, str]:
    """What the model calls its positional arguments: ``args[0]`` is ``input_ids``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    return {f"args[{i}]": name for i, name in enumerate(found)}


def argument_names(model: nn.Module) -> dict[str, str]:
    """What a call of a model may be given, by each name for it; ``target`` is what a loss takes besides."""
    found = {name: name for name in (*inspect.signature(model.forward).parameters, "target")}
    return {**found, **_positional_names(model)}
