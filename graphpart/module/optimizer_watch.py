"""Processes step their own parts of one model, each with an optimizer of its own: these have to be alike."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from graphpart.runtime.executors.fingerprint import CALL, Fact, FingerprintPart, digest_of
from graphpart.runtime.executors.launch import Executor
from graphpart.runtime.executors.rank_compare import alone
from graphpart.runtime.parameters.model_state import ModelState

OPTIMIZER = "the optimizer"

PART_OF_STEP = "_graphpart_part_of_step"
"""Marks a view of an optimizer that steps some of its parameters within a fused step, which is compared as a whole."""

_NO_HYPER_PARAMETERS = frozenset({"params", "param_names"})
_FIXED = frozenset({bool, int, float, str, type(None)})

_Structure = tuple[Any, ...]


class _Known(NamedTuple):
    """What was found out about an optimizer.

    Attributes:
        structure: what is compared anew when it changes.
        values: its hyper-parameters; None if a tensor is among them, which may be changed in place.
        groups: kind and groups; none where it has no parameter of the model.
        facts: all together.
    """

    structure: _Structure
    values: tuple[Any, ...] | None
    groups: tuple[Fact, ...]
    facts: tuple[Fact, ...]


class OptimizerWatch:
    """Compares the optimizers of a model's parameters over processes: before the first step, and where groups change.

    A step compares nothing further by itself: what its hyper-parameters were is compared by the model's next call.

    Args:
        state: the model's tensors.
        executor: who asks the other processes.
        deadline_s: how long to wait for them.
    """

    def __init__(self, state: ModelState, executor: Executor[Any], deadline_s: float) -> None:
        self.state, self.executor, self.deadline_s = state, executor, deadline_s
        self._known: weakref.WeakKeyDictionary[Optimizer, _Known] = weakref.WeakKeyDictionary()
        self._stepped: dict[int, tuple[Fact, ...]] = {}
        if executor.distributed:
            _watch_optimizers()
            _WATCHES.add(self)

    def facts(self, optimizer: Optimizer) -> tuple[Fact, ...]:
        """Kind, groups and hyper-parameters; none where it has no parameter of this model."""
        structure, values = _structure(optimizer), _values(optimizer)
        known = self._known.get(optimizer)
        if known is not None and known.structure == structure:
            if known.values is not None and known.values == values:
                return known.facts
            groups = known.groups
        else:
            groups = self._groups(optimizer)
        facts = (*groups, *_hyper_parameters(optimizer)) if groups else ()
        self._known[optimizer] = _Known(structure, values, groups, facts)
        return facts

    def take(self) -> tuple[Fact, ...]:
        """What has been stepped by itself since the last time."""
        if not self._stepped:
            return ()
        found = tuple(fact for facts in self._stepped.values() for fact in facts)
        self._stepped.clear()
        return found

    def before_step(self, optimizer: Optimizer) -> None:
        """Compare a step that is not part of a fused one.

        Raises:
            RanksDifferError: if another process steps another kind of optimizer, or other groups.
        """
        known = self._known.get(optimizer)
        is_new = known is None or known.structure != _structure(optimizer)
        facts = self.facts(optimizer)
        if not facts:
            return
        if is_new:
            what = f"a step of {type(optimizer).__name__}"
            parts = FingerprintPart(CALL, (Fact("a step of an optimizer"),)), FingerprintPart(OPTIMIZER, facts)
            self.executor.check_same(alone(what, self.deadline_s, *parts))
        self._stepped[id(optimizer)] = facts

    def _groups(self, optimizer: Optimizer) -> tuple[Fact, ...]:
        """Kind and groups; none without a parameter of this model."""
        kind = type(optimizer)
        found = [Fact("kind of optimizer", f"{kind.__module__}.{kind.__qualname__}")]
        own = 0
        for i, group in enumerate(optimizer.param_groups):
            names = [self.state.name_of(p) or "" for p in group["params"]]
            own += sum(map(bool, names))
            found.append(Fact(f"group {i} of the optimizer", f"{len(names)} parameters ({digest_of(names)[:6]})"))
        return tuple(found) if own else ()


_WATCHES: weakref.WeakSet[OptimizerWatch] = weakref.WeakSet()


@cache
def _watch_optimizers() -> None:
    """Have every optimizer, once for the process, compared before it steps."""
    register_optimizer_step_pre_hook(compare_before_step)


def compare_before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Compare a step over processes, for each model that may be concerned."""
    if PART_OF_STEP not in optimizer.__dict__:
        for watch in list(_WATCHES):
            watch.before_step(optimizer)


def _structure(optimizer: Optimizer) -> _Structure:
    """What is compared anew when it changes."""
    return type(optimizer), tuple((len(group["params"]), tuple(group)) for group in optimizer.param_groups)


def _values(optimizer: Optimizer) -> tuple[Any, ...] | None:
    found = [v for group in optimizer.param_groups for name, v in group.items() if name not in _NO_HYPER_PARAMETERS]
    is_fixed = all(type(v) in _FIXED or (type(v) is tuple and all(type(x) in _FIXED for x in v)) for v in found)
    return tuple(found) if is_fixed else None


def _hyper_parameters(optimizer: Optimizer) -> tuple[Fact, ...]:
    return tuple(
        Fact(f"{name} of group {i} of the optimizer", _value(value))
        for i, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name not in _NO_HYPER_PARAMETERS
    )


def _value(value: Any) -> str:
    """A value as text that is the same in every process; one on a GPU is left out, as reading it would wait."""
    if isinstance(value, Tensor):
        return repr(value.tolist()) if value.device.type == "cpu" else "a tensor"
    is_plain = value is None or isinstance(value, (bool, int, float, complex, str))
    is_all_plain = isinstance(value, (tuple, list)) and all(isinstance(v, (bool, int, float, Tensor)) for v in value)
    if is_all_plain:
        return f"({', '.join(map(_value, value))})"
    return repr(value) if is_plain else type(value).__qualname__
