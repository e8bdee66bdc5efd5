"""What is done with one architecture: eager and partitioned, twice each, compared in all that a step leaves behind."""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import graphpart as gp
from graphpart.errors import GraphpartError
from graphpart.module.losses import projection
from graphpart.module.verify import FLOOR, largest_of, relative_difference
from graphpart.trace.tree import tensors_of

WORKERS = 3
TOLERANCE = 1e-4
"""Largest relative difference. Results are in float64, but many models compute norms and softmaxes in float32."""

MODES: Mapping[str, Mapping[str, Any]] = {
    "layer": {"strategy": "layer"},
    "layer, 2 microbatches": {"strategy": "layer", "num_microbatches": 2},
    "feature": {"strategy": "feature"},
    "hybrid": {"strategy": "hybrid"},
}

COUNTED = frozenset({
    "mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "einsum", "conv1d", "conv2d", "conv3d", "convolution",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention", "lstm", "gru",
})  # fmt: skip
"""Operators whose FLOPs torch counts."""

ENOUGH = 0.8
"""A smaller share of FLOPs that are lowered is counted apart."""


@dataclass(frozen=True)
class Sample:
    """A model and the keyword arguments of two calls of it, of the same shapes."""

    model: nn.Module
    calls: tuple[Mapping[str, Any], Mapping[str, Any]]


Architecture = Callable[[], Sample]


class NotRunnable(Exception):
    """A model cannot be built, or does not run on one device, with the sizes that it has here."""


@dataclass(frozen=True)
class ModeOutcome:
    """What came of one mode.

    Attributes:
        status: ``right``, ``wrong``, ``refused`` (by a named error), ``error`` (by another) or ``time``.
        reason: what differs, or the error.
        share: of the FLOPs of a forward, those in planned graphs.
        devices: workers that compute.
        time_s: of all of it.
    """

    status: str
    reason: str = ""
    share: float = 0.0
    devices: int = 0
    time_s: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What came of an architecture.

    Attributes:
        library: whose it is.
        name: its name there.
        modes: what came of each mode.
        absent: why it cannot be tried; empty if it can.
        time_s: of all of it.
    """

    library: str
    name: str
    modes: Mapping[str, ModeOutcome] = field(default_factory=dict)
    absent: str = ""
    time_s: float = 0.0

    @property
    def status(self) -> str:
        """What came of it in one word.

        ``right``, ``apart`` (right, but too little is lowered), ``part`` (right, but not tried in all modes), the worst
        of its modes, or ``absent``.
        """
        if self.absent:
            return "absent"
        found = {mode.status for mode in self.modes.values()}
        for worst in ("wrong", "error", "refused", "time"):
            if worst in found:
                return worst
        enough = all(mode.share >= ENOUGH and mode.devices >= 2 for mode in self.modes.values())
        if not enough:
            return "apart"
        return "right" if self.modes.keys() >= MODES.keys() else "part"

    @property
    def reason(self) -> str:
        """Why it is not right: of the first mode that is not."""
        if self.absent:
            return self.absent
        if self.status == "part":
            return f"right in the only modes tried: {', '.join(self.modes)}"
        for name, mode in self.modes.items():
            if mode.status == self.status:
                return f"{name}: {mode.reason}"
            if self.status == "apart" and (mode.share < ENOUGH or mode.devices < 2):
                return f"{name}: {100 * mode.share:.0f} % of FLOPs lowered onto {mode.devices} workers. {mode.reason}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> Verdict:
        """From plain values."""
        modes = {name: ModeOutcome(**mode) for name, mode in line["modes"].items()}
        return Verdict(line["library"], line["name"], modes, line["absent"], line["time_s"])


@dataclass(frozen=True)
class Step:
    """All that a forward and a backward leave behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def try_out(build: Architecture, modes: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ModeOutcome]]:
    """Run a model on one device, and then in each mode.

    Raises:
        NotRunnable: if it does not run on one device.
    """
    sample, plain = _runnable(build)
    counter = FlopCounterMode(display=False)
    counted = copy.deepcopy(sample.model).requires_grad_(False)  # a counter hangs hooks on what has a gradient
    with torch.no_grad(), counter:
        counted(**_own(sample.calls[0]))
    total = float(counter.get_total_flops())
    for name, choices in modes.items():
        start_s = time.monotonic()
        outcome = _mode(copy.deepcopy(sample.model), sample.calls, plain, total, choices)
        yield name, ModeOutcome(*outcome, time_s=round(time.monotonic() - start_s, 1))


def _runnable(build: Architecture) -> tuple[Sample, list[Step]]:
    """The model in float64, or else float32, and what it does on one device."""
    torch.manual_seed(0)
    try:
        found = build()
    except Exception as reason:
        raise NotRunnable(f"not built: {_first_line(reason)}") from reason
    narrow = Sample(without_dropout(found.model), found.calls)
    try:
        wide = copy.deepcopy(narrow.model).double()
        return _settled(Sample(wide, tuple(map(_doubled, narrow.calls))))  # type: ignore[arg-type]
    except NotRunnable:
        return _settled(narrow)


def _settled(sample: Sample) -> tuple[Sample, list[Step]]:
    """What a model does, if it does the same when asked again."""
    try:
        once, again = (_steps(copy.deepcopy(sample.model), sample.calls) for _ in range(2))
    except Exception as reason:
        raise NotRunnable(f"not run on one device: {_first_line(reason)}") from reason
    if not all(torch.isfinite(x).all() for step in once for x in step.outputs):
        raise NotRunnable("its outputs are not finite")
    if difference := _difference(once, again):
        raise NotRunnable(f"it is random: {difference}")
    return sample, once


def _mode(
    model: nn.Module, calls: Any, plain: list[Step], total: float, choices: Mapping[str, Any]
) -> tuple[str, str, float, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parted = gp.partition(model, WORKERS, **choices)
            found = _steps(parted, calls)
            if difference := _difference(plain, found):
                return "wrong", difference, 0.0, 0
    except GraphpartError as reason:
        return "refused", f"{type(reason).__name__}: {_first_line(reason)}", 0.0, 0
    except Exception as reason:
        return "error", f"{type(reason).__name__}: {_first_line(reason)}", 0.0, 0
    coverage = parted.coverage
    share = min(1.0, _planned(coverage.plans) / total) if coverage.breaks and total else coverage.share
    devices = {segment.device for plan in coverage.plans for segment in plan.program.segments}
    return "right", _first_line("; ".join(coverage.notes)), round(share, 3), len(devices)


def _planned(plans: Iterable[gp.Plan]) -> float:
    """FLOPs of a forward in planned graphs, of those operators that torch counts, too."""
    return sum(op.flops_forward for plan in plans for op in plan.graph.operators if op.target.split(".")[1] in COUNTED)


def _steps(model: nn.Module, calls: Any) -> list[Step]:
    """A forward and a backward with the arguments of each call."""
    found = []
    for kwargs in calls:
        model.zero_grad()
        torch.manual_seed(1)
        result = model(**_own(kwargs))
        projection(result).backward()
        gradients = model.grad_dict() if isinstance(model, gp.PartitionedModule) else _gradients(model)
        names = [name for name, _ in model.named_buffers()]
        state = model._state if isinstance(model, gp.PartitionedModule) else None
        buffers = {n: model.get_buffer(n) if state is None else state.whole(n, model.get_buffer(n)) for n in names}
        found.append(
            Step(
                [x.detach().clone() for x in tensors_of(result)],
                {n: None if g is None else g.detach().clone() for n, g in gradients.items()},
                {n: b.detach().clone() for n, b in buffers.items()},
            )
        )
    return found


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _difference(plain: list[Step], other: list[Step]) -> str:
    """What differs first, in words; empty if nothing does."""
    for i, (a, b) in enumerate(zip(plain, other, strict=True)):
        where = f"in call {i + 1}"
        if len(a.outputs) != len(b.outputs):
            return f"{len(b.outputs)} outputs instead of {len(a.outputs)} {where}"
        largest = FLOOR * largest_of(a.gradients.values())
        for kind, wanted, got, floors in (
            ("output", dict(enumerate(a.outputs)), dict(enumerate(b.outputs)), {}),
            ("gradient of", a.gradients, b.gradients, dict.fromkeys(a.gradients, largest)),
            ("buffer", a.buffers, b.buffers, _deviations(a.buffers)),
        ):
            if wanted.keys() != got.keys():
                return f"{kind} {sorted(map(str, wanted.keys() ^ got.keys()))[0]} on one side only {where}"
            for name, one in wanted.items():
                two = got[name]
                if (one is None) != (two is None):
                    return f"{kind} {name} {'missing' if two is None else 'there, but not on one device,'} {where}"
                size = 0.0 if one is None or two is None else relative_difference(two, one, floors.get(name, 0.0))
                if not size <= TOLERANCE:
                    return f"{kind} {name} off by {size:.2g} {where}"
    return ""


def _deviations(buffers: Mapping[str, Tensor]) -> dict[str, float]:
    """Per running mean, the deviation of what it is a mean of: of normalised values it is nothing but rounding."""
    means = [name for name in buffers if name.endswith("running_mean")]
    pairs = {name: buffers.get(f"{name.removesuffix('mean')}var") for name in means}
    return {name: FLOOR * float(variance.max()) ** 0.5 for name, variance in pairs.items() if variance is not None}


def without_dropout(model: nn.Module) -> nn.Module:
    """The model in training mode with nothing dropped."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and re.search(r"drop|^p$", name):
                setattr(module, name, 0.0)
    return model.train()


def _own(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that a model may change in place."""
    copied: dict[str, Any] = tree_map_only(Tensor, Tensor.clone, dict(kwargs))
    return copied


def _doubled(kwargs: Mapping[str, Any]) -> Any:
    return tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, dict(kwargs))


def _first_line(reason: object) -> str:
    text = " ".join(str(reason).split())
    return text[:400]
