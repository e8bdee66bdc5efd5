"""What a fused step does with gradients: each device steps its own parameters as soon as theirs are in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from graphpart.errors import ArgumentError, AutogradError, GraphpartError
from graphpart.ir.program import Wire
from graphpart.ir.timeline import Timeline
from graphpart.module.optimizer_watch import PART_OF_STEP, OptimizerWatch, compare_before_step
from graphpart.runtime.executors.fingerprint import Fact
from graphpart.runtime.parameters.gradients import ParameterGradients
from graphpart.runtime.parameters.model_state import ModelState
from graphpart.runtime.parameters.tiled_tensor import before_step

_APART = frozenset(
    ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]
)
"""Optimizers of torch that update each parameter from its own gradient and state alone."""

_OWN_HOOKS = (before_step, compare_before_step)

_SCALER_CONFIG = frozenset(["_enabled", "_init_scale", "_growth_factor", "_backoff_factor", "_growth_interval"])
"""Attributes of a GradScaler that are numbers, so that reading them waits for no device."""


NOTHING_TO_TRAIN = "the loss depends on no parameter that requires a gradient, so there is nothing to train"


@dataclass(frozen=True)
class TrainStep:
    """What one fused training step gave.

    Attributes:
        loss: detached.
        outputs: the model's own result, detached; None unless it was asked for.
        grad_norm: norm of all gradients before clipping; None unless they were clipped.
        measured: gives the timeline; None where nothing was recorded.
        staleness: of an asynchronous step: per number of updates of a device's weights between a task's forward and
            its backward, how many tasks of this process had so many. None for a synchronous step.
    """

    loss: Tensor
    outputs: Any = None
    grad_norm: Tensor | None = None
    measured: Callable[[], Timeline] | None = None
    staleness: Mapping[int, int] | None = None

    @property
    def timeline(self) -> Timeline:
        """When each task ran and each message went.

        Raises:
            GraphpartError: if the step was not recorded.
        """
        if self.measured is None:
            raise GraphpartError("the step was not recorded; give train_step(..., record=True)")
        return self.measured()


class Update:
    """One step's update of parameters: what its workers do with gradients, and what is left to do after them.

    With an optimizer that takes parameters one by one, each device steps its own as soon as their gradients are in.
    Clipping by the norm of all gradients, a GradScaler, hooks on the optimizer's step, a replaced step, or
    another kind of optimizer first wait for all of them.

    Args:
        state: the parameters.
        optimizer: the user's own, over them; None adds the gradients to ``.grad`` and leaves them there.
        scaler: a GradScaler: scales the loss, skips steps with gradients that are not finite. Without an optimizer
            gradients stay scaled, for the step that has one.
        clip_grad_norm: largest norm of the gradients of all of the optimizer's parameters together.
        keep_gradients: whether ``.grad`` stays after the step.

    Raises:
        ArgumentError: if ``optimizer`` is no torch optimizer, needs a closure, or holds none of the model's parameters;
            if ``clip_grad_norm`` is given without one, or is no norm; or if ``scaler`` is no GradScaler.
    """

    gradients: ParameterGradients  # from begin() on

    def __init__(
        self,
        state: ModelState,
        optimizer: torch.optim.Optimizer | None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
        keep_gradients: bool = False,
    ) -> None:
        self.state = state
        self.optimizer = optimizer
        self.scaler = scaler
        self.clip_grad_norm = clip_grad_norm
        self.keep_gradients = keep_gradients or optimizer is None
        self.grad_norm: Tensor | None = None
        _check_optimizer(optimizer, state)
        _check_scaler(scaler)
        _check_norm(clip_grad_norm)
        if optimizer is None and clip_grad_norm is not None:
            raise ArgumentError("clip_grad_norm= acts on an update, and needs optimizer=")
        waits = scaler is not None or clip_grad_norm is not None
        groups = [] if optimizer is None else optimizer.param_groups
        self._to_step = frozenset(id(p) for group in groups for p in group["params"])
        self.is_apart = optimizer is not None and _is_apart(optimizer)
        self.at_once = self.is_apart and not waits
        self._stepped: set[int] = set()

    def facts(self, watch: OptimizerWatch) -> tuple[Fact, ...]:
        """What processes have to have alike of it.

        Args:
            watch: of the model.
        """
        scaler = self.scaler
        config = {} if scaler is None else {k: v for k, v in vars(scaler).items() if k in _SCALER_CONFIG}
        return (
            Fact("scaler", "none" if scaler is None else f"{type(scaler).__name__} {sorted(config.items())}"),
            Fact("clip_grad_norm", repr(self.clip_grad_norm)),
            Fact("keep_gradients", repr(self.keep_gradients)),
            *((Fact("optimizer", "none"),) if self.optimizer is None else watch.facts(self.optimizer)),
        )

    def seed(self, wire: Wire, devices: Sequence[torch.device]) -> Tensor:
        """The gradient of one term of the loss: one, or what the scaler makes of it."""
        one = torch.ones(wire.shape, dtype=getattr(torch, wire.dtype), device=devices[wire.device])
        if self.scaler is None or not self.scaler.is_enabled():
            return one
        return self.scaler.scale(one)

    def begin(self, gradients: ParameterGradients, *, is_early: bool) -> None:
        """Make ready for the gradients of the step, before any worker starts.

        Args:
            gradients: collects them.
            is_early: whether weights are updated within the step.

        Raises:
            AutogradError: if they are to be, but gradients have to be waited for.
        """
        if is_early and (not self.at_once or self.keep_gradients):
            raise AutogradError(
                "an asynchronous step updates weights as gradients come: it needs optimizer=, one of torch's that take "
                f"parameters one by one ({', '.join(sorted(_APART))}) without hooks on its step, and can neither clip, "
                "scale nor keep gradients. Use a synchronous schedule for that"
            )
        self.gradients = gradients

    def keep(self, wire: Wire, gradient: Tensor, is_own: bool) -> None:
        """Take the gradient of a parameter's wire, and whether nobody else has its memory, on a worker's thread."""
        self.gradients.keep(wire, gradient, is_own)

    def update_early(self, gradients: Sequence[tuple[Wire, Tensor]]) -> None:
        """Step parameters that one device has to itself, by some of their gradients, on its worker's thread."""
        parameters = []
        for wire, gradient in gradients:
            is_stepped = id(self.state.tensors[wire.value]) in self._to_step
            parameters.append(self._add(wire.value, gradient if is_stepped else gradient.clone()))
        self._step_view({id(p) for p in parameters})

    def update(self, device: int) -> None:
        """Take the gradients that a device completed, on its worker's thread; step them unless all are waited for."""
        given = [self._give(name) for name in self.gradients.take_complete(device)]
        if self.at_once:
            self._step(given)

    def finish(self, on_each_device: Callable[[Callable[[int], None]], None]) -> None:
        """What is left when every device has run all of its tasks."""
        if not self.at_once or self.keep_gradients:  # what other processes keep the parts of
            for name in self.gradients.without_own_parts():
                self._give(name)
        if self.optimizer is None:
            return
        if self.scaler is not None or not self.is_apart:
            self._step_whole(self.optimizer)
        else:
            if self.clip_grad_norm is not None:
                self.grad_norm = self._clip(self.clip_grad_norm)
            if not self.at_once:
                on_each_device(
                    lambda device: self._step([self.state.tensors[n] for n in self.gradients.at_home(device)])
                )
            # Parameters that this step gave nothing to, but an earlier one that only added up gradients.
            self._step([p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None])
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks for
        if not self.keep_gradients:
            self.optimizer.zero_grad()

    def follow(self, loss: Tensor) -> None:
        """Backward and update behind a forward that was no fused step's, one after the other.

        Raises:
            AutogradError: if the loss depends on nothing that requires a gradient.
        """
        if not loss.requires_grad:
            raise AutogradError(NOTHING_TO_TRAIN)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.optimizer is not None:
            self._step_whole(self.optimizer)
            if not self.keep_gradients:
                self.optimizer.zero_grad()

    def _step_whole(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, if that is wanted, and step all parameters as the optimizer or the scaler does it."""
        if self.clip_grad_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            self.grad_norm = self._clip(self.clip_grad_norm)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    @torch.no_grad()
    def _clip(self, largest: float) -> Tensor:
        """Clip the gradients of all of the optimizer's parameters together; returns the norm that they had."""
        assert self.optimizer is not None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = [self.state.norm(p) for p in parameters]
        total = torch.nn.utils.get_total_norm([norm.to(norms[0].device) for norm in norms])
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, total)
        return total

    def _give(self, name: str) -> Tensor:
        """Add a collected gradient to the parameter's own."""
        gradient = self.gradients.of(name)
        assert gradient is not None
        parameter = self.state.tensors[name]
        # One that stays may be changed in place, by clipping or by the next step's.
        stays = self.keep_gradients or not self.at_once or id(parameter) not in self._to_step
        if stays and parameter.grad is None and self.gradients.is_borrowed(name):
            gradient = gradient.clone()
        return self._add(name, gradient)

    def _add(self, name: str, gradient: Tensor) -> Tensor:
        """As autograd does: the parameter's own hooks come before and after."""
        parameter = self.state.tensors[name]
        with torch.no_grad():
            for hook in (parameter._backward_hooks or {}).values():
                replaced = hook(gradient)
                gradient = gradient if replaced is None else replaced
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
            for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
                hook(parameter)
        return parameter

    def _step(self, parameters: Iterable[Tensor]) -> None:
        """Step some of the optimizer's parameters that have not been stepped yet; workers do that at once."""
        assert self.optimizer is not None
        own = {id(p) for p in parameters} - self._stepped
        self._stepped |= own
        self._step_view(own)

    def _step_view(self, own: Set[int]) -> None:
        """Step the parameters of these identities, as if the optimizer had no others."""
        assert self.optimizer is not None
        groups = [
            {**group, "params": [p for p in group["params"] if id(p) in own]} for group in self.optimizer.param_groups
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            return
        view = object.__new__(type(self.optimizer))
        view.__dict__.update(self.optimizer.__dict__)
        view.__dict__.pop("step", None)  # a scheduler's wrapper, bound to all of the optimizer
        view.param_groups = groups
        view.__dict__[PART_OF_STEP] = True
        view.step()
        if not self.keep_gradients:
            view.zero_grad()


def _check_optimizer(optimizer: Any, state: ModelState) -> None:
    """Refuse what would not update the model. One that has other parameters besides is its owner's decision."""
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(
            f"optimizer={optimizer!r}; give a torch.optim.Optimizer, such as torch.optim.AdamW(parted.parameters())"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ArgumentError(
            "LBFGS evaluates the loss several times a step, which a fused step cannot; call the model in a closure"
        )
    own = {id(tensor) for tensor in state.tensors.values()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        num = sum(len(group["params"]) for group in optimizer.param_groups)
        raise ArgumentError(
            f"optimizer= has {num} parameters, but none of this model's, so nothing would be trained; make it of "
            "parted.parameters()"
        )


def _check_scaler(scaler: Any) -> None:
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise ArgumentError(f"scaler={scaler!r}; give a torch.amp.GradScaler, or None")


def _check_norm(norm: Any) -> None:
    is_number = isinstance(norm, (int, float)) and not isinstance(norm, bool)
    if norm is not None and not (is_number and norm > 0):
        raise ArgumentError(f"clip_grad_norm={norm!r}; give the largest norm of all gradients, a number above 0")


def _is_apart(optimizer: torch.optim.Optimizer) -> bool:
    """Whether stepping parameters apart is the same as stepping all at once."""
    hooks: tuple[Mapping[int, Any], ...] = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    kind = type(optimizer)
    own_step = vars(optimizer).get("step")  # a scheduler's wrapper, or the user's
    if own_step is not None and getattr(own_step, "__wrapped__", None) is not kind.step:
        return False
    is_known = kind.__module__.startswith("torch.optim.") and kind.__name__ in _APART
    # The library's own hooks are there as soon as a parameter is tiled.
    return is_known and all(hook in _OWN_HOOKS for registered in hooks for hook in registered.values())
