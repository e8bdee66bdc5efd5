"""What may be done to tiled tensors: the whitelist behind
:class:`graphpart.runtime.parameters.tiled_tensor.TiledTensor`.

An operation is run tile by tile only where that gives what it gives on the whole tensor. All others are
refused by name: running them on each tile made optimizers such as Muon silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from math import inf
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from graphpart.errors import ParameterError
from graphpart.runtime.parameters.layout import cut, gather_scalars, maximum_over_ranks

if TYPE_CHECKING:
    from graphpart.runtime.parameters.tiled_tensor import TiledTensor

KNOWN_OPTIMIZERS = "Adadelta, Adagrad, Adam, AdamW, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop, SGD"

# Also where this version of torch doesn't tag them as pointwise. Names without the in-place underscore.
_TILEWISE = frozenset(
    """zeros_like ones_like empty_like full_like clone detach alias lift_fresh _to_copy copy fill zero masked_fill clamp
    clamp_min clamp_max add sub mul div neg pow sqrt rsqrt reciprocal abs sign sgn addcmul addcdiv lerp maximum minimum
    logical_and logical_or logical_not eq ne lt le gt ge isnan isinf exp square relu nan_to_num""".split()  # noqa: SIM905
)
_FOREACH = frozenset(
    """abs add addcdiv addcmul ceil clamp_max clamp_min clone copy div exp floor frac lerp maximum minimum mul neg pow
    reciprocal round rsqrt sigmoid sign sqrt sub tanh trunc zero""".split()  # noqa: SIM905
)
_NEW = {"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"}
# Reductions to one number, and how two tiles' numbers make one.
_FOLDS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "all": torch.logical_and,
    "any": torch.logical_or,
    "amax": torch.maximum,
    "amin": torch.minimum,
    "max": torch.maximum,
    "min": torch.minimum,
}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cls: type[TiledTensor]) -> Any:
    """Run ``func`` on tiled tensors, exactly or not at all.

    Args:
        func: an ATen operator overload.
        args: its positional arguments, with at least one ``cls`` in them or in a list in them.
        kwargs: its keyword arguments.
        cls: the class of tiled tensors.

    Raises:
        ParameterError: if the operation has no exact meaning tile by tile.
    """
    name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
    if name.startswith("_foreach_"):
        if name == "_foreach_norm":
            return _foreach_norm(func, cls, *args, **kwargs)
        if name.removeprefix("_foreach_").removesuffix("_") in _FOREACH:
            return _foreach(func, args, kwargs, cls)
    elif name == "_amp_foreach_non_finite_check_and_unscale_":
        return _unscale(func, args[0], args[1], args[2], cls)
    elif name in _NEW:
        return _new(func, args, kwargs)
    elif name in ("linalg_vector_norm", "norm"):
        return _norm(func, args, kwargs)
    elif name == "equal":
        return _equal(func, args, cls)
    elif name == "index_put_" and _is_masked_fill(args, kwargs, cls):
        return _tilewise(torch.ops.aten.masked_fill_.Tensor, (args[0], args[1][0], args[2]), {}, cls)
    elif name == "is_same_size":
        return args[0].shape == args[1].shape
    elif name in _FOLDS and _is_whole_reduction(func, args, kwargs):
        return _reduce(func, name, args, kwargs)
    elif name.removesuffix("_") in _TILEWISE or _is_pointwise(func):
        return _tilewise(func, args, kwargs, cls)
    refuse(func, _first_tiled((*args, *kwargs.values()), cls))


def _is_masked_fill(args: tuple[Any, ...], kwargs: dict[str, Any], cls: type[TiledTensor]) -> bool:
    """Whether an ``index_put_`` is ``tensor[mask] = number``, which Rprop uses and is pointwise."""
    tensor, indices, value = args[:3]
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    mask = indices[0] if len(indices) == 1 else None
    is_mask = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == tensor.shape
    return isinstance(tensor, cls) and is_mask and value.dim() == 0 and not accumulate


def refuse(func: Any, tensor: TiledTensor, why: str = "it has no exact meaning tile by tile") -> NoReturn:
    """Raise the error that names the operation, the tensor and the way out."""
    raise ParameterError(
        f"{func} is refused on a tiled tensor of shape {list(tensor.shape)} in {len(tensor.tiling.tiles)} tiles: "
        f"{why}. Call tensor.full_tensor() (on every rank) or parted.state_dict() for the whole value. Optimizers "
        f"known to work: {KNOWN_OPTIMIZERS}, with fused=False"
    )


def _is_pointwise(func: Any) -> bool:
    # Random numbers would differ from those drawn for the whole tensor.
    return torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags


def _first_tiled(values: Sequence[Any], cls: type[TiledTensor]) -> TiledTensor:
    for value in values:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, cls):
                return item
    raise AssertionError("dispatched without a tiled tensor")


@cache
def _outputs(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that the operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that the operation writes to."""
    given = [args[i] if i < len(args) else kwargs.get(name) for i, name in _outputs(func)]
    return [value for value in given if value is not None]


def _phantom(value: torch.Tensor) -> torch.Tensor:
    """A stand-in for the tile of a tensor that has none here; shows which dtype a result has."""
    return torch.ones((1,) * value.dim(), dtype=value.dtype)


def _pieces(value: Any, like: TiledTensor, func: Any, cls: type[TiledTensor]) -> list[Any]:
    """What each tile of ``like`` is combined with, where the whole is combined with ``value``."""
    if isinstance(value, cls):
        if not value.lies_as(like):
            refuse(func, like, f"its other operand of shape {list(value.shape)} is tiled in another way")
        return list(value.local_tiles) or [_phantom(value)]
    if not isinstance(value, torch.Tensor):
        return [value] * (len(like.local_tiles) or 1)
    if value.dim() == 0:
        # A scalar on the CPU may be combined with any device; one on an accelerator must be there.
        return [value if value.device.type == "cpu" else value.to(t.device) for t in like.local_tiles] or [value.cpu()]
    try:
        whole = value.expand(like.shape)
    except RuntimeError:
        refuse(func, like, f"its other operand has shape {list(value.shape)}")
    parts = [cut(whole, home.region) for home in like.tiling.local(like.rank)]
    if value.device == like.device:
        parts = [part.to(tile.device) for part, tile in zip(parts, like.local_tiles, strict=True)]
    return parts or [torch.ones((1,) * like.dim(), dtype=value.dtype)]


def _tilewise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cls: type[TiledTensor]) -> Any:
    like = _first_tiled((*args, *kwargs.values()), cls)
    written = _written(func, args, kwargs)
    if any(not isinstance(value, cls) for value in written):
        refuse(func, like, "its result would go into a plain tensor")
    device = kwargs.pop("device", None)
    if device is not None and torch.device(device) != like.device:
        refuse(func, like, f"the plan decides where tiles lie, so it cannot move to {device}")
    rows = zip(*[_pieces(value, like, func, cls) for value in (*args, *kwargs.values())], strict=True)
    num_args = len(args)
    results = [func(*row[:num_args], **dict(zip(kwargs, row[num_args:], strict=True))) for row in rows]
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    if isinstance(results[0], tuple):
        return tuple(_wrap(like, parts) for parts in zip(*results, strict=True))
    return _wrap(like, results)


def _wrap(like: TiledTensor, results: Sequence[torch.Tensor]) -> TiledTensor:
    return like.with_tiles(results[: len(like.local_tiles)], results[0].dtype)


def _new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    like, size = args[0], tuple(args[1])
    if size != tuple(like.shape):
        # Nothing of the parameter is in the result, and it is no tensor of the plan: a plain one.
        return func(torch.empty(0, dtype=like.dtype, device=like.device), *args[1:], **kwargs)
    rest = args[3:] if func.overloadpacket.__name__ == "new_empty_strided" else args[2:]
    make = getattr(torch, func.overloadpacket.__name__.removeprefix("new_").removesuffix("_strided"))
    dtype = kwargs.get("dtype") or like.dtype
    return like.with_tiles([make(t.shape, *rest, dtype=dtype, device=t.device) for t in like.local_tiles], dtype)


# --- reductions: one scalar a tile, folded in the tiling's order ---------------------------------------------


def _is_whole_reduction(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the operation reduces the whole tensor to one number."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # max and min have overloads that also return indices, and some that are pointwise.
    if len(func._schema.returns) != 1 or "other" in names or "out" in names or given.get("keepdim"):
        return False
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    num_dims = args[0].dim()
    return not dims or sorted(dim % max(1, num_dims) for dim in dims) == list(range(num_dims))


def _partials(
    tensor: TiledTensor, func: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[list[torch.Tensor], torch.dtype]:
    found = [func(tile) for tile in tensor.local_tiles]
    return found, (found[0] if found else func(_phantom(tensor))).dtype


def _fold(
    scalars: Sequence[torch.Tensor],
    fold: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    before: Callable[[torch.Tensor], torch.Tensor] = lambda scalar: scalar,
    after: Callable[[torch.Tensor], torch.Tensor] = lambda scalar: scalar,
) -> torch.Tensor:
    """Fold in order, in double precision; a single tile's scalar comes back bit for bit."""
    if len(scalars) == 1:
        return scalars[0].to(device, dtype)
    return after(reduce(fold, [before(scalar.to(device, _carrier(dtype))) for scalar in scalars])).to(dtype)


def _carrier(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else torch.int64


def _reduce(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    tensor = args[0]
    if tensor.is_complex():
        refuse(func, tensor, "complex reductions are not supported")
    partials, dtype = _partials(tensor, lambda tile: func(tile, *args[1:], **kwargs))
    (scalars,) = gather_scalars([partials], [tensor.tiling], tensor.rank, tensor.process_group, _carrier(dtype))
    if name == "mean" and len(scalars) > 1:
        homes = tensor.tiling.tiles
        scalars = [s.double() * (t.region.num_elements / tensor.numel()) for s, t in zip(scalars, homes, strict=True)]
    return _fold(scalars, _FOLDS[name], dtype, tensor.device)


def _norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    tensor = args[0]
    if not _is_whole_reduction(func, args, kwargs):
        refuse(func, tensor, "only the norm of the whole tensor can be put together from tiles")
    order = args[1] if len(args) > 1 else kwargs.get("ord", kwargs.get("p", 2))
    return _norms([tensor], 2 if order is None else order, kwargs.get("dtype"))[0]


def _foreach_norm(
    func: Any, cls: type[TiledTensor], tensors: Sequence[torch.Tensor], ord: float = 2, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    norms: list[Any] = [None] * len(tensors)
    groups: dict[int, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, cls):
            groups.setdefault(id(tensor.process_group), []).append(index)
        else:
            norms[index] = func([tensor], ord, dtype=dtype)[0]
    for indices in groups.values():
        tiled: list[Any] = [tensors[index] for index in indices]
        for index, norm in zip(indices, _norms(tiled, ord, dtype), strict=True):
            norms[index] = norm
    return norms


def _norms(tensors: Sequence[TiledTensor], order: float, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Norms of several tensors of one process group, in a single exchange."""
    order = float(order)
    found = [_partials(tensor, lambda t: torch.linalg.vector_norm(t, order, dtype=dtype)) for tensor in tensors]
    scalars = gather_scalars(
        [partials for partials, _ in found],
        [tensor.tiling for tensor in tensors],
        tensors[0].rank,
        tensors[0].process_group,
    )
    return [_fold_norm(scalars[i], order, found[i][1], tensor.device) for i, tensor in enumerate(tensors)]


def _fold_norm(scalars: Sequence[torch.Tensor], order: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if order in (0, 1):
        return _fold(scalars, torch.add, dtype, device)
    if order in (inf, -inf):
        return _fold(scalars, torch.maximum if order > 0 else torch.minimum, dtype, device)
    if order == 2:
        return _fold(scalars, torch.add, dtype, device, torch.square, torch.sqrt)
    return _fold(scalars, torch.add, dtype, device, lambda s: s**order, lambda s: s ** (1 / order))


def _equal(func: Any, args: tuple[Any, ...], cls: type[TiledTensor]) -> bool:
    like = _first_tiled(args, cls)
    if args[0].shape != args[1].shape:
        return False
    pairs = list(zip(*(_pieces(value, like, func, cls) for value in args), strict=True))[: len(like.local_tiles)]
    verdicts = [torch.tensor(int(torch.equal(one, other))) for one, other in pairs]
    (scalars,) = gather_scalars([verdicts], [like.tiling], like.rank, like.process_group, torch.int64)
    return all(bool(scalar) for scalar in scalars)


# --- operations on lists of tensors ---------------------------------------------------------------------------


def _foreach(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cls: type[TiledTensor]) -> Any:
    """Flatten the lists into lists of tiles, one call for each device, and gather the results again."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    lists = {name: value for name, value in given.items() if isinstance(value, (list, tuple))}
    for value in given.values():
        if isinstance(value, cls):
            refuse(func, value, "it is no scalar that could be sent to every tile")
    length = len(next(iter(lists.values())))
    likes = [next((v[i] for v in lists.values() if isinstance(v[i], cls)), None) for i in range(length)]
    for written in _written(func, args, kwargs):
        for tensor, like in zip(written, likes, strict=True):
            if like is not None and not isinstance(tensor, cls):
                refuse(func, like, "its result would go into a plain tensor")
    flat: dict[str, list[Any]] = {name: [] for name in lists}
    origins: list[int] = []
    for i, like in enumerate(likes):
        for name, values in lists.items():
            flat[name] += [values[i]] if like is None else _pieces(values[i], like, func, cls)
        origins += [i] * (1 if like is None else max(1, len(like.local_tiles)))
    results = _run_by_device(func, given, flat, origins)
    if results is None:
        return None
    grouped: list[list[torch.Tensor]] = [[] for _ in range(length)]
    for origin, result in zip(origins, results, strict=True):
        grouped[origin].append(result)
    return [parts[0] if like is None else _wrap(like, parts) for like, parts in zip(likes, grouped, strict=True)]


def _run_by_device(
    func: Any, given: dict[str, Any], flat: dict[str, list[Any]], origins: list[int]
) -> list[Any] | None:
    tensors = next(column for column in flat.values() if isinstance(column[0], torch.Tensor))
    by_device: dict[torch.device, list[int]] = {}
    for at, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(at)
    results: list[Any] = [None] * len(tensors)
    for device, chosen in by_device.items():
        call = dict(given)
        for name, value in given.items():
            if name in flat:
                call[name] = [flat[name][at] for at in chosen]
            elif isinstance(value, torch.Tensor) and value.dim() == 1:  # one number for each tensor of the lists
                call[name] = value[[origins[at] for at in chosen]]
            elif isinstance(value, torch.Tensor) and value.device.type != "cpu":
                call[name] = value.to(device)
        names = [argument.name for argument in func._schema.arguments if not argument.kwarg_only]
        positional = [call.pop(name) for name in names if name in call]
        returned = func(*positional, **call)
        if returned is None:
            results = []
        else:
            for at, result in zip(chosen, returned, strict=True):
                results[at] = result
    return results or None


def _unscale(
    func: Any, grads: Sequence[torch.Tensor], found: torch.Tensor, scale: torch.Tensor, cls: type[TiledTensor]
) -> None:
    """Unscale gradients for ``GradScaler``; every rank learns whether any tile anywhere is not finite."""
    tiled = [grad for grad in grads if isinstance(grad, cls)]
    tiles = [t for grad in grads for t in (grad.local_tiles if isinstance(grad, cls) else (grad,))]
    for device in dict.fromkeys(tile.device for tile in tiles):
        here = torch.zeros_like(found, device=device)
        func([tile for tile in tiles if tile.device == device], here, scale.to(device))
        found.copy_(torch.maximum(found, here.to(found.device)))
    for group in dict.fromkeys(grad.process_group for grad in tiled):
        if group is not None:
            found.copy_(maximum_over_ranks(found, group))
