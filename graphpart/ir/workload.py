"""What one step consists of: its tasks, and what waits for what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from graphpart.ir.program import Backward, Program, Segment, Wire
from graphpart.ir.schedule import Task, place_of_update, update_of


@dataclass(frozen=True)
class Workload:
    """The tasks of one step; schedules order them, the simulator and the workers run them.

    Attributes:
        program: the lowered program.
        backward: the backward pass for one set of live wires, or None for forward only.
        split: whether gradients of weights are tasks of their own (``W``), after those of inputs (``B``).
        updates: whether each device updates its parameters at the step's end (``U``).
        update_every: of how many microbatches' gradients a device takes before it updates its :meth:`local_weights`
            within the step (asynchronous); None updates at the end alone.
        stash_weights: whether, with such updates, a microbatch's backward sees the weights of its forward.
    """

    program: Program
    backward: Backward | None = None
    split: bool = False
    updates: bool = False
    update_every: int | None = None
    stash_weights: bool = True

    @cached_property
    def waits_for(self) -> Mapping[Task, tuple[Task, ...]]:
        """Per task, the tasks that must have ended before it may start.

        This is the one readiness rule: ordering, the dry run, the simulator and both executors rest on it.
        """
        found: dict[Task, tuple[Task, ...]] = {}
        forward = {segment.name: Task("F", segment.name) for segment in self.program.segments}
        for segment in self.program.segments:
            made_by = dict.fromkeys([self.program.wire[name].segment for name in segment.inputs])
            found[forward[segment.name]] = tuple([forward[name] for name in made_by if name])
        if self.backward is None:
            return found
        for name, work in self.backward.segments.items():
            users = dict.fromkeys([task for wire in work.outputs for task in self.makers(wire)])
            found[Task("B", name)] = (forward[name], *users)
            if self.split and work.weights:
                found[Task("W", name)] = (Task("B", name),)
        if self.updates:
            for device in sorted(self.trained):
                early = self._early_updates(device)
                found.update(early)
                found[update_of(device)] = (*self._before_update(device), *early)
        return found

    @cached_property
    def trained(self) -> Mapping[int, tuple[Wire, ...]]:
        """Per device, the wires of parameters at home there that get a gradient; only devices that have some."""
        found: dict[int, list[Wire]] = {}
        for name in self.backward.sources if self.backward is not None else ():
            wire = self.program.wire[name]
            if wire.origin == "parameter":
                found.setdefault(wire.device, []).append(wire)
        return {device: tuple(wires) for device, wires in found.items()}

    def local_weights(self, device: int) -> tuple[str, ...]:
        """Wires of the parameters that a device can update alone: at home there whole, and read nowhere else."""
        return tuple(
            wire.name
            for wire in self.trained.get(device, ())
            if wire.name == wire.value
            and all(self.program.segment[name].device == device for name in self.program.readers[wire.name])
        )

    def _early_updates(self, device: int) -> dict[Task, tuple[Task, ...]]:
        """Updates within the step, each behind the gradients of its microbatches; the last ones' come at the end."""
        found: dict[Task, tuple[Task, ...]] = {}
        if self.update_every is None or not (weights := self.local_weights(device)):
            return found
        makers = dict.fromkeys(task for wire in weights for task in self.makers(wire))
        every = self.update_every
        for last in range(every - 1, self.program.num_microbatches - 1, every):
            group = range(last - every + 1, last + 1)
            found[update_of(device, last)] = (
                *(task for task in makers if self._segment(task).microbatch in group),
                *([update_of(device, last - every)] if last >= every else []),
            )
        return found

    def makers(self, wire: str) -> tuple[Task, ...]:
        """The tasks that make a part of a wire's gradient, in the order in which the parts are added."""
        if self.backward is None:
            return ()
        return tuple(
            Task("W" if self.split and wire in self.backward.segments[name].weights else "B", name)
            for name in self.backward.contributors.get(wire, ())
        )

    def _before_update(self, device: int) -> tuple[Task, ...]:
        """What reads a trained parameter that is at home on a device, forward and backward."""
        assert self.backward is not None
        found: dict[Task, None] = {}
        for wire in self.trained[device]:
            for name in self.program.readers[wire.name]:
                found[Task("F", name)] = None
                if name in self.backward.segments:
                    found[Task("B", name)] = None
            found.update(dict.fromkeys(self.makers(wire.name)))
        return tuple(found)

    @cached_property
    def device_of(self) -> Mapping[Task, int]:
        """Per task, the index of its device."""
        return {
            task: place_of_update(task)[0] if task.kind == "U" else self._segment(task).device
            for task in self.waits_for
        }

    def microbatch_of(self, task: Task) -> int | None:
        """Which microbatch a task belongs to; None if the step runs it once."""
        return None if task.kind == "U" else self._segment(task).microbatch

    def _segment(self, task: Task) -> Segment:
        return self.program.segment[task.segment]

    @cached_property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Stages as (level, device), in order; a stage is what one device does at one level, for every microbatch."""
        return tuple(sorted({(segment.level, segment.device) for segment in self.program.segments}))

    @cached_property
    def texts(self) -> Mapping[Task, str]:
        """Per task, its text: stage, kind, microbatch (``2F0``, ``2W0``); an update has its device (``2U``)."""
        number = {stage: i for i, stage in enumerate(self.stages)}
        found = {}
        for task in self.waits_for:
            if task.kind == "U":
                place, microbatch = place_of_update(task)
            else:
                segment = self._segment(task)
                place, microbatch = number[segment.level, segment.device], segment.microbatch
            found[task] = f"{place}{task.kind}{'' if microbatch is None else microbatch}"
        return found
