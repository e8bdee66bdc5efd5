"""A model's parameters and buffers: where they live, and how they are read and given out whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from graphpart.errors import ParameterError, StateDictError
from graphpart.ir.graph import Graph
from graphpart.runtime.key import tensors_in
from graphpart.runtime.peers import faults_named
from graphpart.runtime.tiled import TiledTensor, retile_
from graphpart.runtime.tiled_layout import Tiling

_COLLECTIVE = (
    "this process gathered whole values (state_dict, grad_dict and verify are collective: call them on every process, "
    "and save on one)"
)


class ModelState:
    """The tensors of a partitioned model, re-homed in place as plans want it.

    In one process a tensor that lies whole on one device stays a plain tensor. With a process a device, each
    process holds its own tensors and no others; parameters become :class:`TiledTensor`.

    Args:
        module: the user's model, whose parameters are taken over.
        devices: torch device per index.
        distributed: whether there is a process a device.
    """

    def __init__(self, module: nn.Module, devices: tuple[torch.device, ...], distributed: bool = False) -> None:
        self.module = module
        self.devices = devices
        self.distributed = distributed
        self.rank = dist.get_rank() if distributed else 0
        self.tensors: dict[str, Tensor] = {}
        self.homes: dict[str, int] = {}
        for name, tensor in self._named():
            self.tensors.setdefault(name, tensor)
        self._known = tensors_in(module)
        if distributed:
            # Tiled before any trace: export leaves weak references behind, which bar a change of class afterwards.
            for parameter in module.parameters():
                retile_(parameter, Tiling.whole(tuple(parameter.shape), 0, str(parameter.device)))

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Refuse a model whose parameters or buffers are no longer those that were taken over.

        Raises:
            ParameterError: naming what was added, removed or replaced.
        """
        if len(tensors) == len(self._known) and all(map(is_, tensors, self._known)):
            return
        now = dict(self._named())
        for name in sorted(now.keys() | self.tensors.keys()):
            if now.get(name) is not self.tensors.get(name):
                done = "replaced" if name in now and name in self.tensors else "added" if name in now else "removed"
                raise ParameterError(
                    f"{name!r} was {done} after graphpart.partition, which had taken the parameters and buffers over; "
                    "change values in place (copy_), or change the model first and partition it then"
                )

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes; looked up each time, since a group that outlives its destruction aborts the interpreter."""
        return dist.group.WORLD if self.distributed else None

    def _named(self) -> list[tuple[str, Tensor]]:
        return [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]

    def rehome(self, graph: Graph, homes: Mapping[str, int]) -> None:
        """Move every parameter and buffer to its home; a move made before stays.

        Raises:
            ParameterError: if a parameter has no values (meta device), or cannot be moved.
        """
        for source in graph.sources:
            name = source.value.name
            if source.kind not in ("parameter", "buffer") or name in self.homes:
                continue
            tensor = self.tensors[name]
            if tensor.is_meta:
                raise ParameterError(
                    f"{source.kind} {name!r} has no values (meta device); materialise the model before running it "
                    "(model.to_empty(device='cpu') and load_state_dict), or use graphpart.plan to plan only"
                )
            self._move(tensor, source.kind, homes[name])
            for alias in source.names:
                self.homes[alias] = homes[name]

    @contextmanager
    def shapes_only(self) -> Iterator[None]:
        """Plain tensors of the right shapes in place of tiled parameters, for tracing; their values are never read."""
        tiled = {n: p for n, p in self.module.named_parameters() if isinstance(p, TiledTensor)}
        if not tiled:
            yield
            return
        blank: dict[str, Tensor] = {
            name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=p.device), p.requires_grad)
            for name, p in tiled.items()
        }
        with _reparametrize_module(self.module, blank, tie_weights=True):
            yield

    def _move(self, tensor: Tensor, kind: str, home: int) -> None:
        device = self.devices[home]
        if self.distributed and kind == "parameter":
            assert isinstance(tensor, nn.Parameter)
            tiling = Tiling.whole(tuple(tensor.shape), home, str(device))
            retile_(tensor, tiling, rank=self.rank, process_group=self.group)
        elif (not self.distributed or home == self.rank) and tensor.device != device:
            tensor.data = tensor.data.to(device)
            if tensor.grad is not None:
                tensor.grad = tensor.grad.to(device)

    def read(self, name: str) -> Tensor:
        """The plain tensor of a parameter or buffer at home in this process."""
        tensor = self.tensors[name]
        return tensor.local_tiles[0] if isinstance(tensor, TiledTensor) else tensor

    def wrap_gradient(self, name: str, gradient: Tensor | None) -> Tensor:
        """A parameter's gradient in the form of the parameter: tiled where that is."""
        parameter = self.tensors[name]
        if isinstance(parameter, TiledTensor):
            return parameter.with_tiles([gradient] if gradient is not None else [], parameter.dtype)
        assert gradient is not None
        return gradient

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole value, on this process (collective over the processes where the value is spread)."""
        if isinstance(tensor, TiledTensor):
            with faults_named(_COLLECTIVE, 0):
                return tensor.full_tensor()
        if self.distributed and name in self.homes:
            value = tensor.detach().clone()
            with faults_named(_COLLECTIVE, 0):
                dist.broadcast(value, src=self.homes[name])
            return value
        return tensor

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's own ``state_dict`` with every value whole."""
        found = self.module.state_dict(*args, **kwargs)
        if self.distributed:
            prefix = kwargs.get("prefix", "")
            for key, value in found.items():
                if isinstance(value, Tensor):
                    found[key] = self.whole(key.removeprefix(prefix), self.tensors.get(key.removeprefix(prefix), value))
        return found

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole values under the model's own names.

        Raises:
            StateDictError: for missing, unexpected or wrongly shaped entries, or ``assign=True``.
        """
        if assign:
            raise StateDictError(
                "assign=True would replace parameters that devices and optimizers hold; use assign=False"
            )
        try:
            return self.module.load_state_dict(state, strict=strict)
        except RuntimeError as reason:
            raise StateDictError(str(reason)) from reason

    def grad_dict(self) -> dict[str, Tensor | None]:
        """Whole gradients under the model's own names; None where there is none."""
        return {
            name: None if parameter.grad is None else self.whole("", parameter.grad)
            for name, parameter in self.module.named_parameters()
        }
