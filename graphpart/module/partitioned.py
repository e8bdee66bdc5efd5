"""The partitioned model: a module that behaves as the original did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from graphpart.errors import AutogradError, GraphpartError, ParameterError
from graphpart.ir.cluster import Cluster
from graphpart.ir.timeline import Timeline
from graphpart.module.call_form import refused_by_all
from graphpart.module.coverage import Coverage
from graphpart.module.fused_update import TrainStep, Update
from graphpart.module.planner import Planner
from graphpart.module.traced_call import StepReport
from graphpart.module.traces import Traces
from graphpart.module.verify import Report, verify
from graphpart.planning.plan import Plan
from graphpart.runtime.executors.launch import Executor
from graphpart.runtime.parameters.model_state import ModelState
from graphpart.trace import NO_TARGET, Loss
from graphpart.trace.loss import LossFunction


class PartitionedModule(nn.Module):
    """A model split over devices; call it, differentiate it and train it as before.

    It shares the original's submodules, parameters and buffers, so names, ``named_parameters()``,
    ``train()``/``eval()`` and attributes such as ``.config`` are the original's. The first call traces and plans, which
    decides where parameters live; the first call with other shapes or modes traces, too, and carries that decision
    over to a plan of its own.

    Attributes:
        module: the original.
        cluster: the devices.
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

    module: nn.Module
    cluster: Cluster
    last_step: StepReport | None
    record: bool
    _state: ModelState
    _traces: Traces
    _dropout_off: bool

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
        hidden = self.__dict__  # past __setattr__, which sets what the original has there
        del hidden["training"]  # then it is the original's, too
        hidden["module"] = module
        hidden["cluster"] = cluster
        hidden["last_step"] = None
        hidden["record"] = False
        hidden["_state"] = state
        hidden["_traces"] = Traces(module, cluster, devices, executor, state, planner, sample_dims)
        hidden["_dropout_off"] = False

    @property
    def plan(self) -> Plan | None:
        """The plan of the first call; None before it.

        It stays the same, as later calls follow its decision: :meth:`prepare` gives the plan of any call, and
        ``last_step.plan`` is that of the last.
        """
        plan, notes = self._traces.first_plan, self._traces.coverage.notes
        return plan if plan is None or not notes else replace(plan, notes=(*plan.notes, *notes))

    @property
    def coverage(self) -> Coverage:
        """What calls so far consist of: graphs that are planned, and what is not, with the user's lines."""
        return self._traces.coverage

    def explain(self) -> str:
        """The plan of every graph of a call in words, and what is not planned.

        Raises:
            GraphpartError: before the first call.
        """
        coverage = self.coverage
        if not coverage.plans and not coverage.breaks:
            raise GraphpartError("nothing is planned before the first call; call the model, or prepare(...), first")
        return "\n\n".join([*(plan.explain() for plan in coverage.plans), str(coverage)])

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: same arguments and results as ``module(...)``."""
        with self._refused_by_all("forward"):
            call, leaves = self._traces.find(args, kwargs)
            result, report = call.run(leaves, dropout_off=self._dropout_off, record=self.record)
            self._traces.look_at(call)
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
        with self._refused_by_all("train_step"):
            if not torch.is_grad_enabled():
                raise AutogradError(
                    "train_step needs gradients, but they are off here (torch.no_grad or inference_mode)"
                )
            update = Update(
                self._state, optimizer, scaler=scaler, clip_grad_norm=clip_grad_norm, keep_gradients=keep_gradients
            )
            call, leaves = self._traces.find(args, kwargs, Loss(loss_fn, target, return_outputs))
            if record is None:
                record = self.record or all(device.type == "cpu" for device in self._traces.devices)
            (loss, outputs), report = call.train(leaves, update, dropout_off=self._dropout_off, record=record)
            self._traces.look_at(call)
        self.__dict__["last_step"] = report
        measured = report.step.recorded().timeline if report is not None and report.step is not None else None
        return TrainStep(loss, outputs, update.grad_norm, measured, report.staleness if report is not None else None)

    def _refused_by_all(self, verb: str) -> AbstractContextManager[None]:
        traces = self._traces
        return refused_by_all(traces.executor, f"{verb} of {type(self.module).__name__}", traces.planner.deadline_s)

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Trace, plan and compile for these arguments without running; returns the plan of such a call."""
        return self._traces.find(args, kwargs)[0].plan

    def prepare_step(
        self, *args: Any, loss_fn: LossFunction | None = None, target: Any = NO_TARGET, **kwargs: Any
    ) -> Plan:
        """Trace, plan and compile a :meth:`train_step` without running; returns the plan of such a step."""
        call, _ = self._traces.find(args, kwargs, Loss(loss_fn, target))
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

    # --- the face of nn.Module -----------------------------------------------------------------------------------

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
        if self._state.distributed or len(set(self._traces.devices)) > 1:
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
