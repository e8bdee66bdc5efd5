"""Strategies by name, and the options that each has of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from graphpart.errors import ArgumentError
from graphpart.ir.degrees import Degrees, says_degrees
from graphpart.ir.placement import Placement
from graphpart.strategies.batch import batch
from graphpart.strategies.by_hand.constraints import Constraint
from graphpart.strategies.feature import feature
from graphpart.strategies.free import free
from graphpart.strategies.hybrid import hybrid
from graphpart.strategies.layer import layer
from graphpart.strategies.memory.fit import Strategy
from graphpart.strategies.memory.terms import DEFAULT_TERMS
from graphpart.strategies.mesh import mesh
from graphpart.strategies.single import single
from graphpart.strategies.spatial import spatial

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "layer": layer,
        "single": single,
        "batch": batch,
        "feature": feature,
        "spatial": spatial,
        "hybrid": hybrid,
        "free": free,
    }
)
"""Every strategy that needs nothing but a graph, a cluster and the terms to count with."""


def strategy_named(name: str) -> Strategy:
    """The strategy of a name, or of degrees such as ``dp2 tp4``."""
    return STRATEGIES[name] if name in STRATEGIES else partial(mesh, degrees=Degrees.read(name))


def is_named(strategy: Any) -> bool:
    """Whether this is the name of a strategy, ``auto`` included, or says degrees."""
    return isinstance(strategy, str) and (strategy in ("auto", *STRATEGIES) or says_degrees(strategy))


def degrees_of(strategy: Any) -> Degrees | None:
    """The degrees that a strategy says; None for any other."""
    return Degrees.read(strategy) if isinstance(strategy, str) and says_degrees(strategy) else None


def check_devices(strategy: Any, num_devices: int) -> None:
    """Refuse degrees that are for another number of devices.

    Raises:
        ArgumentError: with the nearest that are for so many.
    """
    found = degrees_of(strategy)
    if found is not None:
        found.check(num_devices)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_FLAG = ("give True or False", _is_flag)
_COUNT = ("give a whole number from 1 up", _is_count)

OPTIONS: Mapping[str, Mapping[str, tuple[str, Callable[[Any], bool]]]] = MappingProxyType(
    {"layer": {"use_all_devices": _FLAG, "chunks": _COUNT}, "batch": {"shard_parameters": _FLAG}}
)
"""By strategy, its own options: what may be given, in words and as a check."""


def check_strategy(strategy: Any, options: Any) -> None:
    """Refuse what is no strategy, and options that are not the strategy's own.

    Args:
        strategy: a name, a placement, constraints or a function.
        options: of that strategy, by name; None for none.

    Raises:
        ArgumentError: with the names that there are.
    """
    by_hand = isinstance(strategy, (Placement, Mapping, list, tuple, Constraint))
    if degrees_of(strategy) is None and not is_named(strategy) and not by_hand and not callable(strategy):
        known = ", ".join(repr(name) for name in ("auto", *STRATEGIES))
        raise ArgumentError(
            f"there is no strategy {strategy!r}; give {known}, degrees such as 'dp2 tp4', "
            "or a mapping from patterns to devices"
        )
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise ArgumentError(f"strategy_options={options!r}; give a mapping, such as {{'shard_parameters': True}}")
    if options and (strategy == "auto" or by_hand):
        raise ArgumentError(f"strategy_options {sorted(options)} need the name of the strategy they are for")
    for option in options:
        if option in DEFAULT_TERMS.keywords:
            raise ArgumentError(
                f"strategy_options has {option!r}, which is a choice of its own; give {option}=… instead"
            )
        if isinstance(strategy, str):
            _check_option(strategy, option, options[option])


def _check_option(strategy: str, option: Any, value: Any) -> None:
    """Refuse an option that a strategy does not have, or a value that it cannot have."""
    own = OPTIONS.get(strategy, {})
    if option not in own:
        has = f"it has {', '.join(own)}" if own else "it has none"
        raise ArgumentError(f"strategy {strategy!r} has no option {option!r}; {has}")
    what, is_right = own[option]
    if not is_right(value):
        raise ArgumentError(f"strategy_options={{{option!r}: {value!r}}}; {what}")
