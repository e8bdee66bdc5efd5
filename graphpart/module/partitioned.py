"""The partitioned model: a module that behaves as the original did."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from graphpart.errors import AutogradError, GraphpartError, ParameterError
from graphpart.ir.cluster import Cluster
from graphpart.ir.timeline import Timeline
from graphpart.module.fused_update import TrainStep, Update
from graphpart.module.planner import Planner
from graphpart.module.trace_key import Key, call_key, what_varies
from graphpart.module.traced_call import StepReport, TracedCall
from graphpart.module.verify import Report, verify
from graphpart.planning.plan import Plan
from graphpart.runtime.executors.launch import Executor, Launch
from graphpart.runtime.parameters.edge_guard import EdgeGuard
from graphpart.runtime.parameters.model_state import ModelState, tensors_in
from graphpart.trace import NO_TARGET, Loss, trace
from graphpart.trace.loss import LossFunction
from graphpart.trace.tree import check_arguments, flatten, leaf_names

MAX_CALLS = 32
WARN_EVERY = 8

_ONE_AT_A_TIME = threading.RLock()
"""Held while looking for a trace or making one, by any model: tracing swaps parameters, and patches torch."""


class PartitionedModule(nn.Module):
    """A model split over devices; call it, differentiate it and train it as before.

    It shares the original's submodules, parameters and buffers, so names, ``named_parameters()``,
    ``train()``/``eval()`` and attributes such as ``.config`` are the original's. The first call traces and plans, which
    decides where parameters live; the first call with other shapes or modes traces, too, and carries that decision
    over to a plan of its own.

    Attributes:
        module: the original.
        cluster: the devices.
        plan: of the first call; None before it. It stays the same, so that later calls with other shapes don't change
            it: :meth:`prepare` gives the plan of any call, and ``last_step.plan`` that of the last.
        last_step: what the last call did; None before the first.
        record: whether calls note when each task ran, for :meth:`timeline`.

    Args:
        module: the model; its parameters are taken over, as ``.to()`` does.
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
        super().__init__()
        # The same dictionaries, not copies: every method of nn.Module then speaks the original's names.
        self._modules, self._parameters, self._buffers = module._modules, module._parameters, module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.training = module.training
        hidden = self.__dict__
        hidden["module"] = module
        hidden["cluster"] = cluster
        hidden["plan"] = None
        hidden["last_step"] = None
        hidden["record"] = False
        hidden["_devices"] = devices
        hidden["_executor"] = executor
        hidden["_state"] = state
        hidden["_planner"] = planner
        hidden["_sample_dims"] = dict(sample_dims or {})
        hidden["_calls"] = OrderedDict()
        hidden["_num_traces"] = 0
        hidden["_dropout_off"] = False
        hidden["_last_call"] = lambda: None

    module: nn.Module
    cluster: Cluster
    plan: Plan | None
    last_step: StepReport | None
    record: bool
    _devices: tuple[torch.device, ...]
    _executor: Executor[Any]
    _state: ModelState
    _planner: Planner
    _sample_dims: dict[str, int | None]
    _calls: OrderedDict[Key, TracedCall]
    _num_traces: int
    _dropout_off: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: same arguments and results as ``module(...)``."""
        call, leaves = self._call(args, kwargs)
        result, report = call.run(leaves, dropout_off=self._dropout_off, record=self.record)
        self.__dict__["last_step"] = report
        return result

    def train_step(
        self,
        *args: Any,
        optimizer: torch.optim.Optimizer | None = None,
        loss_fn: LossFunction | None = None,
        target: Any = NO_TARGET,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
        return_outputs: bool = False,
        keep_gradients: bool = False,
        record: bool | None = None,
        **kwargs: Any,
    ) -> TrainStep:
        """Run forward, loss, backward and update as one step, in the order of the plan's schedule.

        The same numbers as ``loss = loss_fn(parted(*args, **kwargs), target)``, ``loss.backward()``,
        ``optimizer.step()`` and ``optimizer.zero_grad()``, but no device waits for all microbatches to have gone
        forward, and each steps its own parameters as soon as their gradients are in. To add up gradients over several
        steps, leave the optimizer out in all but the last. Autocast, schedulers and parameter groups work as ever.

        Args:
            *args: the model's arguments.
            optimizer: over ``parted.parameters()``; None only adds the gradients to ``.grad``.
            loss_fn: takes the model's result, and ``target`` if that is given, and returns the loss; it is traced with
                the model. None where the model returns its loss (or a mapping, object or tuple that has it).
            target: tensors in any containers, cut into microbatches as the arguments are.
            scaler: a ``torch.amp.GradScaler``: waits for all gradients before the update. Give it to the steps that
                only add up gradients, too.
            clip_grad_norm: largest norm of the gradients of all of the optimizer's parameters together: waits for all
                gradients before the update.
            return_outputs: whether the model's own result is wanted; without it, outputs need not be put together.
            keep_gradients: whether ``.grad`` stays after the update.
            record: whether to note when each task ran; by default where no device is a GPU, which recording slows.
            **kwargs: the model's keyword arguments.

        Returns:
            Loss, outputs if wanted, and the measured timeline.

        Raises:
            TraceError: if there is no loss, or ``loss_fn`` reads tensors that are not its arguments.
            AutogradError: if gradients are off, or there is nothing to train.
        """
        if not torch.is_grad_enabled():
            raise AutogradError("train_step needs gradients, but they are off here (torch.no_grad or inference_mode)")
        update = Update(
            self._state, optimizer, scaler=scaler, clip_grad_norm=clip_grad_norm, keep_gradients=keep_gradients
        )
        call, leaves = self._call(args, kwargs, Loss(loss_fn, target, return_outputs))
        if record is None:
            record = self.record or all(device.type == "cpu" for device in self._devices)
        (loss, outputs), report = call.train(leaves, update, dropout_off=self._dropout_off, record=record)
        self.__dict__["last_step"] = report
        measured = report.step.recorded().timeline if report.step is not None else None
        return TrainStep(loss, outputs, update.grad_norm, measured, report.staleness)

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Trace, plan and compile for these arguments without running; returns the plan of such a call."""
        return self._call(args, kwargs)[0].plan

    def prepare_step(
        self, *args: Any, loss_fn: LossFunction | None = None, target: Any = NO_TARGET, **kwargs: Any
    ) -> Plan:
        """Trace, plan and compile a :meth:`train_step` without running; returns the plan of such a step."""
        call, _ = self._call(args, kwargs, Loss(loss_fn, target))
        call.fused  # noqa: B018
        return call.plan

    def verify(self, *args: Any, loss_fn: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Report:
        """Compare outputs, loss and gradients with the plain model on these arguments.

        See :func:`graphpart.module.verify.verify`.
        """
        return verify(self, args, kwargs, loss_fn)

    def timeline(self) -> Timeline:
        """When each task of the last step ran, and each message went.

        Under torchrun, what this process's device did.

        Raises:
            GraphpartError: unless ``parted.record = True`` was set before the step.
        """
        if self.last_step is None or self.last_step.step is None:
            raise GraphpartError("no step was recorded; set parted.record = True, run a step, and ask again")
        return self.last_step.step.recorded().timeline()

    def _call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss | None = None
    ) -> tuple[TracedCall, list[Any]]:
        """The traced form for these arguments, and the arguments flattened."""
        with _ONE_AT_A_TIME:
            return self._find(args, kwargs, loss)

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss | None) -> tuple[TracedCall, list[Any]]:
        leaves, spec = flatten((args, kwargs, {} if loss is None else loss.arguments))
        tensors = tensors_in(self.module)
        self._state.check(tensors)
        kinds = dict.fromkeys(d.type for d in self._devices)
        key = call_key(self.module, tensors, leaves, spec, kinds, None if loss is None else loss.key(self.module))
        try:
            call = self._calls.get(key)
        except TypeError:  # an argument has no hash
            check_arguments(args, kwargs)
            raise
        if call is None:
            call = self._compile(args, kwargs, loss)
            self._calls[key] = call
            self._warn_of_many(args, kwargs)
            if len(self._calls) > MAX_CALLS:
                self._calls.popitem(last=False)
        else:
            self._calls.move_to_end(key)
        self.__dict__["_last_call"] = weakref.ref(call)
        return call, leaves

    def _warn_of_many(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.__dict__["_num_traces"] += 1
        if self._num_traces > 1 and self._num_traces % WARN_EVERY == 1:
            varying = what_varies(list(self._calls), leaf_names(args, kwargs), self.module)
            warnings.warn(
                f"{type(self.module).__name__} has been traced and planned {self._num_traces} times, for calls that "
                f"differ in {varying}; that takes seconds each time. Pad inputs to a few sizes, and pass numbers that "
                f"change as tensors. The last {MAX_CALLS} traces are kept",
                stacklevel=7,
            )

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss | None) -> TracedCall:
        self.module.train(self.training) if self.module.training != self.training else None
        with self._state.shapes_only():
            traced = trace(self.module, args, kwargs, sample_dims=self._sample_dims, loss=loss)
        plan = self._planner.plan(traced.graph, self._state.tensors)
        edges = EdgeGuard.of(traced.graph, plan.placement, self._state.tensors)
        self._state.rehome(traced.graph, plan.placement)
        forecast = [device.total_bytes for device in plan.all_in_flight.devices]
        launch = Launch.prepare(plan.program, traced.graph, self.cluster, self._devices, self._executor.own, forecast)
        if self.plan is None:
            self.__dict__["plan"] = plan
        return TracedCall(traced, plan, launch, self._executor, self._state, edges)

    # --- the face of nn.Module -----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> PartitionedModule:
        """Set training mode on the model, as ``nn.Module.train`` does."""
        super().train(mode)
        self.module.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Whole values under the original names (collective where each process holds its own part)."""
        return self._state.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole values under the original names."""
        return self._state.load_state_dict(state_dict, strict, assign)

    def grad_dict(self) -> dict[str, Tensor | None]:
        """Whole gradients under the original names (collective where each process holds its own part)."""
        return self._state.grad_dict()

    def __getattr__(self, name: str) -> Any:
        """Attributes that aren't the partitioned module's own are the original's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "module" not in self.__dict__:
                raise
            if name == "generate":
                self._check_generate()
            return getattr(self.__dict__["module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes of the original are set there."""
        module = self.__dict__.get("module")
        if module is not None and name not in self.__dict__ and hasattr(module, name):
            setattr(module, name, value)
        else:
            super().__setattr__(name, value)

    def _check_generate(self) -> None:
        """``generate`` is the original's: it runs the plain model, which needs its parameters in one place."""
        if self._state.distributed or len(set(self._devices)) > 1:
            raise GraphpartError(
                "generate() runs the plain model, whose parameters lie on several devices now; load "
                "parted.state_dict() into a model on one device and generate there, or call parted(input_ids) on "
                "padded inputs in a loop"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:
        raise ParameterError(
            "a partitioned model lives on the devices of its plan, so .to(), .cuda(), .half() and the like cannot "
            "move or cast it; do that to the model before graphpart.partition"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise GraphpartError("a partitioned model cannot be copied; copy the model before graphpart.partition")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise GraphpartError("a partitioned model cannot be pickled; save parted.state_dict() and parted.plan")

    def extra_repr(self) -> str:
        """The original's class and the devices."""
        return f"{type(self.module).__name__} on {', '.join(d.name for d in self.cluster.devices)}"

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Dropout passes everything inside."""
        before, self.__dict__["_dropout_off"] = self._dropout_off, True
        try:
            yield
        finally:
            self.__dict__["_dropout_off"] = before


def partitioned_class(original: type[nn.Module]) -> type[PartitionedModule]:
    """A subclass that also has the original's container methods, which Python looks up on the class alone."""

    def passed_on(name: str) -> Callable[..., Any]:
        return lambda self, *args: getattr(self.module, name)(*args)

    names = ("__getitem__", "__len__", "__iter__", "__contains__")
    found = {name: passed_on(name) for name in names if hasattr(original, name)}
    return type("PartitionedModule", (PartitionedModule,), found) if found else PartitionedModule
