"""Compare a partitioned model with the plain one on the user's own input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from graphpart.errors import VerificationError
from graphpart.module.losses import projection
from graphpart.trace.tree import flatten, tensors_of, unflatten

if TYPE_CHECKING:
    from graphpart.module.partitioned import PartitionedModule

# Gradients this much smaller than the model's largest are differences of nearly equal numbers (a scale before a
# convolution and another BatchNorm has gradient 0 but for rounding), so they are measured against the largest instead.
FLOOR = 1e-2

MOST_ROUNDINGS = 100
"""A result may be off by so many times what one rounding of every parameter does to it."""

_NARROW = frozenset({"float16", "bfloat16"})


@dataclass(frozen=True)
class Report:
    """How far a partitioned model is from the plain one.

    Attributes:
        loss: loss of the partitioned model.
        plain_loss: loss of the plain model.
        differences: largest relative difference by what was compared: ``output 0``, ``gradient of h.0.weight``,
            ``buffer bn.running_mean``.
    """

    loss: float
    plain_loss: float
    differences: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """What differs most, and by how much."""
        return max(self.differences.items(), key=lambda item: item[1], default=("nothing", 0.0))

    def check(self, tolerance: float) -> None:
        """Raise where a difference exceeds the tolerance.

        Raises:
            VerificationError: naming what differs, and by how much.
        """
        bad = {name: d for name, d in self.differences.items() if not d <= tolerance}
        if bad:
            name, size = max(bad.items(), key=lambda item: item[1])
            raise VerificationError(
                f"{len(bad)} of {len(self.differences)} results differ from the plain model by more than {tolerance:g} "
                f"(relative); worst: {name} by {size:.3g}. If the model is random or changes between calls, this is "
                "expected; otherwise please report it with the model"
            )

    def __str__(self) -> str:
        name, size = self.worst
        return (
            f"loss {self.loss:.6g} (plain {self.plain_loss:.6g}); {len(self.differences)} results compared, "
            f"largest relative difference {size:.2g} ({name})"
        )


class _WithoutDropout(TorchFunctionMode):
    """Runs the plain model with every dropout switched off."""

    _DROPOUTS = frozenset({
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
        torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout, torch.native_dropout,
    })  # fmt: skip
    # Functions with dropout inside: where its probability is among the arguments, and what it is called.
    _INSIDE = {  # noqa: RUF012
        F.scaled_dot_product_attention: (4, "dropout_p"),
        F.multi_head_attention_forward: (10, "dropout_p"),
        **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), (5, "dropout")),
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in self._INSIDE:
            position, name = self._INSIDE[func]
            if name == "dropout" and isinstance(args[1], Tensor) and not args[1].is_floating_point():
                position += 1  # a packed sequence comes with its batch sizes
            if len(args) > position:
                args = (*args[:position], 0.0, *args[position + 1 :])
            elif name in kwargs:
                kwargs[name] = 0.0
        return func(*args, **kwargs)


def verify(
    parted: PartitionedModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss_fn: Callable[[Any], Tensor] | None = None,
    tolerance: float | None = None,
) -> Report:
    """Run the partitioned and the plain model, dropout off on both sides, and compare everything.

    Gradients and buffers of the model are left as they were. A gradient is measured on its own scale, but no finer than
    a hundredth of the largest gradient's (below float32: than the largest gradient's), and no finer than what rounding
    does to it: a gradient that is zero but for rounding (of a bias before BatchNorm) has no digits to compare.

    Args:
        parted: the partitioned model.
        args: positional arguments.
        kwargs: keyword arguments.
        loss_fn: turns the model's result into a scalar; by default its own loss, or else a fixed random
            :func:`~graphpart.module.losses.projection` of all its differentiable outputs.
        tolerance: largest relative difference allowed; by default 1e-4 in float32 and wider, 5e-2 below.

    Returns:
        What was compared and how it differs.

    Raises:
        VerificationError: if a difference exceeds the tolerance, or there is no scalar to differentiate.
    """
    loss_of = _checked(projection if loss_fn is None else loss_fn)
    before = {name: tensor.detach().clone() for name, tensor in parted.named_buffers()}
    names = [name for name, _ in parted.named_parameters()]
    with torch.enable_grad(), _without_channel_dropout(parted):
        with torch.random.fork_rng(devices=[]):  # so that what the model draws is drawn again
            plain = _run_plain(parted, _copies(args), _copies(kwargs), loss_of)
        with parted.without_dropout():
            result = parted(*args, **kwargs)
        assert parted.last_step is not None
        plan = parted.last_step.plan
        loss = loss_of(result)
        gradients = _gradients(loss, [p for p in parted.parameters() if p.requires_grad])
    state = parted._state
    ours = dict(zip([n for n in names if parted.get_parameter(n).requires_grad], gradients, strict=True))
    dtypes = {value.dtype for value in plan.graph.values.values()} | {wire.dtype for wire in plan.program.wires}
    narrow = not _NARROW.isdisjoint(dtypes)
    allowed = tolerance if tolerance is not None else 5e-2 if narrow else 1e-4
    ours_by_name: dict[str, Tensor | None] = {f"output {i}": x for i, x in enumerate(tensors_of(result))}
    for name, found in ours.items():
        ours_by_name[f"gradient of {name}"] = None if found is None else state.whole("", found)
    for name in plain.buffers:
        ours_by_name[f"buffer {name}"] = state.whole(name, parted.get_buffer(name))
    theirs = plain.by_name
    if only_one := sorted(ours_by_name.keys() ^ theirs.keys()):
        raise VerificationError(
            f"{only_one[0]} is there on one side alone: the model gives {len(tensors_of(result))} tensors here and "
            f"{len(tensors_of(plain.result))} on one device. Does its result depend on how often it was called?"
        )
    largest = largest_of(plain.gradients.values())
    floors = dict.fromkeys((f"gradient of {name}" for name in ours), largest if narrow else FLOOR * largest)
    differences = {n: _difference_or_none(a, theirs[n], floors.get(n, 0.0)) for n, a in ours_by_name.items()}
    if not all(d <= allowed for d in differences.values()):
        with torch.enable_grad(), _without_channel_dropout(parted):
            noise = _rounding(lambda nudged: _run_plain(parted, _copies(args), _copies(kwargs), loss_of, nudged))
        for name, size in noise.items():
            floor = max(floors.get(name, 0.0), MOST_ROUNDINGS * size / allowed if allowed else 0.0)
            differences[name] = _difference_or_none(ours_by_name[name], theirs[name], floor)
    with torch.no_grad():
        for name, tensor in parted.named_buffers():
            tensor.copy_(before[name])
    report = Report(float(loss.detach()), plain.loss, differences)
    report.check(allowed)
    return report


@contextmanager
def _without_channel_dropout(parted: PartitionedModule) -> Iterator[None]:
    """Dropout modules that tracing takes apart into a mask and a product are in eval mode inside."""
    found = [m for m in parted.modules() if isinstance(m, _DropoutNd) and m.training and not isinstance(m, nn.Dropout)]
    for module in found:
        module.training = False
    try:
        yield
    finally:
        for module in found:
            module.training = True


def _copies(arguments: Any) -> Any:
    """Arguments of its own for the plain model, which may change them in place."""
    leaves, spec = flatten(arguments)
    copied = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
    return unflatten(copied, spec)


@dataclass
class _Plain:
    result: Any
    loss: float
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]

    @property
    def by_name(self) -> dict[str, Tensor | None]:
        """All that is compared, by what a report calls it."""
        return {
            **{f"output {i}": tensor for i, tensor in enumerate(tensors_of(self.result))},
            **{f"gradient of {name}": gradient for name, gradient in self.gradients.items()},
            **{f"buffer {name}": buffer for name, buffer in self.buffers.items()},
        }


def _rounding(run: Callable[[bool], _Plain]) -> dict[str, float]:
    """How far each result moves when what goes in is rounded otherwise: what is zero but for rounding moves by itself.

    Args:
        run: the plain model, with parameters and inputs as they are, or each off by one rounding; what it draws at
            random is the same in both.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        as_it_is = run(False).by_name
        torch.manual_seed(0)
        nudged = run(True).by_name
    found = {}
    for name, one in as_it_is.items():
        other = nudged[name]
        if one is not None and other is not None and one.shape == other.shape and one.numel():
            size = float((one.detach() - other.detach()).abs().max()) if one.dtype != torch.bool else 0.0
            found[name] = size if isfinite(size) else 0.0
    return found


def _nudged(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor each element of which is off by one rounding, up or down."""
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    return tensor * (1 + torch.finfo(tensor.dtype).eps * signs.to(tensor.device, tensor.dtype))


class _Watched(nn.Module):
    """A model that says what its buffers are when it is through: it may have assigned new tensors to them."""

    buffers_after: dict[str, Tensor]

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.module(*args, **kwargs)
        self.buffers_after = {name: buffer.detach() for name, buffer in self.module.named_buffers()}
        return result


def _checked(loss_fn: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """A loss function that says what is wrong with what it gives."""
    if not callable(loss_fn):
        raise VerificationError(f"loss_fn={loss_fn!r} cannot be called; give a function of the model's result")

    def loss_of(result: Any) -> Tensor:
        loss = loss_fn(result)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise VerificationError(f"loss_fn gave {what}; it has to give one number, such as a mean or a sum")
        return loss

    return loss_of


def _run_plain(
    parted: PartitionedModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss_of: Callable[[Any], Tensor],
    nudged: bool = False,
) -> _Plain:
    """The plain model on one device, with copies of parameters and buffers; nudged ones are off by one rounding."""
    module, state = parted.module, parted._state
    device = next((x.device for x in tensors_of((args, kwargs))), torch.device("cpu"))
    parameters = {
        name: state.whole(name, p).detach().to(device).clone().requires_grad_(p.requires_grad)
        for name, p in module.named_parameters()
    }
    buffers = {name: state.whole(name, b).detach().to(device).clone() for name, b in module.named_buffers()}
    if nudged:
        generator = torch.Generator().manual_seed(0)
        parameters = {n: _nudged(p.detach(), generator).requires_grad_(p.requires_grad) for n, p in parameters.items()}
    watched = _Watched(module)
    tensors = {f"module.{name}": tensor for name, tensor in {**parameters, **buffers}.items()}
    with _WithoutDropout():
        result = torch.func.functional_call(watched, tensors, args, dict(kwargs), tie_weights=True)
        loss = loss_of(result)
    wanted = [name for name, p in parameters.items() if p.requires_grad]
    gradients = _gradients(loss, [parameters[name] for name in wanted])
    return _Plain(result, float(loss.detach()), dict(zip(wanted, gradients, strict=True)), watched.buffers_after)


def _gradients(loss: Tensor, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not parameters or not loss.requires_grad:
        return (None,) * len(parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return tuple(g.to_dense() if g is not None and g.is_sparse else g for g in found)


def _difference_or_none(a: Tensor | None, b: Tensor | None, floor: float) -> float:
    if a is None or b is None:
        other = a if a is not None else b
        return 0.0 if other is None or not other.any() else float("inf")
    return relative_difference(a, b, floor)


def largest_of(gradients: Iterable[Tensor | None]) -> float:
    """The largest number, by its size, among gradients; what is no number is left out."""
    found = (g.detach().abs().nan_to_num(0.0, 0.0, 0.0) for g in gradients if g is not None and g.numel())
    return max((float(g.max()) for g in found), default=0.0)


def relative_difference(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """``max |a - b| / max(max |b|, floor)`` in float64; infinite where shapes differ or one side alone is no number."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    wide = torch.complex128 if a.is_complex() else torch.float64
    wide_a, wide_b = a.detach().cpu().to(wide), b.detach().cpu().to(wide)
    if a.numel() == 0 or torch.equal(wide_a, wide_b):
        return 0.0
    if not torch.equal(wide_a.isfinite(), wide_b.isfinite()):
        return float("inf")
    wide_a, wide_b = wide_a.nan_to_num(), wide_b.nan_to_num()
    scale = max(float(wide_b.abs().max()), floor, torch.finfo(torch.float32).tiny)
    return float((wide_a - wide_b).abs().max()) / scale
