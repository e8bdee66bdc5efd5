"""A call as one trace: what it depends on, as TorchDynamo sees it, and what ``torch.export`` makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from graphpart.errors import TraceError
from graphpart.runtime.parameters.model_state import ModelState, tensors_in
from graphpart.trace import Loss, Traced, trace
from graphpart.trace.dynamo.calls import loss_tensors, watched_call, watched_step
from graphpart.trace.dynamo.changes import NOTHING, Store
from graphpart.trace.dynamo.watch import RAISES, Bindings, CallError, GraphBreak, Watched, watch
from graphpart.trace.hooks import computed_weights, has_hooks
from graphpart.trace.patches import unchanged

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
"""Types of results, beside tensors, that guards tell from others of their type."""


@dataclass(frozen=True)
class Whole:
    """A call that is one trace.

    Attributes:
        watched: what it depends on.
        traced: the trace.
        reads: per constant that is read anew at each call, where it is found.
    """

    watched: Watched
    traced: Traced
    reads: Mapping[str, str]


@dataclass(frozen=True)
class Cause:
    """Why a call is not traced whole.

    Attributes:
        why: in words.
        is_one_graph: whether TorchDynamo sees one graph all the same.
        fails: whether it is that the call fails by itself, of which tracing says more.
        is_first: whether it is that the first of such calls is unlike the next.
    """

    why: str
    is_one_graph: bool
    fails: bool = False
    is_first: bool = False


def whole_call(
    state: ModelState,
    bindings: Bindings,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Loss | None,
    sample_dims: Mapping[str, int | None],
) -> Whole | Cause:
    """A call as one trace, if it can be that.

    Args:
        state: the model, and its tensors.
        bindings: the call, as :func:`~graphpart.trace.dynamo.calls.bindings_of` gives it.
        args: its positional arguments.
        kwargs: its keyword arguments.
        loss: what a training step computes behind the model; None for a plain call.
        sample_dims: per input name, its sample dimension or None.

    Raises:
        TraceError: if the call fails by itself, and has to be one graph.
    """
    with state.shapes_only():
        watched = _watch(state, bindings, loss)
        if isinstance(watched, Cause) and not watched.fails:
            return watched
        around = watched.reads if isinstance(watched, Watched) else ()
        if any("from_numpy(" in read.expression for read in around):
            return Cause("it reads a NumPy array, which tracing might change", is_one_graph=True)
        try:
            with unchanged(read.tensor for read in around):
                traced = trace(
                    state.module,
                    args,
                    kwargs,
                    sample_dims=sample_dims,
                    loss=loss,
                    watches_hooks=isinstance(watched, Cause) or not watched.has_hooks,
                    keeps_identity=True,
                )
        except TraceError as reason:
            if isinstance(watched, Cause) and state.is_spread:
                raise
            # What fails while it is traced may run all the same: a model can ask whether it is being compiled.
            return Cause(str(reason), is_one_graph=isinstance(watched, Watched))
    if any(not isinstance(value, _PLAIN) for value in traced.results):
        return Cause("it gives an object that is neither a tensor nor a number or text", is_one_graph=True)
    if isinstance(watched, Cause):
        return watched
    reads = _matched(traced, watched)
    if reads is None:
        return Cause("it reads what no graph can hold", is_one_graph=True)
    return Whole(watched, traced, reads)


def _watch(state: ModelState, bindings: Bindings, loss: Loss | None) -> Watched | Cause:
    """What a call depends on, if it can be traced whole; else why it cannot.

    Hooks that only look at what passes are left out where they alone would break the graph: tracing notes what
    they are given, and they are called with the values after each run.
    """
    found = _watch_settled(state, bindings, loss, keeps_hooks=True)
    if isinstance(found, Watched):
        return found
    has_to_be_whole = state.is_spread and not found.is_one_graph
    if not computed_weights(state.module) and not (has_to_be_whole and has_hooks(state.module)):
        return found
    without = _watch_settled(state, bindings, loss, keeps_hooks=False)
    return without if isinstance(without, Watched) else found


def _watch_settled(state: ModelState, bindings: Bindings, loss: Loss | None, keeps_hooks: bool) -> Watched | Cause:
    own = [*tensors_in(state.module), *loss_tensors(loss)]
    call, without = watched_call if loss is None else watched_step, None if keeps_hooks else state.module
    weights = frozenset() if keeps_hooks else computed_weights(state.module)
    before: list[Store] = []
    first: Watched | None = None
    is_settled = False
    try:
        for _ in range(2):  # what a call sets at first, it may find set from then on
            watched = watch(call, bindings, own, unguarded=state.is_spread, without=without)
            places = [(e.place, {(id(e.owner), n) for n in e.names or ("",)}) for e in watched.effects]
            if effects := [place for place, changed in places if not changed <= weights]:
                return Cause(f"it changes {', '.join(effects)}", is_one_graph=True)
            if watched.reads_numbers:
                return Cause("it reads a number of a tensor that is no parameter", is_one_graph=True)
            if watched.sees_stand_ins:
                return Cause("it asks what its tensors are, or finds a parameter elsewhere than on a module", True)
            if not watched.is_described:
                return Cause("it gives a number that depends on data", is_one_graph=True)
            if all(store.has_happened() for store in watched.stores):
                if first is not None and not (first.is_plain and first.form == watched.form):
                    return Cause(
                        f"{_names(first.stores)} is set by the first call, which is unlike the next",
                        True,
                        is_first=True,
                    )
                is_settled = True
                return replace(watched, has_hooks=keeps_hooks)
            first = watched
            for store in watched.stores:
                before.append(replace(store, value=getattr(store.owner, store.name, NOTHING)))
                store.repeat()
    except GraphBreak as reason:
        return Cause(str(reason), is_one_graph=False, fails=RAISES in str(reason))
    except CallError as reason:
        return Cause(str(reason), is_one_graph=False, fails=True)
    finally:
        for store in () if is_settled else reversed(before):  # the call has not happened yet
            store.repeat()
    return Cause(f"it changes {_names(watched.stores)}", is_one_graph=True)


def _names(stores: Sequence[Store]) -> str:
    return ", ".join(f"{type(store.owner).__name__}.{store.name}" for store in stores)


def _matched(traced: Traced, watched: Watched) -> dict[str, str] | None:
    """Per constant of a trace that a call reads from around the model, where.

    None if one is not among them, or wants a gradient, which no constant gets.
    """
    found: dict[str, str] = {}
    for read in watched.reads:
        if isinstance(read.tensor, Tensor) and read.tensor.requires_grad:
            return None
        names = [name for name, tensor in traced.constants.items() if _is_same(tensor, read.tensor)]
        if not names:
            return None
        found.update(dict.fromkeys(names, read.expression))
    return found


def _is_same(constant: Tensor, read: Any) -> bool:
    if constant is read:
        return True
    return (
        isinstance(read, Tensor)
        and constant.shape == read.shape
        and constant.stride() == read.stride()
        and constant.numel() > 0
        and constant.data_ptr() == read.data_ptr()
    )
