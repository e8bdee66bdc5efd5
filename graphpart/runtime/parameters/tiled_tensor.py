"""Parameters as tiles: a tensor of the whole shape that holds only this process's part of the values.

A :class:`TiledTensor` lets the caller's own optimizer run on parameters that are spread over devices and
processes. What is exact tile by tile (pointwise operations, norms; see
:mod:`graphpart.runtime.parameters.tiled_dispatch`) runs; everything else is refused by
name, because running it on each tile would be silently wrong.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from graphpart.errors import ParameterError
from graphpart.runtime.executors.process_group import wire_device
from graphpart.runtime.parameters.layout import TiledLayout, TileHome, cut, gather_tiles, is_open
from graphpart.runtime.parameters.tiled_dispatch import KNOWN_OPTIMIZERS, dispatch

__all__ = ["TileHome", "TiledLayout", "TiledTensor", "from_full", "retile_"]

# These mix rows with columns, or one parameter with another, so that no tile can be updated by itself.
_REFUSED_OPTIMIZERS = ("Muon", "Adafactor", "LBFGS", "SparseAdam")
# Counters and coefficients that optimizers keep as 0-dim tensors: never a part of the parameter's value.
_SCALAR_STATES = {"step", "mu_product", "mu", "eta"}


class TiledTensor(torch.Tensor):
    """A tensor of the whole shape whose values lie in tiles, of which this process holds its own.

    The device it reports is that of its first tile where all tiles are in this process. In a process group it
    is the group's (the CPU, or this process's GPU with NCCL), wherever the tiles lie: gradient clipping groups
    tensors by device before it asks for their norms, and all ranks must ask in the same order.

    Attributes:
        tiling: the home of every tile in the world.
        local_tiles: this process's tiles, plain tensors in the tiling's order; may be empty.
        rank: this process's rank in ``process_group``.
    """

    tiling: TiledLayout
    local_tiles: tuple[torch.Tensor, ...]
    rank: int
    # Weak, since a group that outlives destroy_process_group() aborts the process at exit (its threads are never
    # joined), and parameters often live as long as the program.
    _group: weakref.ref[dist.ProcessGroup] | None

    # Values are handled below autograd, in __torch_dispatch__; nothing is to be done above it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Self],
        tiling: TiledLayout,
        local_tiles: Sequence[torch.Tensor],
        rank: int = 0,
        process_group: dist.ProcessGroup | None = None,
        *,
        dtype: torch.dtype | None = None,
        requires_grad: bool = False,
    ) -> Self:
        """Wrap tiles without copying them.

        Args:
            cls: the class to make.
            tiling: the home of every tile in the world.
            local_tiles: one tensor for each of the tiling's homes on ``rank``, in its order, of the shape of
                the region.
            rank: this process's rank in ``process_group``.
            process_group: the processes that hold the tiles; None where all of them are in this process.
            dtype: of the tensor; needed where no tile is local.
            requires_grad: whether autograd records operations on it.

        Raises:
            ParameterError: if number, shapes or dtypes of the tiles don't fit.
        """
        homes, tiles = tiling.local(rank), tuple(tile.detach() for tile in local_tiles)
        shapes, wanted = [list(tile.shape) for tile in tiles], [list(home.region.shape) for home in homes]
        if shapes != wanted:
            raise ParameterError(f"rank {rank} of {tiling} holds tiles of shapes {wanted}, but got {shapes}")
        if dtype is None and not tiles:
            raise ParameterError(f"rank {rank} holds no tile of {tiling}; pass dtype=")
        dtype = dtype or tiles[0].dtype
        if any(tile.dtype != dtype for tile in tiles):
            raise ParameterError(f"all tiles must have dtype {dtype}, but have {[tile.dtype for tile in tiles]}")
        if process_group is not None:
            device, group = wire_device(process_group), weakref.ref(process_group)
        else:
            device, group = tiles[0].device if tiles else torch.device("cpu"), None
        return cls._wrap(tiling, tiles, rank, group, dtype, device, requires_grad)

    @classmethod
    def _wrap(
        cls,
        tiling: TiledLayout,
        tiles: tuple[torch.Tensor, ...],
        rank: int,
        group: weakref.ref[dist.ProcessGroup] | None,
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool = False,
    ) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, tiling.shape, dtype=dtype, device=device, requires_grad=requires_grad
        )
        made.tiling, made.local_tiles, made.rank, made._group = tiling, tiles, rank, group
        return made

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes that hold the tiles; None where all of them are in this process.

        Raises:
            ParameterError: if ``torch.distributed`` has destroyed the group.
        """
        if self._group is None:
            return None
        group = self._group()
        if group is None or not is_open(group):
            raise ParameterError(
                f"the process group of a tiled tensor of shape {list(self.shape)} has been destroyed; call "
                "full_tensor() or parted.state_dict() before destroy_process_group()"
            )
        return group

    def lies_as(self, other: TiledTensor) -> bool:
        """Whether both have the same tiles in the same places, here and in all other processes."""
        same_tiling = self.tiling is other.tiling or self.tiling == other.tiling
        return same_tiling and self.rank == other.rank and self._group == other._group

    def with_tiles(self, tiles: Sequence[torch.Tensor], dtype: torch.dtype) -> Self:
        """A tensor of the same tiling that wraps other tiles, of the same shapes (which are not checked)."""
        return self._wrap(self.tiling, tuple(tiles), self.rank, self._group, dtype, self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a whitelisted operation tile by tile, or refuse it."""
        return dispatch(func, tuple(args), dict(kwargs or {}), cls)

    def full_tensor(self) -> torch.Tensor:
        """The whole value as a new plain tensor on this tensor's device, detached from autograd.

        Collective: every rank of the process group must call it, in the same order among collectives.

        Raises:
            ParameterError: if tiles are elsewhere and there is no process group.
        """
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return gather_tiles(self.tiling, self.local_tiles, self.rank, self.process_group, out)

    def _adopt(self, other: TiledTensor) -> None:
        """Become ``other``, sharing its tiles, and stay the same object with the same hooks."""
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.tiling, self.local_tiles = other.tiling, other.local_tiles
        self.rank, self._group = other.rank, other._group

    def _get_data(self) -> torch.Tensor:
        return self.detach()

    def _set_data(self, value: torch.Tensor) -> None:
        # The base class's setter would swap sizes and device of the wrapper and leave the old tiles in it.
        if not isinstance(value, TiledTensor):
            with torch.no_grad():
                value = from_full(value, self.tiling, self.rank, self.process_group)
        self._adopt(value)

    data = property(_get_data, _set_data)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        parameter = "Parameter containing:\n" if isinstance(self, nn.Parameter) else ""
        tiles = ", ".join(f"{home}{' (local)' if home.rank == self.rank else ''}" for home in self.tiling.tiles)
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"{parameter}TiledTensor(shape={list(self.shape)}, dtype={self.dtype}, tiles=[{tiles}]{grad})"

    def __format__(self, format_spec: str) -> str:
        return format(repr(self), format_spec)

    def _refuse(self, what: str) -> NoReturn:
        raise ParameterError(
            f"a tiled tensor of shape {list(self.shape)} cannot {what}; call tensor.full_tensor() (on every "
            "rank) or parted.state_dict() and use the plain tensors"
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("be deep-copied: the copy would have no place in the plan")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("be pickled: other processes hold other tiles")

    def numpy(self, *, force: bool = False) -> NoReturn:
        """Refused: the values don't lie in one piece."""
        self._refuse("become a NumPy array")

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse("become a NumPy array")

    def __dlpack__(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse("be exported through DLPack")

    def tolist(self) -> NoReturn:
        """Refused: the values don't lie in one process."""
        self._refuse("become a list")

    def data_ptr(self) -> NoReturn:
        """Refused: the values don't lie in one piece, and an extension must not write past a tile."""
        self._refuse("have one address")

    def share_memory_(self) -> NoReturn:
        """Refused: the values don't lie in one piece."""
        self._refuse("be moved to shared memory")


def from_full(
    full: torch.Tensor,
    tiling: TiledLayout,
    rank: int = 0,
    process_group: dist.ProcessGroup | None = None,
) -> TiledTensor:
    """Cut this process's tiles out of a whole tensor, as copies on the devices that the tiling names.

    A tensor on the meta device gives tiles of uninitialised memory, to be filled by ``load_state_dict``.

    Args:
        full: the whole value, plain or tiled in another way (then the call is collective over its group).
        tiling: the home of every tile in the world.
        rank: this process's rank in ``process_group``.
        process_group: the processes that hold the tiles; None where all of them are in this process.

    Raises:
        ParameterError: if the shapes differ.
    """
    return _tile(full, tiling, rank, process_group, share=False)


def _tile(
    full: torch.Tensor, tiling: TiledLayout, rank: int, group: dist.ProcessGroup | None, share: bool
) -> TiledTensor:
    if tuple(full.shape) != tiling.shape:
        raise ParameterError(f"a tensor of shape {list(full.shape)} cannot be cut by a tiling of {list(tiling.shape)}")
    if isinstance(full, TiledTensor):
        if full.process_group is None and len(full.local_tiles) == len(full.tiling.tiles) == 1:
            full = full.local_tiles[0]
        else:
            full, share = full.full_tensor(), True
    full, tiles = full.detach(), []
    for home in tiling.local(rank):
        if full.is_meta:
            tiles.append(torch.empty(home.region.shape, dtype=full.dtype, device=home.device))
            continue
        tile = cut(full, home.region)
        # A view would keep the whole storage alive, so only a tile that is everything may share it.
        is_everything = share and home.region.num_elements == full.numel()
        tiles.append(tile.to(home.device) if is_everything else tile.to(home.device, copy=True).contiguous())
    return TiledTensor(tiling, tiles, rank, group, dtype=full.dtype)


def retile_(
    parameter: nn.Parameter,
    tiling: TiledLayout,
    *,
    rank: int = 0,
    process_group: dist.ProcessGroup | None = None,
) -> nn.Parameter:
    """Re-home a parameter in place: the same object, from now on holding this process's tiles.

    Works on a plain parameter (each process cuts its own tiles; what is left is freed) and on one that is
    tiled already (collective over its old group). Its gradient, hooks, attributes, ``requires_grad`` and its
    places in modules and optimizers stay; optimizer state follows at the optimizer's next step. A loss
    computed from the plain parameter before cannot run backward any more: torch raises an error.

    Args:
        parameter: the parameter, plain or tiled.
        tiling: the home of every tile in the world.
        rank: this process's rank in ``process_group``.
        process_group: the processes that hold the tiles; None where all of them are in this process.

    Returns:
        The same parameter.

    Raises:
        ParameterError: if the shape differs, or something holds on to the old tensor: a loss that has not
            run backward, a view, a weak reference, or a subclass of ``Parameter`` with a meaning of its own.
    """
    if not isinstance(parameter, nn.Parameter) or type(parameter) not in (nn.Parameter, TiledTensor):
        raise ParameterError(f"a {type(parameter).__name__} cannot be re-homed in place; use a torch.nn.Parameter")
    _watch_optimizers()
    gradient = parameter.grad
    with torch.no_grad():
        tiled = _tile(parameter, tiling, rank, process_group, share=True)
        tiled_gradient = None if gradient is None else _tile(gradient, tiling, rank, process_group, share=True)
        if isinstance(parameter, TiledTensor):
            parameter.grad = None
            parameter._adopt(tiled)
        else:
            _become(parameter, tiled)
        parameter.grad = tiled_gradient
    return parameter


def _become(parameter: nn.Parameter, tiled: TiledTensor) -> None:
    """Turn a plain parameter into a tiled one without changing its identity."""
    new = nn.Parameter(tiled, requires_grad=parameter.requires_grad)
    vars(new).update(vars(parameter))
    hooks, late_hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    try:
        torch.utils.swap_tensors(parameter, new)
    except RuntimeError as error:
        raise ParameterError(
            f"a parameter of shape {list(tiled.shape)} cannot be re-homed: {error}. Run or free "
            "losses computed from it, and free views of it and weak references to it first"
        ) from error
    # The swap leaves the hooks' dictionaries in place, but autograd forgets them. Setting them again makes it
    # look at the same dictionaries, so that the handles given to the user still remove their hooks.
    for name, registered in (("_backward_hooks", hooks), ("_post_accumulate_grad_hooks", late_hooks)):
        if registered:
            setattr(parameter, name, None)
            setattr(parameter, name, registered)


@cache
def _watch_optimizers() -> None:
    """Have every optimizer, once for the process, look after its tiled parameters before it steps."""
    register_optimizer_step_pre_hook(before_step)


def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Refuse what cannot work before any state changes, and let state follow the tiles of its parameter.

    It looks at each parameter by itself, so that some may be stepped before the others. State is found whole where it
    was made before the first call (Adagrad makes it in its constructor) or came from a checkpoint, and in the old tiles
    after a change of plan.
    """
    classes = [base.__name__ for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim")]
    refused = next((name for name in classes if name in _REFUSED_OPTIMIZERS), None)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not isinstance(parameter, TiledTensor):
                continue
            if refused or group.get("fused"):
                raise ParameterError(
                    f"{refused or type(optimizer).__name__ + '(fused=True)'} cannot update a parameter of shape "
                    f"{list(parameter.shape)} tile by tile; optimizers known to work: {KNOWN_OPTIMIZERS}, with "
                    "fused=False"
                )
            state = optimizer.state.get(parameter, {})
            for key in [key for key, value in state.items() if _needs_retiling(key, value, parameter)]:
                state[key] = from_full(state[key], parameter.tiling, parameter.rank, parameter.process_group)


def _needs_retiling(key: str, value: object, parameter: TiledTensor) -> bool:
    if not isinstance(value, torch.Tensor) or key in _SCALAR_STATES or value.shape != parameter.shape:
        return False
    return not (isinstance(value, TiledTensor) and value.lies_as(parameter))
