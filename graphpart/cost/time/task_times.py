"""Forecast time of every task of a step, by the roofline model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graphpart.cost.storage import ADAMW_BYTES_PER_ELEMENT
from graphpart.cost.time.roofline import OperatorTime, OperatorWork, operator_time, operator_works, roofline_s
from graphpart.cost.time.weight_steps import read_by, weight_steps
from graphpart.ir.cluster import Cluster, Device
from graphpart.ir.gc_pause import no_collection
from graphpart.ir.program import Program, Segment, Step, Wire
from graphpart.ir.schedule import Task, place_of_update
from graphpart.ir.workload import Workload


@no_collection()
def task_times(
    workload: Workload,
    cluster: Cluster,
    *,
    optimizer_bytes_per_element: float = ADAMW_BYTES_PER_ELEMENT,
) -> Mapping[Task, float]:
    """Time of every task, in seconds.

    Args:
        workload: the tasks of the step.
        cluster: the devices.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element, for updates.
    """
    index, backward = workload.index, workload.backward
    pricer = _Pricer(workload.program, cluster)
    found: dict[Task, float] = {}
    times: dict[str, OperatorTime] = {}
    weights_s: dict[str, float] = {}
    for task, segment in zip(index.tasks, index.segments, strict=False):  # updates, at the end, have no segment
        name = segment.name
        if task.kind == "F":
            times[name] = pricer.segment(segment)
            found[task] = times[name].forward_s
        elif task.kind == "B":
            if backward is not None and workload.split:
                weights_s[name] = pricer.weights_s(segment, backward.segments[name].weights)
            found[task] = times[name].backward_s - weights_s.get(name, 0.0)
        else:
            found[task] = weights_s[name]
    for task in index.tasks[len(index.segments) :]:
        device, microbatch = place_of_update(task)
        wires = _updated(workload, device, microbatch is None)
        found[task] = _update_s(wires, cluster.devices[device], optimizer_bytes_per_element)
    return found


def _updated(workload: Workload, device: int, is_last: bool) -> Sequence[Wire]:
    """The parameters that a device updates: at the step's end all at home there, within the step its own alone."""
    if is_last:
        return workload.trained[device]
    return [workload.program.wire[name] for name in workload.local_weights(device)]


def _update_s(wires: Iterable[Wire], device: Device, optimizer_bytes_per_element: float) -> float:
    """Time of an update: it reads parameters, gradients and optimizer state, and writes all but the gradients.

    Such an update is bound by memory; each parameter has its start on top.
    """
    total_s = 0.0
    for wire in wires:
        state_bytes = optimizer_bytes_per_element * wire.region.num_elements
        total_s += roofline_s(0.0, 3 * wire.size_bytes + 2 * state_bytes, wire.dtype, device) + device.overhead_s
    return total_s


@dataclass
class _Pricer:
    """Prices steps, each like one only once."""

    program: Program
    cluster: Cluster
    priced: dict[tuple[str, float, int], OperatorTime] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.works: Mapping[str, OperatorWork] = operator_works(self.program.graph)

    def segment(self, segment: Segment) -> OperatorTime:
        """Time of a segment, forward and backward; one that is run again takes its forward once more."""
        times = [self.step(step, segment.device) for step in segment.steps]
        forward_s, backward_s = sum([time.forward_s for time in times]), sum([time.backward_s for time in times])
        return OperatorTime(forward_s, backward_s + forward_s if segment.recompute else backward_s)

    def step(self, step: Step, device_index: int) -> OperatorTime:
        """Time of a step, forward and backward."""
        device = self.cluster.devices[device_index]
        if step.is_bridge:
            wire = self.program.wire
            names = read_by(step) | set(step.results)
            size_bytes = sum(wire[name].size_bytes for name in names if name in wire)
            copy_s = roofline_s(0.0, size_bytes, "float32", device) + device.overhead_s
            return OperatorTime(copy_s, copy_s)
        key = (step.operator, step.share, device_index)
        if key not in self.priced:
            self.priced[key] = operator_time(self.works[step.operator], device, step.share)
        return self.priced[key]

    def weights_s(self, segment: Segment, weights: Collection[str]) -> float:
        """The part of a segment's backward time that makes gradients of these of its inputs.

        The gradient of a product's weight is a product as large as the forward's, and so is that of its other factor,
        if it gets one. What has a weight but is no product has no other gradient.
        """
        reading, passing = weight_steps(segment, weights)
        total_s = sum(self.step(step, segment.device).backward_s for step in passing)
        for step in reading:
            work = self.works[step.operator]
            part = min(1.0, work.flops_forward / work.flops_backward) if work.flops_backward else 1.0
            total_s += part * self.step(step, segment.device).backward_s
        return total_s
