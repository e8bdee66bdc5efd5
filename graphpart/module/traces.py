"""The traced forms of a model, made when a call first needs them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphpart.errors import UnsupportedOperatorError
from graphpart.ir.cluster import Cluster
from graphpart.module.planner import Planner
from graphpart.module.trace_key import TraceKey, call_key, what_varies
from graphpart.module.traced_call import TracedCall
from graphpart.planning.plan import Plan
from graphpart.runtime.executors.launch import Executor, Launch
from graphpart.runtime.parameters.edge_guard import EdgeGuard
from graphpart.runtime.parameters.model_state import ModelState, tensors_in
from graphpart.trace import Loss, trace
from graphpart.trace.origin import warn_user
from graphpart.trace.tree import check_arguments, flatten, leaf_names

MAX_CALLS = 32
WARN_EVERY = 8

_ONE_AT_A_TIME = threading.RLock()
"""Held while looking for a trace or making one, by any model: tracing swaps parameters, and patches torch."""


class Traces:
    """Finds the traced form for a call: makes it the first time, and keeps the last :data:`MAX_CALLS`.

    Attributes:
        calls: those that are kept, by what they depend on; the one used last comes last.
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
        self.calls: OrderedDict[TraceKey, TracedCall] = OrderedDict()
        self.num_traces = 0
        self.first_plan: Plan | None = None

    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss | None = None
    ) -> tuple[TracedCall, list[Any]]:
        """The traced form for some arguments, and the arguments flattened.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            loss: what a training step computes behind the model; None for a plain call.
        """
        with _ONE_AT_A_TIME:
            return self._find(args, kwargs, loss)

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss | None) -> tuple[TracedCall, list[Any]]:
        leaves, spec = flatten((args, kwargs, {} if loss is None else loss.arguments))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_nested for leaf in leaves):
            raise UnsupportedOperatorError("an argument is a nested tensor; pad it, and pass the lengths or a mask")
        tensors = tensors_in(self.module)
        self.state.check(tensors)
        kinds = dict.fromkeys(d.type for d in self.devices)
        key = call_key(self.module, tensors, leaves, spec, kinds, None if loss is None else loss.key(self.module))
        try:
            call = self.calls.get(key)
        except TypeError:  # an argument has no hash
            check_arguments(args, kwargs)
            raise
        if call is None:
            call = self._make(args, kwargs, loss)
            self.calls[key] = call
            self._warn_of_many(args, kwargs)
            if len(self.calls) > MAX_CALLS:
                self.calls.popitem(last=False)
        else:
            self.calls.move_to_end(key)
        return call, leaves

    def _warn_of_many(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.num_traces += 1
        if self.num_traces > 1 and self.num_traces % WARN_EVERY == 1:
            varying = what_varies(list(self.calls), leaf_names(args, kwargs), self.module)
            warn_user(
                f"{type(self.module).__name__} has been traced and planned {self.num_traces} times, for calls that "
                f"differ in {varying}; that takes seconds each time. Pad inputs to a few sizes, and pass numbers that "
                f"change as tensors. The last {MAX_CALLS} traces are kept"
            )

    def _make(self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss | None) -> TracedCall:
        """Trace, plan, move parameters home, compile."""
        with self.state.shapes_only():
            traced = trace(self.module, args, kwargs, sample_dims=self.sample_dims, loss=loss)
        plan = self.planner.plan(traced.graph, self.state.tensors)
        edges = EdgeGuard.of(traced.graph, plan.placement, self.state.tensors)
        self.state.rehome(traced.graph, plan.placement)
        memory = plan.all_in_flight if loss is None else plan.memory  # what a plain call or a fused step holds
        forecast = [device.total_bytes for device in memory.devices]
        launch = Launch.prepare(plan.program, traced.graph, self.cluster, self.devices, self.executor.own, forecast)
        self.first_plan = self.first_plan or plan
        return TracedCall(traced, plan, launch, self.executor, self.state, edges)
