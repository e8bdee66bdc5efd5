"""What may be given to ``partition()`` and ``plan()`` beside a model and devices, checked before anything is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from types import MappingProxyType
from typing import Any

from graphpart.errors import MicrobatchError, PlacementError, PlanError, TraceError
from graphpart.ir.graph import Graph
from graphpart.lower.wire_dtype import check_wire_dtype
from graphpart.planning.fused_step import check_schedule
from graphpart.planning.make import make_plan
from graphpart.strategies import check_recompute


def check_choices(choices: Mapping[str, Any]) -> None:
    """Refuse what is no choice, by the name of its argument.

    Strategies and their options are checked where the graph is known.

    Args:
        choices: value by name of argument.

    Raises:
        GraphpartError: a subclass; it says what was given and what may be.
    """
    for name, value in choices.items():
        if name in _CHECKS:
            _CHECKS[name](value)


def check_alone(plan: Any, choices: Mapping[str, Any]) -> None:
    """Refuse choices beside a plan that has made them already: they would be of no effect.

    Args:
        plan: what was given as a plan; None for nothing.
        choices: value by name of argument.

    Raises:
        PlanError: naming those that are not their defaults.
    """
    if plan is None:
        return
    defaults = signature(make_plan).parameters
    given = [n for n, value in choices.items() if value != (defaults[n].default if n in defaults else None)]
    if given:
        names = ", ".join(given)
        raise PlanError(
            f"the plan says already what {names} would choose anew; leave {'it' if len(given) == 1 else 'them'} out, "
            f"or plan again: graphpart.plan(model, devices, args, {given[0]}=…)"
        )


def check_batch(graph: Graph) -> None:
    """Refuse to plan for no samples at all.

    Raises:
        MicrobatchError: naming the input.
    """
    for source in graph.inputs:
        if graph.sample_dims.get(source.value.name) is not None and 0 in source.value.shape:
            raise MicrobatchError(
                f"the input {source.names[0]!r} is {list(source.value.shape)}, and a plan cannot be made by an empty "
                "batch; plan, or make the first call, with one sample or more"
            )


def _microbatches(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MicrobatchError(f"num_microbatches={value!r}; it has to be a whole number from 1 up")


def _batch_norm(value: Any) -> None:
    if value not in ("barrier", "microbatch"):
        raise PlanError(f"batch_norm={value!r}; give 'barrier' or 'microbatch'")


def _deadline(value: Any) -> None:
    if value is not None and not (_is_number(value) and 0 < value < float("inf")):
        raise PlanError(f"deadline_s={value!r}; give a number of seconds above 0")


def _reserve(value: Any) -> None:
    if not (_is_number(value) and 0 <= value < 1):
        raise PlacementError(f"memory_reserve={value!r}; give the part of each memory to leave free, in [0, 1)")


def _optimizer_bytes(value: Any) -> None:
    if not (_is_number(value) and 0 <= value < float("inf")):
        raise PlanError(
            f"optimizer_bytes_per_element={value!r}; give a number from 0 up: 8 for AdamW, 4 for SGD with momentum, "
            "0 for plain SGD"
        )


def _offload(value: Any) -> None:
    if not isinstance(value, bool):
        raise PlanError(f"offload={value!r}; give True or False")


def _sample_dims(value: Any) -> None:
    if value is None:
        return
    example = "a mapping from names of inputs to dimensions, such as {'args[0]': 1, 'mask': None}"
    if not isinstance(value, Mapping):
        raise TraceError(f"sample_dims={value!r}; give {example}")
    for name, dim in value.items():
        if not isinstance(name, str):
            raise TraceError(f"sample_dims names {name!r}; give {example}")
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 0):
            raise TraceError(f"sample_dims gives {name!r} dimension {dim!r}; give a number from 0 up, or None")


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
