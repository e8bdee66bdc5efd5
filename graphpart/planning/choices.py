"""What a user decides beside the model and the devices: one frozen value, checked where it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any, ParamSpec, TypedDict, TypeVar

from graphpart.cost.storage import ADAMW_BYTES_PER_ELEMENT
from graphpart.errors import ArgumentError
from graphpart.ir.degrees import Degrees, says_degrees
from graphpart.lower.wire_dtype import check_wire_dtype
from graphpart.order import SCHEDULES, Async
from graphpart.strategies import Recompute, check_recompute, check_strategy

AUTO = "auto"
ASYNC = "async"

ScheduleChoice = str | Async
"""``auto``, a name in :data:`graphpart.order.SCHEDULES`, ``async``, or an :class:`~graphpart.order.Async`."""


def check_schedule(choice: ScheduleChoice | None) -> None:
    """Raise an :class:`~graphpart.errors.ArgumentError` with the known names if a schedule's name is unknown."""
    names = (AUTO, *SCHEDULES, ASYNC)
    if choice is not None and not isinstance(choice, Async) and choice not in names:
        raise ArgumentError(
            f"there is no schedule {choice!r}; give {', '.join(map(repr, names))}, or a graphpart.Async"
        )


def _microbatches(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"num_microbatches={value!r}; it has to be a whole number from 1 up")


def _batch_norm(value: Any) -> None:
    if value not in ("barrier", "microbatch"):
        raise ArgumentError(f"batch_norm={value!r}; give 'barrier' or 'microbatch'")


def _deadline(value: Any) -> None:
    if value is not None and not (_is_number(value) and 0 < value < float("inf")):
        raise ArgumentError(f"deadline_s={value!r}; give a number of seconds above 0")


def _reserve(value: Any) -> None:
    if not (_is_number(value) and 0 <= value < 1):
        raise ArgumentError(f"memory_reserve={value!r}; give the part of each memory to leave free, in [0, 1)")


def _optimizer_bytes(value: Any) -> None:
    if not (_is_number(value) and 0 <= value < float("inf")):
        raise ArgumentError(
            f"optimizer_bytes_per_element={value!r}; give a number from 0 up: 8 for AdamW, 4 for SGD with momentum, "
            "0 for plain SGD"
        )


def _offload(value: Any) -> None:
    if not isinstance(value, bool):
        raise ArgumentError(f"offload={value!r}; give True or False")


def _sample_dims(value: Any) -> None:
    if value is None:
        return
    example = "a mapping from names of inputs to dimensions, such as {'args[0]': 1, 'mask': None}"
    if not isinstance(value, Mapping):
        raise ArgumentError(f"sample_dims={value!r}; give {example}")
    for name, dim in value.items():
        if not isinstance(name, str):
            raise ArgumentError(f"sample_dims names {name!r}; give {example}")
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 0):
            raise ArgumentError(f"sample_dims gives {name!r} dimension {dim!r}; give a number from 0 up, or None")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_CHECKS: Mapping[str, Callable[[Any], None]] = MappingProxyType(
    {
        "num_microbatches": _microbatches,
        "schedule": check_schedule,
        "batch_norm": _batch_norm,
        "sample_dims": _sample_dims,
        "deadline_s": _deadline,
        "wire_dtype": check_wire_dtype,
        "memory_reserve": _reserve,
        "optimizer_bytes_per_element": _optimizer_bytes,
        "recompute": check_recompute,
        "offload": _offload,
    }
)


class ChoiceKeywords(TypedDict, total=False):
    """The fields of :class:`Choices` as keywords, for type checkers."""

    strategy: Any
    strategy_options: Mapping[str, Any] | None
    num_microbatches: int
    schedule: ScheduleChoice | None
    batch_norm: str
    sample_dims: Mapping[str, int | None] | None
    wire_dtype: str | None
    memory_reserve: float
    optimizer_bytes_per_element: float
    recompute: Recompute
    offload: bool
    deadline_s: float | None


@dataclass(frozen=True)
class Choices:
    """What a user decides beside the model and the devices.

    :func:`graphpart.partition`, :func:`graphpart.plan`, the command line and plan files take the same ones.

    Attributes:
        strategy: how to split: a name (``auto``, ``layer``, ``batch``, …), degrees (``"dp4 tp8 pp2"``, or
            :func:`graphpart.degrees`), a placement by hand as a mapping from patterns over module paths to devices or
            constraints, or as a list of constraints (``pin``, ``split``, ``keep_whole``, ``colocate``), a
            :class:`graphpart.Placement`, or a function ``(graph, cluster, **options) -> Placement``. A plan keeps a
            name or degrees, and of anything else the placement.
        strategy_options: options of that one strategy, such as ``{"shard_parameters": True}`` for ``batch``.
        num_microbatches: parts of the batch, in time, so that devices work at once.
        schedule: in which order ``train_step`` runs them: ``gpipe``, ``1f1b``, ``interleaved``, ``zero-bubble``,
            ``list``, ``auto``, which compares these on the simulator, or ``async`` (or a :class:`graphpart.Async`),
            which updates weights while microbatches are under way and gives other numbers than one device. What it
            keeps in flight is what has to fit. None is ``auto`` for ``train_step``, while forecasts are of plain calls,
            which always go in GPipe's order and keep all microbatches.
        batch_norm: ``barrier`` (default, exact) or ``microbatch`` (each microbatch by its own statistics; running
            statistics deferred).
        sample_dims: per input name (``args[0]``, ``labels``), the dimension that runs over samples, or None if it has
            none; it is taken to be dimension 0 of inputs that share the batch size.
        wire_dtype: ``"bfloat16"`` or ``"float16"``: float32 activations, and their gradients, are cast to that between
            devices, which halves their bytes at the price of digits. Parameters, inputs and scalars stay exact.
        memory_reserve: part of each device's memory to leave free when planning, in ``[0, 1)``.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element to plan for: 8 for AdamW, 4 for SGD
            with momentum, 0 for plain SGD.
        recompute: what runs again for its backward instead of keeping its activations: ``"auto"`` (the model's own
            checkpoints, and what memory needs), ``"none"``, or patterns over module paths, such as
            ``["transformer.h.*"]``: each module that matches is one group.
        offload: whether what such groups read, which is all that they keep, waits for the backward in pinned host
            memory; for GPUs alone. Forecasts count it as if it stayed.
        deadline_s: how long a device waits for one message before it gives up, in seconds; None is as long as the plan
            says, or 600 s.

    Raises:
        ArgumentError: if a value is none that the field can have; it says what was given and what may be.
    """

    strategy: Any = AUTO
    strategy_options: Mapping[str, Any] | None = None
    num_microbatches: int = 1
    schedule: ScheduleChoice | None = None
    batch_norm: str = "barrier"
    sample_dims: Mapping[str, int | None] | None = None
    wire_dtype: str | None = None
    memory_reserve: float = 0.0
    optimizer_bytes_per_element: float = ADAMW_BYTES_PER_ELEMENT
    recompute: Recompute = "auto"
    offload: bool = False
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.strategy, str) and says_degrees(self.strategy):
            object.__setattr__(self, "strategy", Degrees.read(self.strategy))
        if isinstance(self.strategy, Degrees):
            object.__setattr__(self, "strategy", str(self.strategy))
        check_strategy(self.strategy, self.strategy_options)
        for name, check in _CHECKS.items():
            check(getattr(self, name))
        if not isinstance(self.recompute, str):
            object.__setattr__(self, "recompute", tuple(self.recompute))


DEFAULT_CHOICES = Choices()

_P = ParamSpec("_P")
_R = TypeVar("_R")


def takes_choices(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Show the fields of :class:`Choices` in the signature of a function that takes them as keywords."""
    own = signature(function)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shown = [Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields(Choices)]
    function.__signature__ = own.replace(parameters=[*named, *shown])  # type: ignore[attr-defined]
    return function


def differing(keywords: ChoiceKeywords) -> list[str]:
    """The names of keywords whose values are not the defaults of :class:`Choices`.

    Raises:
        TypeError: if there is no choice of such a name, as :class:`Choices` raises it.
    """
    for name in keywords:
        if name not in ChoiceKeywords.__annotations__:
            raise TypeError(f"Choices.__init__() got an unexpected keyword argument {name!r}")
    return [name for name, value in keywords.items() if value != getattr(DEFAULT_CHOICES, name)]
