"""Where the tiles of a parameter lie, and how they are cut, put together and exchanged."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from graphpart.errors import ParameterError
from graphpart.ir.region import Intervals, Region
from graphpart.runtime.executors.peer_faults import faults_named
from graphpart.runtime.executors.process_group import wire_device
from graphpart.runtime.kernels.bridges import slice_region

_NORMS = "this process put numbers of all processes together (norms and checks for infinities are collective)"


@dataclass(frozen=True, slots=True)
class TileHome:
    """Where one tile lives: a placement's :class:`~graphpart.ir.placement.Shard`, by process and torch device.

    Attributes:
        region: the part of the tensor that the tile holds.
        rank: the process that owns it, counted within the tensor's process group.
        device: the torch device it lies on there, such as ``"cuda:1"``.
    """

    region: Region
    rank: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.region}@rank{self.rank}:{self.device}"


@dataclass(frozen=True)
class TiledLayout:
    """How a tensor is spread over processes and devices.

    The tiles are disjoint and cover the tensor. Their order is part of the tiling and must be the same on
    every rank: sums over tiles run in it, which is what makes a norm the same bits everywhere.

    Attributes:
        shape: shape of the whole tensor.
        tiles: the home of every tile in the world, in canonical order.

    Raises:
        ParameterError: if the tiles overlap, leave something out, or reach outside the shape.
    """

    shape: tuple[int, ...]
    tiles: tuple[TileHome, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "tiles", tuple(self.tiles))
        _check_cover(self.shape, self.tiles)

    @classmethod
    def whole(cls, shape: Sequence[int], rank: int = 0, device: str = "cpu") -> TiledLayout:
        """One tile that holds everything."""
        return cls(tuple(shape), (TileHome(Region.full(shape), rank, device),))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that own a tile, ascending."""
        return tuple(sorted({tile.rank for tile in self.tiles}))

    def local(self, rank: int) -> tuple[TileHome, ...]:
        """The homes of the tiles that ``rank`` owns, in canonical order."""
        return tuple(tile for tile in self.tiles if tile.rank == rank)

    def __str__(self) -> str:
        return f"{len(self.tiles)} tiles of {list(self.shape)}: " + ", ".join(map(str, self.tiles))


def _check_cover(shape: tuple[int, ...], tiles: tuple[TileHome, ...]) -> None:
    """Count the tiles over each cell of the coarsest grid that all runs respect; each count must be one."""
    if not tiles:
        raise ParameterError(f"a tiling of shape {list(shape)} needs at least one tile")
    whole = Region.full(shape)
    for tile in tiles:
        if len(tile.region.dims) != len(shape) or not tile.region <= whole:
            raise ParameterError(f"tile {tile} does not lie in a tensor of shape {list(shape)}")
        if whole and not tile.region:
            raise ParameterError(f"tile {tile} of a tensor of shape {list(shape)} is empty; leave it out")
    edges = [
        sorted({0, extent, *(at for tile in tiles for run in tile.region.dims[dim].runs for at in run)})
        for dim, extent in enumerate(shape)
    ]
    counts = np.zeros([len(edge) - 1 for edge in edges], dtype=np.int32)
    for tile in tiles:
        cells = [
            [cell for start, stop in dim.runs for cell in range(bisect_left(edge, start), bisect_left(edge, stop))]
            for dim, edge in zip(tile.region.dims, edges, strict=True)
        ]
        # np.ix_ turns an empty list into an index of floats; an empty tile covers no cell anyway.
        if all(cells):
            counts[np.ix_(*cells)] += 1
    wrong = np.argwhere(counts != 1)
    if len(wrong):
        element = [edge[cell] for edge, cell in zip(edges, wrong[0], strict=True)]
        raise ParameterError(
            f"the tiles of a tensor of shape {list(shape)} must cover it once, but element {element} is in "
            f"{int(counts[tuple(wrong[0])])} of the {len(tiles)} tiles"
        )


@lru_cache(maxsize=1024)
def _indices(dim: Intervals) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in dim.runs])


def cut(full: torch.Tensor, region: Region) -> torch.Tensor:
    """The part of ``full`` that ``region`` names: a view where every dimension is one run, else a copy."""
    return slice_region(full, [wanted.runs for wanted in region.dims])


def paste(full: torch.Tensor, region: Region, tile: torch.Tensor) -> None:
    """Write ``tile`` into the part of ``full`` that ``region`` names."""
    scattered = [dim for dim, wanted in enumerate(region.dims) if len(wanted.runs) > 1]
    target = full
    for dim, wanted in enumerate(region.dims):
        if len(wanted.runs) == 1:
            start, stop = wanted.runs[0]
            target = target.narrow(dim, start, stop - start)
    if not scattered:
        target.copy_(tile)
    elif len(scattered) == 1:
        target.index_copy_(scattered[0], _indices(region.dims[scattered[0]]).to(full.device), tile)
    else:
        num_dims = len(region.dims)
        full[
            tuple(
                _indices(wanted).to(full.device).reshape([-1 if at == dim else 1 for at in range(num_dims)])
                for dim, wanted in enumerate(region.dims)
            )
        ] = tile


def gather_tiles(
    tiling: TiledLayout,
    local_tiles: Sequence[torch.Tensor],
    rank: int,
    group: dist.ProcessGroup | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill ``out``, a plain tensor of the whole shape, with every tile; collective over ``group``.

    Tiles travel one by one in canonical order, as bytes, so that every dtype arrives bit for bit.
    """
    need_all_local(tiling, rank, group)
    mine = iter(local_tiles)
    for home in tiling.tiles:
        tile = next(mine) if home.rank == rank else None
        if group is not None and home.region.num_elements:
            tile = _broadcast(tile, home, out.dtype, group)
        if tile is not None and tile.numel():
            paste(out, home.region, tile.to(out.device))
    return out


def need_all_local(tiling: TiledLayout, rank: int, group: dist.ProcessGroup | None) -> None:
    """Refuse to combine tiles of which some are elsewhere when there is no group to ask."""
    if group is None and tiling.ranks != (rank,):
        raise ParameterError(
            f"rank {rank} does not hold all tiles of a tensor of shape {list(tiling.shape)} (ranks "
            f"{list(tiling.ranks)} do), and it has no process group to fetch them; pass process_group="
        )


def gather_scalars(
    partials: Sequence[Sequence[torch.Tensor]],
    tilings: Sequence[TiledLayout],
    rank: int,
    group: dist.ProcessGroup | None,
    carrier: torch.dtype = torch.float64,
) -> list[list[torch.Tensor]]:
    """One scalar per tile of the world, for several tensors, from one scalar per local tile.

    A library all-reduce adds in its own order; one all-gather lets every rank add in the tiling's.

    Args:
        partials: per tensor, a 0-dim tensor for each local tile.
        tilings: per tensor, its tiling.
        rank: this process's rank in ``group``.
        group: whom to ask; None where all tiles are local.
        carrier: dtype the scalars travel in, the same on every rank and wide enough for all of them.

    Returns:
        Per tensor, a 0-dim tensor for each tile in canonical order: as given where there is no group, else in
        the carrier's dtype on the CPU or the group's device.
    """
    for tiling in tilings:
        need_all_local(tiling, rank, group)
    if group is None:
        return [list(scalars) for scalars in partials]
    homes = [home for tiling in tilings for home in tiling.tiles]
    flat = iter([scalar for scalars in partials for scalar in scalars])
    wire = wire_device(group)
    packed = torch.zeros(len(homes), dtype=carrier, device=wire)
    for slot, home in enumerate(homes):
        if home.rank == rank:
            packed[slot] = next(flat).to(wire)
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    with faults_named(_NORMS, 0):
        dist.all_gather(gathered, packed, group=group)
    scalars = iter([gathered[home.rank][slot] for slot, home in enumerate(homes)])
    return [[next(scalars) for _ in tiling.tiles] for tiling in tilings]


def maximum_over_ranks(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The largest of every rank's value (a maximum doesn't depend on the order), on the value's device."""
    found = value.detach().to(wire_device(group), copy=True)
    with faults_named(_NORMS, 0):
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found.to(value.device)


def _broadcast(tile: torch.Tensor | None, home: TileHome, dtype: torch.dtype, group: dist.ProcessGroup) -> torch.Tensor:
    wire = wire_device(group)
    if tile is None:
        payload = torch.empty(home.region.num_elements * dtype.itemsize, dtype=torch.uint8, device=wire)
    else:
        payload = tile.to(wire).contiguous().reshape(-1).view(torch.uint8)
    dist.broadcast(payload, group=group, group_src=home.rank)
    return cast(torch.Tensor, payload.view(dtype).reshape(home.region.shape))


def is_open(group: dist.ProcessGroup) -> bool:
    """Whether ``torch.distributed`` still knows the group."""
    try:
        dist.get_backend(group)
    except ValueError:
        return False
    return True
