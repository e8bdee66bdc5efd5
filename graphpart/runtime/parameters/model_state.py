"""A model's parameters and buffers: where they live, and how they are read and given out whole."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.stateless import _reparametrize_module

from graphpart.errors import ParameterError, PlacementError, StateDictError
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Shard
from graphpart.ir.region import Region
from graphpart.lower.lower import sparse_tables
from graphpart.runtime.executors.fingerprint import Fact
from graphpart.runtime.executors.peer_faults import faults_named
from graphpart.runtime.executors.process_group import wire_device
from graphpart.runtime.executors.rank_compare import facts_of
from graphpart.runtime.parameters.layout import TiledLayout, TileHome, cut, paste
from graphpart.runtime.parameters.stand_ins import check_unchanged, without_memory
from graphpart.runtime.parameters.tiled_tensor import TiledTensor, from_full, retile_

_COLLECTIVE = (
    "this process gathered whole values (state_dict, grad_dict and verify are collective: call them on every process, "
    "and save on one)"
)


class ModelState:
    """The tensors of a partitioned model, re-homed in place as plans want it.

    In one process a parameter whose parts all lie on one torch device (as CPU workers' do) stays a plain tensor, and
    one that is spread over several becomes a :class:`TiledTensor`. With a process a device, each process holds its
    own tiles and no others, and every parameter is a :class:`TiledTensor`. Buffers are plain and whole.

    Attributes:
        turn: held by calls that overwrite buffers, from reading them on.

    Args:
        module: the user's model, whose parameters are taken over.
        devices: torch device per index.
        distributed: whether there is a process a device.
        check_weights: whether :meth:`initial` says what the tensors hold.
    """

    def __init__(
        self,
        module: nn.Module,
        devices: tuple[torch.device, ...],
        distributed: bool = False,
        check_weights: bool = False,
    ) -> None:
        self.module = module
        self.turn = threading.RLock()
        self.devices = devices
        self.distributed = distributed
        self.check_weights = check_weights
        self.rank = dist.get_rank() if distributed else 0
        self.tensors: dict[str, Tensor] = {}
        self.homes: dict[str, tuple[Shard, ...]] = {}
        self._strides = {name: () if is_lazy(p) else p.stride() for name, p in module.named_parameters()}
        self._cut: dict[int, TiledLayout] = {}  # by identity, plain parameters of several parts
        for name, tensor in self._named():
            self.tensors.setdefault(name, tensor)
        self._known = tensors_in(module)
        self._names: dict[int, str] = {}  # by identity
        self._has_stand_ins = False
        if distributed:
            # Tiled before any trace: export leaves weak references behind, which bar a change of class afterwards.
            with _without_weak_references(module):
                for parameter in module.parameters():
                    retile_(parameter, TiledLayout.whole(tuple(parameter.shape), 0, str(parameter.device)))

    def follow(self, tensors: Sequence[Tensor]) -> bool:
        """Take over parameters and buffers that the user, or the model's own forward, has put in the place of others.

        Those of the same sizes live where their forerunners did.

        Args:
            tensors: all of the model's, as :func:`tensors_in` gives them.

        Returns:
            Whether traces may be out of date: something came, went, or has other sizes.
        """
        if self._has_stand_ins or (len(tensors) == len(self._known) and all(map(is_, tensors, self._known))):
            return False
        now = dict(self._named())
        stale = now.keys() != self.tensors.keys()
        with _without_weak_references(self.module):
            for name in self.tensors.keys() - now.keys():
                self._cut.pop(id(self.tensors.pop(name)), None)
                self.homes.pop(name, None)
            for name, tensor in now.items():
                former = self.tensors.get(name)
                if former is not tensor:
                    self.tensors[name] = tensor
                    stale |= not self._succeed(name, tensor, former)
        self._known = tensors_in(self.module)
        self._names = {}
        return stale

    def _succeed(self, name: str, tensor: Tensor, former: Tensor | None) -> bool:
        """Give a new tensor the home of its forerunner; whether it could."""
        is_parameter = isinstance(tensor, nn.Parameter)
        if isinstance(tensor, nn.Parameter) and not is_lazy(tensor):
            self._strides[name] = tensor.stride()
            if self.distributed and not isinstance(tensor, TiledTensor):
                retile_(tensor, TiledLayout.whole(tuple(tensor.shape), 0, str(tensor.device)))
        shards = self.homes.pop(name, None)
        self._cut.pop(id(former), None)
        if former is None or is_parameter != isinstance(former, nn.Parameter):
            return False
        if tensor.shape != former.shape or tensor.dtype != former.dtype:
            return False
        if shards is not None:
            self._move(name, "parameter" if is_parameter else "buffer", shards)
            self.homes[name] = shards
        return True

    def name_of(self, tensor: Tensor) -> str | None:
        """Which parameter or buffer a tensor is, also one that stands for it while tracing; None for any other."""
        if not self._names:
            self._names = {id(t): name for name, t in reversed(self._named())}
        return self._names.get(id(tensor))

    @property
    def is_spread(self) -> bool:
        """Whether parameters may be tiled: over processes, or torch devices."""
        return self.distributed or len(set(self.devices)) > 1

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes; looked up each time, since a group that outlives its destruction aborts the interpreter."""
        return dist.group.WORLD if self.distributed else None

    def _named(self) -> list[tuple[str, Tensor]]:
        return [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]

    def initial(self) -> tuple[Fact, ...]:
        """What each parameter and buffer holds before any has moved, for processes to compare; else nothing."""
        if not self.check_weights or not self.distributed or self.homes:
            return ()
        whole = {n: t.local_tiles[0] if isinstance(t, TiledTensor) else t for n, t in self.tensors.items()}
        return facts_of({n: t.detach().cpu() for n, t in whole.items() if not t.is_meta})

    def rehome(self, graph: Graph, placement: Placement) -> None:
        """Move every parameter, part by part, and every buffer to its home; a move made before stays.

        Raises:
            ParameterError: if a parameter has no values (meta device), cannot be moved, or has another home already.
            PlacementError: if one has a sparse gradient, and there is a process a device.
        """
        if self.distributed and (sparse := sparse_tables(graph)):
            raise PlacementError(
                f"operator {sparse[0][0]} gives the table {sparse[0][1].name!r} a sparse gradient, which processes "
                "cannot gather; build it with sparse=False, or use devices of one process"
            )
        with _without_weak_references(self.module):
            self._rehome(graph, placement)

    def _rehome(self, graph: Graph, placement: Placement) -> None:
        for source in graph.sources:
            name = source.value.name
            if source.kind not in ("parameter", "buffer"):
                continue
            shards = placement.home(source.value)
            if name not in self.homes:
                self._move(name, source.kind, shards)
                self.homes.update(dict.fromkeys(source.names, shards))
            elif self.homes[name] != shards:
                raise ParameterError(
                    f"{source.kind} {name!r} is at home on {_where(self.homes[name])} since the first call, and a plan "
                    f"for this call wants it on {_where(shards)}; plan every call with the same homes"
                )

    @contextmanager
    def shapes_only(self) -> Iterator[None]:
        """Tensors of the right shapes, but without memory, in place of parameters that are tiled or may become so.

        Their strides are those that the user gave them, so that every process traces what one process traces.

        For tracing, which reads no values. It leaves weak references to what it traces, which would bar a change of
        class afterwards.

        Raises:
            ParameterError: if one of them is replaced or given a value or a gradient meanwhile.
        """
        hidden = {n: p for n, p in self.module.named_parameters() if self.is_spread and not p.is_meta}
        if not hidden:
            yield
            return
        blanks: dict[str, Tensor] = {
            n: without_memory(p, self._strides.get(n) or p.stride()) for n, p in hidden.items()
        }
        names, self._names, self._has_stand_ins = self._names, {}, True
        try:
            with _reparametrize_module(self.module, blanks, tie_weights=True):
                yield
                check_unchanged(self.module, blanks)
        finally:
            self._names, self._has_stand_ins = names, False

    def check_values(self, names: Iterable[str]) -> None:
        """Refuse tensors without values.

        Args:
            names: which to look at.

        Raises:
            ParameterError: naming one on the meta device.
        """
        for name in names:
            tensor = self.tensors[name]
            if tensor.is_meta:
                kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                raise ParameterError(
                    f"{kind} {name!r} has no values (meta device); materialise the model before running it "
                    "(model.to_empty(device='cpu') and load_state_dict), or use graphpart.plan to plan only"
                )

    def _move(self, name: str, kind: str, shards: tuple[Shard, ...]) -> None:
        self.check_values((name,))
        tensor = self.tensors[name]
        homes = {self.devices[shard.device] for shard in shards}
        if kind == "parameter" and (self.distributed or len(shards) > 1):
            assert isinstance(tensor, nn.Parameter)
            tiles = [
                TileHome(s.region, s.device if self.distributed else 0, str(self.devices[s.device])) for s in shards
            ]
            layout = TiledLayout(tuple(tensor.shape), tuple(tiles))
            if self.distributed or len(homes) > 1:
                retile_(tensor, layout, rank=self.rank, process_group=self.group)
                return
            self._cut[id(tensor)] = layout
        (device,) = homes
        if (not self.distributed or shards[0].device == self.rank) and tensor.device != device:
            tensor.data = tensor.data.to(device)
            if tensor.grad is not None:
                tensor.grad = tensor.grad.to(device)

    def read(self, name: str, region: Region) -> Tensor:
        """The plain tensor of a parameter's or buffer's region at home in this process.

        A part of a tiled parameter is one of its tiles; of a plain one it is a view, or a copy where a dimension has
        several runs.
        """
        tensor = self.tensors[name]
        if not isinstance(tensor, TiledTensor):
            return cut(tensor.detach(), region)
        tiles = zip(tensor.tiling.local(self.rank), tensor.local_tiles, strict=True)
        return next(tile for home, tile in tiles if home.region == region)

    def gradient(self, name: str, parts: Mapping[Region, Tensor]) -> Tensor:
        """A parameter's gradient in the form of the parameter: tiled where that is, zeros where no part is given.

        Args:
            name: the parameter.
            parts: gradients of disjoint regions, those at home in this process. One that is whole is passed on as
                it is.
        """
        parameter = self.tensors[name]
        if isinstance(parameter, TiledTensor):
            tiles = zip(parameter.tiling.local(self.rank), parameter.local_tiles, strict=True)
            found = [parts[h.region] if h.region in parts else torch.zeros_like(tile) for h, tile in tiles]
            return parameter.with_tiles(found, parameter.dtype)
        whole = self.start_gradient(name, list(parts))
        if whole is None:
            return parts[Region.full(parameter.shape)]
        for region, part in parts.items():
            paste(whole, region, part)
        return whole

    def start_gradient(self, name: str, regions: Sequence[Region]) -> Tensor | None:
        """What gradients of these disjoint regions are written into; zero where none is.

        None where they are kept apart (a tiled parameter) or there is nothing to put together.
        """
        parameter = self.tensors[name]
        if isinstance(parameter, TiledTensor) or list(regions) == [Region.full(parameter.shape)]:
            return None
        is_covered = sum(region.num_elements for region in regions) == parameter.numel()
        return torch.empty_like(parameter) if is_covered else torch.zeros_like(parameter)

    def norm(self, parameter: Tensor) -> Tensor:
        """The norm of a parameter's gradient (collective where the parameter is spread over processes).

        Of a parameter in several parts it is put together from those of the parts, wherever these lie: a sum over all
        elements in turn would end in other digits.
        """
        gradient, tiling = parameter.grad, self._cut.get(id(parameter))
        assert gradient is not None
        return torch.linalg.vector_norm(gradient if tiling is None else from_full(gradient, tiling))

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole value, on this process (collective over the processes where the value is spread)."""
        if isinstance(tensor, TiledTensor):
            with faults_named(_COLLECTIVE, 0):
                return tensor.full_tensor()
        if self.distributed and name in self.homes:
            assert self.group is not None
            value = tensor.detach().to(wire_device(self.group), copy=True)
            with faults_named(_COLLECTIVE, 0):
                dist.broadcast(value, src=self.homes[name][0].device)
            return value.to(tensor.device)
        return tensor

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's own ``state_dict`` with every value whole."""
        found = self.module.state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key, value in found.items():
            if isinstance(value, Tensor):
                found[key] = self.whole(key.removeprefix(prefix), value)
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


def _where(shards: Sequence[Shard]) -> str:
    """Homes for an error: ``device 0``, or each part with its device."""
    if len(shards) == 1:
        return f"device {shards[0].device}"
    return ", ".join(f"device {shard.device} {shard.region}" for shard in shards)


@contextmanager
def _without_weak_references(module: nn.Module) -> Iterator[None]:
    """Recurrent layers hold weak references to their own weights, which bar a change of class; made again after it."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.RNNBase)]
    for layer in layers:
        layer._flat_weight_refs = []
    try:
        yield
    finally:
        for layer in layers:
            layer._flat_weight_refs = [None if w is None else weakref.ref(w) for w in layer._flat_weights]


def tensors_in(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer of every submodule; one that is tied comes as often as it is there."""
    return [
        t for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
    ]  # fmt: skip
