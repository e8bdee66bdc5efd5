"""The traced forms of a model, made when a call first needs them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graphpart.errors import TraceError, UnsupportedOperatorError
from graphpart.ir.cluster import Cluster
from graphpart.module.call_form import CallForm, mode_of
from graphpart.module.coverage import WARN_BELOW, Coverage
from graphpart.module.optimizer_watch import OptimizerWatch
from graphpart.module.pieces import PieceCall, Pieces
from graphpart.module.planner import Planner
from graphpart.module.trace_key import TraceKey, call_key, what_varies
from graphpart.module.traced_call import TracedCall
from graphpart.planning.plan import Plan
from graphpart.runtime.executors.launch import Executor, Launch
from graphpart.runtime.parameters.edge_guard import EdgeGuard
from graphpart.runtime.parameters.model_state import ModelState, tensors_in
from graphpart.trace import Loss, Traced, trace
from graphpart.trace.dynamo.calls import (
    bindings_of,
    loss_tensors,
    plain_call,
    step_call,
    watched_call,
    watched_step,
)
from graphpart.trace.dynamo.watch import (
    NOTHING,
    RAISES,
    Bindings,
    CallError,
    GraphBreak,
    Store,
    Watched,
    watch,
    without_modes,
)
from graphpart.trace.hooks import computed_weights, install_library_hooks, without_hooks
from graphpart.trace.origin import warn_user
from graphpart.trace.patches import unchanged
from graphpart.trace.tree import check_arguments, flatten, leaf_names

MAX_CALLS = 32
WARN_EVERY = 8

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
"""Types of results, beside tensors, that guards tell from others of their type."""

_ONE_AT_A_TIME = threading.RLock()
"""Held while looking for a trace or making one, by any model: tracing swaps parameters, and patches torch."""


@dataclass(frozen=True)
class Kept:
    """A trace of a whole model with what tells whether a call may use it.

    Attributes:
        key: what is told at once.
        watched: the rest.
        call: the trace.
    """

    key: TraceKey
    watched: Watched
    call: TracedCall


@dataclass(frozen=True)
class Cause:
    """Why a call is not traced whole.

    Attributes:
        why: in words.
        is_one_graph: whether TorchDynamo sees one graph all the same.
    """

    why: str
    is_one_graph: bool


class Traces:
    """Finds the traced form for a call: makes it the first time, and keeps the last :data:`MAX_CALLS`.

    A call that TorchDynamo sees as one graph, which changes nothing but tensors and attributes that are constant, is
    traced whole, and used again for as long as its guards hold. Any other is cut up by TorchDynamo, which runs the
    Python between and behind its graphs: see :class:`~graphpart.module.pieces.Pieces`.

    Attributes:
        calls: the whole traces that are kept; the one used last comes last.
        num_traces: how many were made.
        first_plan: of the first; None before it.

    Args:
        module: the model.
        cluster: the devices.
        devices: torch device per index of the cluster.
        executor: who runs programs.
        state: the model's tensors.
        planner: plans every trace.
        sample_dims: per input name, its sample dimension or None.
    """

    def __init__(
        self,
        module: nn.Module,
        cluster: Cluster,
        devices: tuple[torch.device, ...],
        executor: Executor[Any],
        state: ModelState,
        planner: Planner,
        sample_dims: Mapping[str, int | None] | None = None,
    ) -> None:
        self.module, self.cluster, self.devices = module, cluster, devices
        self.executor, self.state, self.planner = executor, state, planner
        self.sample_dims = dict(sample_dims or {})
        self.calls: list[Kept] = []
        install_library_hooks(module)
        self.num_traces = 0
        self.first_plan: Plan | None = None
        self.watch = OptimizerWatch(state, executor, planner.deadline_s)
        self._pieces: dict[Any, Pieces] = {}  # by whether there is a loss, and by what TorchDynamo does not guard
        self._cut: dict[TraceKey, str] = {}  # calls that are cut up, and why
        self._has_warned = False

    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss | None = None
    ) -> tuple[TracedCall | PieceCall, list[Any]]:
        """The traced form for some arguments, and the arguments flattened.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            loss: what a training step computes behind the model; None for a plain call.
        """
        with _ONE_AT_A_TIME, without_modes():
            return self._find(args, kwargs, loss)

    def _find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss | None
    ) -> tuple[TracedCall | PieceCall, list[Any]]:
        leaves, spec = flatten((args, kwargs, {} if loss is None else loss.arguments))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_nested for leaf in leaves):
            raise UnsupportedOperatorError("an argument is a nested tensor; pad it, and pass the lengths or a mask")
        tensors = tensors_in(self.module)
        if self.state.follow(tensors):
            self.calls.clear()
            self._cut.clear()
        kinds = dict.fromkeys(d.type for d in self.devices)
        key = call_key(self.module, tensors, leaves, spec, kinds, (loss is not None, bool(loss and loss.with_outputs)))
        try:
            hash(key)
        except TypeError:  # an argument has no hash
            check_arguments(args, kwargs)
            raise
        bindings = bindings_of(self.module, args, kwargs, loss)
        kept = self._kept(key, bindings)
        if kept is None and key not in self._cut:
            check_arguments(args, kwargs)
            kept = self._make(key, bindings, args, kwargs, loss, leaves)
        if kept is None:
            return PieceCall(self._pieces_of(loss, key), bindings, loss), leaves
        reads = [kept.watched.guards.value(place, bindings) for place in kept.call.reads.values()]
        return kept.call, [*leaves, *reads]

    def _kept(self, key: TraceKey, bindings: Bindings) -> Kept | None:
        """The trace that a call may use."""
        for i, kept in enumerate(reversed(self.calls), 1):
            if kept.key == key and kept.watched.guards.hold(bindings):
                if i > 1:
                    self.calls.append(self.calls.pop(-i))
                return kept
        return None

    def _make(
        self,
        key: TraceKey,
        bindings: Bindings,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Loss | None,
        leaves: Sequence[Any],
    ) -> Kept | None:
        """Watch a call, and trace it whole; None if it has to be cut up."""
        traced: Traced | None = None
        since_s = time.monotonic()
        with self.state.shapes_only():
            try:
                found = self._watch(bindings, loss)
            except CallError:  # tracing it says how
                found = Cause("", is_one_graph=False)
            if isinstance(found, Watched) and any("from_numpy(" in read.expression for read in found.reads):
                found = Cause("it reads a NumPy array, which tracing might change", is_one_graph=True)
            if isinstance(found, Watched) or not found.why or RAISES in found.why:
                try:
                    with unchanged([] if isinstance(found, Cause) else [read.tensor for read in found.reads]):
                        traced = trace(
                            self.module,
                            args,
                            kwargs,
                            sample_dims=self.sample_dims,
                            loss=loss,
                            watches_hooks=not (isinstance(found, Watched) and found.has_hooks),
                            keeps_identity=True,
                        )
                except TraceError as reason:
                    if not isinstance(found, Watched):
                        raise
                    found = Cause(str(reason), is_one_graph=True)
        if traced is not None and any(not isinstance(value, _PLAIN) for value in traced.results):
            found = Cause("it gives an object that is neither a tensor nor a number or text", is_one_graph=True)
        reads = _matched(traced, found) if traced is not None and isinstance(found, Watched) else None
        if traced is None or reads is None or isinstance(found, Cause):
            cause = found if isinstance(found, Cause) else Cause("it reads what no graph can hold", is_one_graph=True)
            if self.state.is_spread and not cause.is_one_graph:
                raise UnsupportedOperatorError(
                    f"{type(self.module).__name__} is no single graph: {cause.why}. On several processes or GPUs it "
                    "has to be one: use torch.where, or take the decision outside the model"
                )
            self._cut[key] = cause.why
            return None
        watched = found
        call = self.compiled(traced, is_step=loss is not None, since_s=since_s, watched=watched, reads=reads)
        try:
            call.check_memory(leaves)
        except UnsupportedOperatorError as reason:  # arguments share what is changed in place
            self._cut[key] = str(reason)
            return None
        kept = Kept(key, watched, call)
        self.calls.append(kept)
        self._warn_of_many(bindings, leaf_names(args, kwargs))
        del self.calls[:-MAX_CALLS]
        return kept

    def _watch(self, bindings: Bindings, loss: Loss | None) -> Watched | Cause:
        """What a call depends on, if it can be traced whole; else why it cannot.

        Hooks that only look at what passes are left out where they alone would break the graph: tracing notes what
        they are given, and they are called with the values after each run.
        """
        found = self._watch_settled(bindings, loss, keeps_hooks=True)
        if isinstance(found, Cause):
            with without_hooks(self.module) as has_hooks:
                pass
            has_to_be_whole = self.state.is_spread and not found.is_one_graph
            if (has_hooks and has_to_be_whole) or computed_weights(self.module):
                without = self._watch_settled(bindings, loss, keeps_hooks=False)
                return without if isinstance(without, Watched) else found
        return found

    def _watch_settled(self, bindings: Bindings, loss: Loss | None, keeps_hooks: bool) -> Watched | Cause:
        own = [*tensors_in(self.module), *loss_tensors(loss)]
        call, without = watched_call if loss is None else watched_step, None if keeps_hooks else self.module
        weights = frozenset() if keeps_hooks else computed_weights(self.module)
        before: list[Store] = []
        is_settled = False
        try:
            for _ in range(2):  # what a call sets at first, it may find set from then on
                watched = watch(call, bindings, own, unguarded=self.state.is_spread, without=without)
                places = [(e.place, {(id(e.owner), n) for n in e.names or ("",)}) for e in watched.effects]
                if effects := [place for place, changed in places if not changed <= weights]:
                    return Cause(f"it changes {', '.join(effects)}", is_one_graph=True)
                if is_settled := all(store.has_happened() for store in watched.stores):
                    return replace(watched, has_hooks=keeps_hooks)
                for store in watched.stores:
                    before.append(replace(store, value=getattr(store.owner, store.name, NOTHING)))
                    store.repeat()
        except GraphBreak as reason:
            return Cause(str(reason), is_one_graph=False)
        finally:
            for store in () if is_settled else reversed(before):  # the call has not happened yet
                store.repeat()
        changes = ", ".join(f"{type(store.owner).__name__}.{store.name}" for store in watched.stores)
        return Cause(f"it changes {changes}", is_one_graph=True)

    @property
    def coverage(self) -> Coverage:
        """What calls consist of, as far as they have been made."""
        name = type(self.module).__name__
        if not self._cut:
            return Coverage(name, () if self.first_plan is None else (self.first_plan,))
        pieces = list(self._pieces.values())
        read = set().union(*(p.read for p in pieces))
        tied = {id(t) for n, t in self.state.tensors.items() if n in read}
        unread = [n for n, t in self.module.named_parameters() if id(t) not in tied]
        return Coverage(
            name,
            tuple(plan for p in pieces for plan in p.plans),
            tuple(dict.fromkeys(self._cut.values())),
            tuple(island.report for p in pieces for island in p.islands),
            tuple(unread),
        )

    def warn_of_little_coverage(self) -> None:
        """Warn, once, if much of a call in pieces is not planned."""
        coverage = self.coverage
        if not self._has_warned and coverage.breaks and (coverage.share < WARN_BELOW or not coverage.plans):
            self._has_warned = True
            warn_user("; ".join(coverage.notes))

    def _pieces_of(self, loss: Loss | None, key: TraceKey) -> Pieces:
        wanted = (loss is not None, key.modes[-1], key.methods)
        if wanted not in self._pieces:
            self._pieces[wanted] = Pieces(self, plain_call if loss is None else step_call)
        return self._pieces[wanted]

    def _warn_of_many(self, bindings: Bindings, names: Sequence[str]) -> None:
        self.num_traces += 1
        if self.num_traces > 1 and self.num_traces % WARN_EVERY == 1:
            *earlier, last = self.calls
            like = [kept for kept in earlier if kept.key == last.key]
            if like:
                reason = like[-1].watched.guards.broken(bindings)
                reader = "the loss function" if "L['function']" in reason else "the model"
                varying = f"what {reader} reads ({reason})"
            else:
                varying = what_varies([kept.key for kept in self.calls], names, self.module)
            warn_user(
                f"{type(self.module).__name__} has been traced and planned {self.num_traces} times, for calls that "
                f"differ in {varying}; that takes seconds each time. Pad inputs to a few sizes, and pass numbers that "
                f"change as tensors. The last {MAX_CALLS} traces are kept"
            )

    def compiled(
        self,
        traced: Traced,
        *,
        is_step: bool,
        since_s: float,
        watched: Watched | None = None,
        reads: Mapping[str, str] | None = None,
        is_piece: bool = False,
    ) -> TracedCall:
        """Plan a trace, move parameters home, compile.

        Args:
            traced: the trace.
            is_step: whether it is a training step's.
            since_s: when tracing began, by the monotonic clock.
            watched: what the call was seen to do.
            reads: per constant that is read anew at each call, where it is found.
            is_piece: whether it is a part of a call.
        """
        plan = self.planner.plan(traced.graph, self.state, is_piece=is_piece)
        mode, weights = mode_of(self.module, [d.type for d in self.devices]), self.state.initial()
        edges = EdgeGuard.of(traced.graph, plan.placement, self.state.tensors)
        self.state.rehome(traced.graph, plan.placement)
        memory = plan.memory if is_step else plan.all_in_flight  # what a fused step or a plain call holds
        forecast = [device.total_bytes for device in memory.devices]
        launch = Launch.prepare(plan.program, traced.graph, self.cluster, self.devices, self.executor.own, forecast)
        self.first_plan = self.first_plan or plan
        stores = () if watched is None else watched.stores
        form = CallForm(is_step, traced, plan, mode, weights, self.watch, time.monotonic() - since_s)
        return TracedCall(traced, plan, launch, self.executor, self.state, edges, form, stores, dict(reads or {}))


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
