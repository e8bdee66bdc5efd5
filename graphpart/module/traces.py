"""The traced forms of a model, made when a call first needs them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from graphpart.errors import UnsupportedOperatorError
from graphpart.ir.cluster import Cluster
from graphpart.module.call_form import CallForm, mode_of
from graphpart.module.coverage import Coverage
from graphpart.module.optimizer_watch import OptimizerWatch
from graphpart.module.pieces import PieceCall, Pieces, Running
from graphpart.module.planner import Planner
from graphpart.module.trace_key import TraceKey, call_key, what_varies
from graphpart.module.traced_call import TracedCall
from graphpart.module.whole import Cause, Whole, whole_call
from graphpart.planning.plan import Plan
from graphpart.runtime.executors.launch import Executor, Launch
from graphpart.runtime.parameters.edge_guard import EdgeGuard
from graphpart.runtime.parameters.model_state import ModelState, tensors_in
from graphpart.trace import Loss, Traced
from graphpart.trace.dynamo.calls import bindings_of, plain_call, step_call
from graphpart.trace.dynamo.changes import Store
from graphpart.trace.dynamo.watch import Bindings, Watched, without_modes
from graphpart.trace.hooks import install_library_hooks
from graphpart.trace.origin import warn_user
from graphpart.trace.tree import check_arguments, flatten, leaf_names

MAX_CALLS = 32
WARN_EVERY = 8

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
        self._last: Running | Plan | None = None  # what the last call consisted of

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
        tensors = self.follow_tensors()
        behind = (loss is not None, bool(loss and loss.with_outputs))
        key = call_key(self.module, tensors, leaves, spec, self.kinds, behind)
        try:
            hash(key)
        except TypeError:  # an argument has no hash
            check_arguments(args, kwargs)
            raise
        bindings = bindings_of(self.module, args, kwargs, loss)
        kept = self._kept(key, bindings)
        why = self._cut.get(key)
        if kept is None and why is None:
            check_arguments(args, kwargs)
            found = self._make(key, bindings, args, kwargs, loss, leaves)
            kept, why = (found, None) if isinstance(found, Kept) else (None, found)
        if kept is None:
            assert why is not None
            return PieceCall(self._pieces_of(loss, key), bindings, loss, why), leaves
        reads = [kept.watched.guards.value(place, bindings) for place in kept.call.reads.values()]
        return kept.call, [*leaves, *reads]

    def follow_tensors(self) -> list[Tensor]:
        """The model's tensors, once any new ones are taken over; traces that they leave out of date are forgotten."""
        tensors = tensors_in(self.module)
        if self.state.follow(tensors):
            self.calls.clear()
            self._cut.clear()
            for pieces in self._pieces.values():
                pieces.made.clear()
        return tensors

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
    ) -> Kept | str:
        """Watch a call, trace it whole, and plan it; or else say why it has to be cut up."""
        since_s = time.monotonic()
        found = whole_call(self.state, bindings, args, kwargs, loss, self.sample_dims)
        if isinstance(found, Whole):
            call = self.compiled(
                found.traced, is_step=loss is not None, since_s=since_s, stores=found.watched.stores, reads=found.reads
            )
            try:
                call.check_memory(leaves)
            except UnsupportedOperatorError as reason:  # arguments share what is changed in place
                found = Cause(str(reason), is_one_graph=True)
            else:
                kept = Kept(key, found.watched, call)
                self.calls.append(kept)
                self._warn_of_many(bindings, leaf_names(args, kwargs))
                del self.calls[:-MAX_CALLS]
                return kept
        self.state.check_values(self.state.tensors)
        if not found.is_first:
            self._cut[key] = found.why
            while len(self._cut) > MAX_CALLS:
                del self._cut[next(iter(self._cut))]
        return found.why

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of torch devices that are in use."""
        return tuple(dict.fromkeys(device.type for device in self.devices))

    @property
    def coverage(self) -> Coverage:
        """What the last call consisted of."""
        name, last = type(self.module).__name__, self._last
        if last is None:
            return Coverage(name, () if self.first_plan is None else (self.first_plan,))
        if not isinstance(last, Running):
            return Coverage(name, (last,))
        read = set().union(*(p.read for p in self._pieces.values()))
        tied = {id(t) for n, t in self.state.tensors.items() if n in read}
        sizes = {n: t.numel() for n, t in self.module.named_parameters() if not is_lazy(t)}
        unread = [n for n, t in self.module.named_parameters() if id(t) not in tied]
        unread_share = sum(sizes.get(n, 0) for n in unread) / max(sum(sizes.values()), 1)
        return Coverage(
            name,
            tuple(report.plan for report in last.reports),
            (last.why,),
            tuple(island.report for island in last.islands),
            tuple(unread),
            unread_share,
        )

    def look_at(self, call: TracedCall | PieceCall) -> None:
        """Note what a call consisted of, and warn, once, if much of it is not planned.

        Args:
            call: which has run.
        """
        self._last = last = call.pieces.last if isinstance(call, PieceCall) else call.plan
        if not isinstance(last, Running) or self._has_warned:
            return
        if (last.reports or last.islands) and not last.has_new:
            return
        coverage = self.coverage
        if coverage.is_little:
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
        stores: tuple[Store, ...] = (),
        reads: Mapping[str, str] | None = None,
        beside: Sequence[Plan] | None = None,
    ) -> TracedCall:
        """Plan a trace, move parameters home, compile.

        Args:
            traced: the trace.
            is_step: whether it is a training step's.
            since_s: when tracing began, by the monotonic clock.
            stores: attributes that each call sets to constants.
            reads: per constant that is read anew at each call, where it is found.
            beside: of a part of a call, the plans of the parts before it; None for a whole call.
        """
        plan = self.planner.plan(traced.graph, self.state, beside=beside)
        mode, weights = mode_of(self.module, [d.type for d in self.devices]), self.state.initial()
        edges = EdgeGuard.of(traced.graph, plan.placement, self.state.tensors)
        self.state.rehome(traced.graph, plan.placement)
        memory = plan.memory if is_step else plan.all_in_flight  # what a fused step or a plain call holds
        forecast = [device.total_bytes for device in memory.devices]
        launch = Launch.prepare(plan.program, traced.graph, self.cluster, self.devices, self.executor.own, forecast)
        self.first_plan = self.first_plan or plan
        form = CallForm(is_step, traced, plan, mode, weights, self.watch, time.monotonic() - since_s)
        return TracedCall(traced, plan, launch, self.executor, self.state, edges, form, stores, dict(reads or {}))
